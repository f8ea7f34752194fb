"""Instructions that RPC attention's CUDA kernels execute for one head on sm_90a, by commit.

    python tests/rpc_instructions.py COMMIT... [--tokens 197] [--width 64] [--iterations 4]

In bf16, without mask, dropout or q; forward with its state, and backward. Every warp's
instructions, which its scheduler has to issue, are counted by `sass`; nothing is timed. Needs g++,
nvcc, and the nvdisasm that comes with Triton. "." is the working tree.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from pathlib import Path

import pybind11
import sass

ROOT = Path(__file__).parents[1]


class Launch(ctypes.Structure):
    """As record.cpp has it."""

    _fields_ = [
        *(("blocks", ctypes.c_int64), ("threads", ctypes.c_int32)),
        *(("shared_bytes", ctypes.c_int32), ("cluster", ctypes.c_int32)),
        *(("kernel", ctypes.c_char * 256), ("params", ctypes.c_ubyte * 4096)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("commits", nargs="+")
    parser.add_argument("--tree", help=argparse.SUPPRESS)  # a commit's files, in its own process
    for name, default in (("tokens", 197), ("width", 64), ("iterations", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    if options.tree:
        count(Path(options.tree), options)
        return
    for commit in options.commits:
        print(commit, flush=True)
        if commit == ".":
            again(ROOT)
            continue
        with tempfile.TemporaryDirectory() as folder:
            files = subprocess.run(
                ["git", "archive", commit, "csrc", "tests"],
                cwd=ROOT,
                check=True,
                capture_output=True,
            ).stdout
            subprocess.run(["tar", "-x", "-C", folder], input=files, check=True)
            again(Path(folder))


def again(tree: Path) -> None:
    subprocess.run([sys.executable, *sys.argv, "--tree", str(tree)], check=True)


def count(tree: Path, options: argparse.Namespace) -> None:
    sys.path.insert(0, str(tree / "tests"))  # its mirror of the parameters
    import rpc_cuda
    import torch
    from torch import Tensor

    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, options.tokens, options.width)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    call = rpc_cuda.Call(
        *(draw(), draw(), None, torch.ones(shape[:2]), None, options.iterations),
        *(options.width**-0.5, False),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = recorder(tree, folder)
        library = rpc_cuda.Library(path)
        result = library.forward(call)
        library.backward(call, result, draw(), None)
        launches = recorded(path)
        code = compiled(tree, folder, {demangled(x.kernel.decode()) for x in launches})
        totals: Counter[str] = Counter()
        for launch in launches:
            name = demangled(launch.kernel.decode())
            warp = sass.Warp(code[name])
            counts: Counter[str] = Counter()
            for block in range(launch.blocks):
                for index in range(launch.threads // 32):
                    grid = (launch.threads, launch.blocks)
                    counts += warp.run(bytes(launch.params), grid, block, index)
            name = name.split(">(")[0].removeprefix("void molex::rpc::") + ">"
            forward = re.match(r"rpc_forward|on_chip|prepare|step", name)
            totals["forward" if forward else "backward"] += counts.total()
            print(
                f"  {name:45} {launch.blocks:4} x {launch.threads // 32} warps"
                f" {counts.total():9,} instructions",
                ", ".join(f"{n} {c:,}" for n, c in counts.most_common(12)),
            )
        for name, total in totals.items():
            print(f"  {name}: {total:,} instructions a head")


def recorder(tree: Path, folder: Path) -> Path:
    """The launchers over a machine that keeps launches; the fibers run nothing."""
    machine = tree / "tests/cuda_on_cpu"
    parts = {
        machine / "machine.cpp": ["-Drun=run_on_fibers"],
        machine / "warp_groups.cpp": [],
        machine / "rpc_attention.cpp": [],
        ROOT / "tests/cuda_on_cpu/record.cpp": [],
    }
    folders = (machine, tree / "csrc", pybind11.get_include(), sysconfig.get_path("include"))
    include = [f"-I{folder}" for folder in folders]
    objects = []
    for source, flags in parts.items():
        if not source.exists():  # an older tree has fewer
            continue
        objects.append(folder / f"{source.stem}.o")
        flags = ["-std=c++20", "-O1", "-march=native", "-fPIC", "-U_FORTIFY_SOURCE", *flags]
        subprocess.run(["g++", *flags, *include, "-c", source, "-o", objects[-1]], check=True)
    path = folder / "recorder.so"
    subprocess.run(["g++", "-shared", *objects, "-o", path], check=True)
    return path


def recorded(path: Path) -> list[Launch]:
    launches = []
    take = ctypes.CDLL(str(path)).take
    while True:
        launch = Launch()
        if not take(ctypes.byref(launch)):
            return launches
        launches.append(launch)


def demangled(name: str) -> str:
    text = subprocess.run(["c++filt", name], check=True, capture_output=True, text=True).stdout
    return text.strip().replace("__nv_bfloat16", "molex::device::BFloat")


def compiled(tree: Path, folder: Path, kernels: set[str]) -> dict[str, str]:
    """SASS of these kernels, by name."""
    import triton

    instances = [
        f"template __global__ {k.replace('>(', '>(MOLEX_PARAMS ', 1)};" for k in sorted(kernels)
    ]
    source = folder / "kernels.cu"
    source.write_text("\n".join(['#include "cuda/rpc_attention/launch.cuh"', *instances, ""]))
    cubin = folder / "kernels.cubin"
    command = ["nvcc", "-std=c++20", "-O3", f"-I{tree / 'csrc'}", "-arch=sm_90a", "-cubin"]
    subprocess.run([*command, source, "-o", cubin], check=True)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    text = subprocess.run([tool, "-c", cubin], check=True, capture_output=True, text=True).stdout
    return {demangled(name): code for name, code in sass.functions(text).items()}


if __name__ == "__main__":
    main()
