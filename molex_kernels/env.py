"""`python -m molex_kernels.env`: what is installed, what is built, what will run, and why not.

`--json` prints the same facts as JSON, for reports of bugs.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator
from typing import Any

import torch

import molex_kernels
from molex_kernels import _backends, _extension
from molex_kernels._triton import tuning
from molex_kernels.ops.rpc_attention import placement

PACKAGES = ("torch", "triton", "numpy", "transformers", "peft", "timm")
BUILD = (
    *("without_cuda", "cuda_architectures", "compiler", "cxx_flags", "vectors", "tiles"),
    "operators",
)

Facts = dict[str, Any]


def facts() -> Facts:
    """Everything that the report says, of values that JSON has; None is what is not there.

    Returns:
        By name: `molex_kernels`, `python`, `system` and `packages` are versions; `cpu` and `gpus`
        the devices; `extension` what is built and why it does not load; `default_impl` and
        `autotune` the environment's choices; `implementations` by device, op and name why not,
        None where it runs; `placement` the table of the kernels of `rpc_attention`.
    """
    return {
        "molex_kernels": molex_kernels.__version__,
        "python": sys.version.split()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "torch_cuda": torch.version.cuda,
        "gpus": [_card(index) for index in range(torch.cuda.device_count())],
        "extension": _extension_facts(),
        "default_impl": _backends.DEFAULT,
        "autotune": bool(tuning.AUTOTUNE),
        "implementations": {device: _reasons(device) for device in _devices()},
        "placement": placement.lines(),
    }


def report(found: Facts | None = None) -> str:
    """The whole report, as text.

    Args:
        found: the facts; None finds them.

    Returns:
        The text.
    """
    found = facts() if found is None else found
    parts = (_versions(found), _hardware(found), _built(found["extension"]), _will_run(found))
    return "\n\n".join("\n".join(part) for part in parts)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _card(index: int) -> Facts:
    card = torch.cuda.get_device_properties(index)
    return {
        "name": card.name,
        "capability": f"sm_{card.major}{card.minor}",
        "memory_gib": round(card.total_memory / 2**30),
    }


def _extension_facts() -> Facts:
    built = {k: v for k, v in _extension.build_facts().items() if k != "reason"}
    return {"why_not": _extension.why_not(), **built}


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _reasons(device: str) -> dict[str, dict[str, str | None]]:
    return {op: _backends.reasons(op, device) for op in sorted(_backends.IMPLEMENTATIONS)}


def _versions(found: Facts) -> Iterator[str]:
    yield f"molex_kernels {found['molex_kernels']}"
    yield f"python        {found['python']} on {found['system']}"
    for name, version in found["packages"].items():
        yield f"{name:<13} {version or 'not installed'}"


def _hardware(found: Facts) -> Iterator[str]:
    yield f"cpu           {found['cpu']['threads']} threads, {found['cpu']['capability']}"
    if not found["gpus"]:
        built = f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "no CUDA"
        yield f"gpu           none visible (torch is built with {built})"
    for index, card in enumerate(found["gpus"]):
        yield f"gpu {index}         {card['name']}, {card['capability']}, {card['memory_gib']} GiB"


def _built(extension: Facts) -> Iterator[str]:
    if extension["why_not"]:
        yield f"extension     no: {extension['why_not']}"
    if not extension["built"]:
        return
    version = extension["cuda_version"]
    cuda = f"CUDA {version}" if version else "CPU only"
    yield f"extension     built against torch {extension['torch_version']}, {cuda}"
    for key in BUILD:
        if extension.get(key):
            yield f"  {key:<18} {extension[key]}"


def _will_run(found: Facts) -> Iterator[str]:
    chosen = found["default_impl"]
    default = f"MOLEX_IMPL={chosen}" if chosen else "the fastest that runs"
    yield f"impl=None takes {default}; MOLEX_AUTOTUNE is {'on' if found['autotune'] else 'off'}"
    for device, ops in found["implementations"].items():
        yield f"on {device}:"
        for op, reasons in ops.items():
            yield f"  {op}"
            for name, reason in reasons.items():
                yield f"    {name:<10} {'runs' if reason is None else 'no: ' + reason}"
    yield "of a GPU's kernels rpc_attention takes, if impl is None, the first row's that holds:"
    yield from (f"  {line}" for line in found["placement"])


def main(arguments: list[str] | None = None) -> None:
    """Prints the report.

    Args:
        arguments: of the command line; None is the process's.
    """
    parser = argparse.ArgumentParser(prog="python -m molex_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON, with every fact by name")
    as_json = parser.parse_args(arguments).json
    found = facts()
    print(json.dumps(found, indent=1) if as_json else report(found))


if __name__ == "__main__":
    main()
