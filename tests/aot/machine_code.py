"""Figures of machine code: what can be known of a kernel's speed without the chip."""

from __future__ import annotations

import re
from dataclasses import dataclass

from aot.compiler import Binary

# Of a multiprocessor: registers, warps, blocks, and bytes of shared memory, of which a block costs
# 1 KiB more than it asks for.
_REGISTERS, _WARPS, _BLOCKS, _RESERVED = 65536, 64, 32, 1024
_SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}

# Cycles that one instruction of a warp (of a warp group, for wgmma) takes of its tensor core.
_HMMA_CYCLES = 4
_DIVISIONS = ("MUFU.RCP", "I2F")


@dataclass(frozen=True)
class Loop:
    """A loop's instructions, in order."""

    code: tuple[str, ...]

    def count(self, *opcodes: str) -> int:
        return sum(line.startswith(opcodes) for line in self.code)

    @property
    def tensor_cycles(self) -> float:
        """Cycles of the tensor core for one warp's, or warp group's, share of an iteration."""
        columns = [int(n) for line in self.code for n in re.findall(r"HGMMA\.64x(\d+)x", line)]
        return sum(columns) / 2 + self.count("HMMA") * _HMMA_CYCLES

    @property
    def product(self) -> str:
        """The tensor-core instruction that does most of the work: its shape, m x n x k."""
        shapes = re.findall(r"HGMMA\.(64x\d+x\d+)", "\n".join(self.code))
        if shapes:
            return "wgmma " + max(shapes, key=lambda shape: (shapes.count(shape), shape))
        shapes = re.findall(r"HMMA\.(\d+)", "\n".join(self.code))
        return "mma " + max(shapes, key=lambda s: (shapes.count(s), s)) if shapes else ""


def figures(binary: Binary, target: str, num_warps: int) -> dict[str, int | float | str]:
    """Of one compiled launch. More is worse, except of `blocks` and of the product's shape.

    registers: of a thread; spilled: bytes that went to memory for want of registers; shared: bytes;
    blocks: that fit on a multiprocessor together; serialized: wgmma instructions that the assembler
    could not let run asynchronously. Of the main loop, which is the one with the most tensor-core
    work: product, its instruction; loads: global loads that the loop waits for; divisions; issue:
    cycles in which the schedulers issue its instructions over cycles of the tensor cores.
    """
    if target.startswith("gfx"):
        return {
            "registers": _amd(binary.code, "vgpr_count"),
            "spilled": 4 * _amd(binary.code, "vgpr_spill_count"),
            "shared": binary.shared,
        }
    registers = max(map(int, re.findall(r"Used (\d+) registers", binary.report)))
    result: dict[str, int | float | str] = {
        "registers": registers,
        "spilled": sum(map(int, re.findall(r"(\d+) bytes spill stores", binary.report))),
        "shared": binary.shared,
        "blocks": blocks(registers, num_warps, binary.shared, target),
    }
    if serialized := len(re.findall(r"wgmma.*serialized", binary.report)):
        result["serialized"] = serialized
    loop = main_loop(binary.code)
    if loop is None:
        return result
    return {
        **result,
        "product": loop.product,
        "loads": loop.count("LDG.", "LD."),
        "divisions": loop.count(*_DIVISIONS),
        "issue": round(len(loop.code) / loop.tensor_cycles, 2),
    }


def main_loop(code: str) -> Loop | None:
    """The innermost loop with the most tensor-core work; None where no loop has any."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        line = line.strip()
        if label := re.fullmatch(r"(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif line.endswith(";"):
            lines.append(re.sub(r"^@!?U?P\w+\s+", "", line))
            if branch := re.search(r"BRA\S* .*`\((\.L\w+)\)", line):
                start = labels.get(branch[1])
                if start is not None:
                    loops.append((start, len(lines)))
    innermost = [
        Loop(tuple(lines[first:end]))
        for first, end in loops
        if not any(first <= f and e <= end and (f, e) != (first, end) for f, e in loops)
    ]
    best = max(innermost, key=lambda loop: loop.tensor_cycles, default=None)
    return best if best and best.tensor_cycles else None


def blocks(registers: int, num_warps: int, shared: int, target: str) -> int:
    """Blocks on a multiprocessor at once. A warp's registers are given out 256 at a time."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(
        _REGISTERS // (per_warp * num_warps),
        _WARPS // num_warps,
        _SHARED[target] // (shared + _RESERVED),
        _BLOCKS,
    )


def _amd(code: str, name: str) -> int:
    return int(re.search(rf"\.{name}:\s+(\d+)", code).group(1))
