"""Compiles a recorded launch as Triton would on the chip, and keeps what the assembler says."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from aot.launches import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TRITON_MINOR = ".".join(triton.__version__.split(".")[:2])


@dataclass(frozen=True)
class Binary:
    """What a launch became: bytes of shared memory, the assembler's report, the machine code.

    Code is kept where figures are read from it: of AMD's kernels, and of sm_90's with products in
    bf16, whose loops are those of fp16.
    """

    shared: int
    report: str
    code: str


def front_end(launch: Launch, target: GPUTarget) -> str:
    """The launch in Triton's IR, optimised as far as every chip's is; raises as a GPU would."""
    return str(_lower(launch, target, "ttir")[0])


def compile_launch(launch: Launch, target: GPUTarget) -> Binary:
    """Through the whole compiler."""
    log = io.StringIO()
    with contextlib.redirect_stdout(log), knobs.nvidia.scope():
        knobs.nvidia.dump_ptxas_log = True
        result, metadata = _lower(launch, target, "")
    if target.backend == "hip":
        return Binary(metadata["shared"], "", result)
    is_read = target.arch == 90 and launch.dtype == "bf16" and metadata["has_product"]
    return Binary(metadata["shared"], log.getvalue(), _disassembled(result) if is_read else "")


def _lower(launch: Launch, target: GPUTarget, last: str) -> tuple[Any, dict[str, Any]]:
    """The stages of `triton.compile` up to `last` or, without one, up to readable code.

    That function keeps neither the assembler's report nor an unfinished module.
    """
    backend = make_backend(target)
    attributes = {place: [list(known) for known in all_] for place, all_ in launch.attributes}
    source = ASTSource(launch.function, dict(launch.signature), dict(launch.constants), attributes)
    options = backend.parse_options({**dict(launch.options), **source.parse_options()})
    stages: dict[str, Any] = {}
    backend.add_stages(stages, options, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    module = source.make_ir(
        target,
        options,
        backend.get_codegen_implementation(options),
        backend.get_module_map(),
        context,
    )
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    for name, stage in stages.items():
        module = stage(module, metadata)
        if name == "ttir":
            metadata["has_product"] = "tt.dot" in str(module)
        if name in (last, "cubin", "amdgcn"):
            break
    return module, metadata


def _disassembled(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = subprocess.run([tool, "-c", "-ndf", file.name], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"nvdisasm: {run.stderr}")
    return re.sub(r"/\*.*?\*/", "", run.stdout)
