"""`python -m molex_kernels.env`: what is installed, what is built, what will run, and why not."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Iterator

import torch

import molex_kernels
from molex_kernels import _backends, _extension
from molex_kernels._triton import tuning
from molex_kernels.ops.rpc_attention import placement

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "timm")
FACTS = ("without_cuda", "cuda_architectures", "compiler", "cxx_flags", "vectors", "operators")


def report() -> str:
    """The whole report, as text."""
    return "\n".join([*_versions(), "", *_devices(), "", *_built(), "", *_will_run()])


def _versions() -> Iterator[str]:
    yield f"molex_kernels {molex_kernels.__version__}"
    yield f"python        {sys.version.split()[0]} on {platform.system()} {platform.machine()}"
    for name in PACKAGES:
        try:
            yield f"{name:<13} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name:<13} not installed"


def _devices() -> Iterator[str]:
    capability = torch.backends.cpu.get_cpu_capability()
    yield f"cpu           {torch.get_num_threads()} threads, {capability}"
    if not torch.cuda.is_available():
        built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
        yield f"gpu           none visible (torch is built with {built})"
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        memory = card.total_memory / 2**30
        yield f"gpu {index}         {card.name}, sm_{card.major}{card.minor}, {memory:.0f} GiB"


def _built() -> Iterator[str]:
    facts = _extension.build_facts()
    if reason := _extension.why_not():
        yield f"extension     no: {reason}"
    if not facts["built"]:
        return
    cuda = f"CUDA {facts['cuda_version']}" if facts["cuda_version"] else "CPU only"
    yield f"extension     built against torch {facts['torch_version']}, {cuda}"
    for key in FACTS:
        if facts.get(key):
            yield f"  {key:<18} {facts[key]}"


def _will_run() -> Iterator[str]:
    default = f"MOLEX_IMPL={_backends.DEFAULT}" if _backends.DEFAULT else "the fastest that runs"
    yield f"impl=None takes {default}; MOLEX_AUTOTUNE is {'on' if tuning.AUTOTUNE else 'off'}"
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        yield f"on {device}:"
        for op in sorted(_backends.IMPLEMENTATIONS):
            reasons = _backends.reasons(op, device)
            yield f"  {op}"
            for name, reason in reasons.items():
                yield f"    {name:<10} {'runs' if reason is None else 'no: ' + reason}"
    yield "of a GPU's kernels rpc_attention takes, if impl is None, the first row's that holds:"
    yield from (f"  {line}" for line in placement.lines())


if __name__ == "__main__":
    print(report())
