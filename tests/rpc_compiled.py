"""Which instances of RPC attention's CUDA kernels are compiled, and what the compiler reports."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

from rpc_cuda import ROOT

# By kernel and parameters.
ROLES = ("kQuery", "kKey", "kBoth", "kInner")
KEYS = (64, 128, 208, 256)
KERNELS = {
    **{
        f"rpc_forward_warp_groups<E, D, {keys}>": f"WarpGroupForward<E, D, {keys}>" for keys in KEYS
    },
    "rpc_forward_on_chip<E, D, false>": "OnChipForward<E, D, false>",
    "rpc_forward_on_chip<E, D, true>": "OnChipForward<E, D, true>",
    "rpc_forward_iteration<E, D>": "ForwardLaunch<E>",
    "rpc_forward_prepare<E, D>": "ForwardLaunch<E>",
    **{
        f"rpc_backward_on_chip<E, D, {groups}, {has_q}>": (
            f"BackwardOnChipLaunch<E, D, {groups}, {has_q}>"
        )
        for groups in (1, 2)
        for has_q in ("false", "true")
    },
    "rpc_backward_rebuild<E, D>": "BackwardLaunch<E>",
    **{
        f"rpc_backward_iteration<E, D, Role::{role}, {drops}>": "BackwardLaunch<E>"
        for role in ROLES
        for drops in ("false", "true")
    },
}
WIDTHS = (16, 32, 64, 128)
# fp16 has the kernels of bf16, but for the names of two instructions.
ELEMENTS = ("device::BFloat", "float")
CHIPS = ("sm_80", "sm_90a")
# Of 256 threads with 255 registers each; a form that spills none of them was slower on an H200.
SPILLED = {("rpc_forward_warp_groups of 256 keys", "sm_90a"): 32}


def _exists(kernel: str, element: str, width: int) -> bool:
    """Whether the launchers launch it, and it may need more registers than others that they do."""
    if "warp_groups" in kernel or "backward_on_chip" in kernel:
        return element != "float" and width == 64
    if kernel == "rpc_forward_on_chip<E, D, true>":
        return element != "float" and width <= 32
    if "Role" in kernel and "kBoth" not in kernel and width < 64:
        return False
    return "kInner" not in kernel or element == "float"


def most_registers(kernel: str, element: str, width: int) -> int:
    if kernel in ("rpc_forward_warp_groups of 64 keys", "rpc_forward_warp_groups of 128 keys"):
        return 168  # three blocks share a multiprocessor
    if kernel == "rpc_forward_on_chip" and element != "float" and width <= 64:
        return 168 if width == 64 else 128
    return {"rpc_forward_prepare": 64, "rpc_backward_rebuild": 80}.get(kernel, 255)


def compile_all(result: Path) -> None:
    """Writes what the compiler says of every instance, by chip, and its code beside it."""
    folder = result.parent
    wanted = [
        (kernel, parameters, element, width)
        for kernel, parameters in KERNELS.items()
        for element in ELEMENTS
        for width in WIDTHS
        if _exists(kernel, element, width)
    ]
    instances = []
    for kernel, parameters, element, width in wanted:
        line = f"template __global__ void {kernel}(MOLEX_PARAMS {parameters});"
        instances.append(re.sub(r"\bD\b", str(width), re.sub(r"\bE\b", element, line)))
    source = folder / "instances.cu"
    head = ['#include "cuda/rpc_attention/launch.cuh"', "using namespace molex;"]
    source.write_text("\n".join([*head, "namespace molex::rpc {", *instances, "}\n"]))
    command = ["nvcc", "-std=c++20", "-O3", f"-I{ROOT / 'csrc'}", "--resource-usage", "-cubin"]
    runs = {
        chip: subprocess.Popen(
            [*command, f"-arch={chip}", source, "-o", folder / f"{chip}.cubin"],
            stderr=subprocess.PIPE,
            text=True,
        )
        for chip in CHIPS
    }
    found = {}
    for chip, run in runs.items():
        report = run.communicate()[1]
        assert run.returncode == 0, report[-3000:]
        found[chip] = [_read(part) for part in report.split("Compiling entry function")[1:]]
        assert len(found[chip]) == len(instances)
    result.write_text(json.dumps(found))


def _read(report: str) -> tuple:
    mangled = re.search(r"'(\w+)'", report).group(1)
    kernel, arguments = re.search(r"3rpc\d+([a-z_]+)I(.*?)E", mangled).groups()
    element = ELEMENTS[arguments[0] == "f"]
    if keys := re.search(r"warp_groupsI.*?ELi(\d+)E", mangled):
        kernel += f" of {keys.group(1)} keys"
    if re.search(r"backward_on_chipI.*?ELb1E", mangled):
        kernel += " with q"
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    registers = re.search(r"Used (\d+) registers", report).group(1)
    width = int(re.search(r"Li(\d+)", arguments).group(1))
    return kernel, element, width, int(registers), sum(map(int, spills.groups()))
