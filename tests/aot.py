"""Compiles every Triton kernel that an op launches, ahead of time, for chips that are not here.

Run in a process of its own (`python tests/aot.py OP`), without TRITON_INTERPRET: operators become
plain functions, launches are recorded instead of run, and each distinct launch is compiled for each
target, just as a GPU would specialise it. Prints one JSON line per compiled kernel.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from molex_kernels import _dispatch, _register

CAPABILITIES = (80, 90, 100)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    """One specialisation of a kernel, as the just-in-time compiler would make it."""

    kernel: str
    dtype: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    options: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Compiled:
    """What the compiler and ptxas say of a launch on one chip."""

    kernel: str
    dtype: str
    blocks: dict[str, Any]
    capability: int
    registers: int
    spills: int
    shared: int
    dots: bool
    wgmma: bool


_launches: dict[Launch, JITFunction] = {}
_dtype = ""


def _record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    del grid, warmup
    bound = dict(zip(kernel.arg_names, args, strict=False))
    options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages")}
    bound.update({k: v for k, v in kwargs.items() if k not in options})
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name = parameter.name
        value = bound.get(name, parameter.default)
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            divisible.append(name)
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                divisible.append(name)
        else:
            signature[name] = "fp32"
    launch = Launch(
        kernel.__name__,
        _dtype,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        tuple(sorted(options.items())),
    )
    _launches[launch] = kernel


def _plain_functions() -> None:
    """Operators run as functions, and CPU tensors pass for a GPU's: nothing is computed anyway."""
    _register.define = lambda name, schema, *, fake, run=None: run or fake
    _dispatch.interpreted = lambda: True
    object.__setattr__(_dispatch.TRITON_INTERPRETED, "dtypes", DTYPES)
    JITFunction.run = _record


def _call(info: Any, case: Any, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = info.make(case, dtype, torch.device("cpu"), generator)
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in info.differentiable
        if isinstance(inputs.get(name), torch.Tensor)
    }
    for arguments in (inputs, {**inputs, **leaves}):
        results = info.results(info.function(**arguments, impl="triton")).values()
        outputs = [r for r in results if r.requires_grad]
        if outputs:
            upstream = [torch.zeros_like(r) for r in outputs]
            torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)


def _compile(launch: Launch, kernel: JITFunction, capability: int) -> Compiled:
    names = [name for name, _ in launch.signature]
    source = ASTSource(
        kernel,
        dict(launch.signature),
        {(names.index(name),): value for name, value in launch.constants},
        {(names.index(name),): [["tt.divisibility", 16]] for name in launch.divisible},
    )
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options=dict(launch.options))
    ptx = compiled.asm["ptx"]
    registers, spills = _resources(ptx, capability)
    constants = dict(launch.constants)
    return Compiled(
        launch.kernel,
        launch.dtype,
        {k: v for k, v in constants.items() if isinstance(v, (int, str)) and k.isupper()},
        capability,
        registers,
        spills,
        compiled.metadata.shared,
        "tt.dot" in compiled.asm["ttir"],
        "wgmma.mma_async" in ptx,
    )


def _resources(ptx: str, capability: int) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas reports them."""
    bin_folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    ptxas = bin_folder / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    chip = re.search(r"\.target (sm_\w+)", ptx).group(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            ptxas,
            "-v",
            "--regAllocOptLevel=2",
            f"--gpu-name={chip}",
            source,
            "-o",
            "/dev/null",
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", report))
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", report))
    return registers, spills


def _fullness(launch: Launch) -> tuple[int, int, int]:
    """Tensors passed, options switched on, arguments known to be multiples of 16."""
    pointers = sum(t.startswith("*") for _, t in launch.signature)
    flags = sum(v is True for _, v in launch.constants)
    return pointers, flags, len(launch.divisible)


def _folder(function: Any) -> str:
    """The op's folder that a kernel or a public function lives in."""
    return function.__module__.split(".")[2]


def compile_op(name: str) -> Iterator[Compiled]:
    """Every launch of the op, compiled for every chip."""
    global _dtype
    from molex_kernels.ops import load_ops

    info = load_ops()[name]
    for case in (*info.tests, *info.compiled):
        for dtype in DTYPES:
            _dtype = str(dtype).removeprefix("torch.")
            _call(info, case, dtype)
    # Of the launches that differ only in options, the fullest stands for its configuration.
    chosen: dict[tuple[Any, ...], Launch] = {}
    for launch, kernel in _launches.items():
        # Kernels of another op's folder are compiled with that op.
        if _folder(kernel.fn) != _folder(info.function):
            continue
        tiles = tuple((k, v) for k, v in launch.constants if k.startswith("BLOCK_"))
        key = (launch.kernel, launch.dtype, tiles, launch.options)
        if key not in chosen or _fullness(launch) > _fullness(chosen[key]):
            chosen[key] = launch
    for launch in chosen.values():
        for capability in CAPABILITIES:
            yield _compile(launch, _launches[launch], capability)


if __name__ == "__main__":
    _plain_functions()
    for result in compile_op(sys.argv[1]):
        print(json.dumps(asdict(result)), flush=True)
