"""Launch configurations of the routing kernels, by chip and shape class."""

from __future__ import annotations

from molex_kernels._triton.chips import KIB, Chip
from molex_kernels._triton.sizes import next_power_of_2
from molex_kernels._triton.tuning import Config, Options, around, kept

PROGRAMS = 264  # that share the tokens: about two for each multiprocessor of a large GPU
# Numbers that every program of the feature weights may add up by itself, 1 MiB of them.
MAX_PARTS = 2**18
_SCAN_TILE = 8192  # counts held in registers by the scan


@kept
def router(chip: Chip, block_e: int, operands: str) -> Options:
    """The accumulator holds all E experts: fewer tokens a block where there are many.

    operands: "16-bit", "fp32", or "upcast" from 16 bit, which multiplies on tensor cores too.
    """
    # In 64 KiB a stage less of 256 experts, and of 1,024 half a tile's depth or one stage.
    is_small = chip.shared <= 64 * KIB
    if operands == "16-bit":
        rows = min(64, max(16, 8192 // block_e))
        depth, stages = (64, 3) if block_e <= 256 else (32, 2)
        if is_small and block_e >= 256:
            depth, stages = 64 if block_e == 256 else 32 if block_e == 512 else 16, 2
        warps = 4 if block_e <= 256 else 8
        smaller = ((16, depth), (rows, 32))
        candidates = [Config({"BLOCK_T": r, "BLOCK_D": d}, warps, stages) for r, d in smaller]
        return Config({"BLOCK_T": rows, "BLOCK_D": depth}, warps, stages), tuple(candidates)
    rows, depth = 16, 32 if block_e <= 128 else 16
    warps = 4 if block_e <= 128 else 8
    if block_e == 1024:
        rows, warps = (8, 8) if operands == "fp32" else (16, 16)
    candidates = [Config({"BLOCK_T": rows, "BLOCK_D": 16}, warps, s) for s in (2, 3)]
    stages = 1 if is_small and block_e >= 1024 else 2
    return Config({"BLOCK_T": rows, "BLOCK_D": depth}, warps, stages), tuple(candidates)


@kept
def logits(chip: Chip, block_e: int) -> Options:
    """For the gradient of the logits."""
    rows = max(1, min(64, 4096 // block_e))
    return around(Config({"BLOCK_T": rows, "BLOCK_E": block_e}), warps=(2, 8))


@kept
def dx(chip: Chip, num_experts: int, in_parts: bool) -> Options:
    """For the gradient of x; `in_parts` where that of the logits meets aligned 16 bits."""
    if in_parts:
        sizes = {"BLOCK_D": 128, "BLOCK_E": min(32, max(16, next_power_of_2(num_experts)))}
        candidates = [Config({"BLOCK_T": 128, **sizes}, 8, 2), Config({"BLOCK_T": 64, **sizes}, 4)]
        return Config({"BLOCK_T": 64, **sizes}, 4, 2), tuple(candidates)
    candidates = [Config({"BLOCK_T": t, "BLOCK_D": 32, "BLOCK_E": 32}, 4, 2) for t in (32, 64)]
    return Config({"BLOCK_T": 32, "BLOCK_D": 64, "BLOCK_E": 32}, 8, 2), tuple(candidates)


@kept
def dgate(chip: Chip, num_experts: int, in_parts: bool) -> Options:
    """For the gradient of the gate, as `dx`; BLOCK_T is the depth of the product here."""
    block_e = min(64, max(16, next_power_of_2(num_experts)))
    if in_parts:
        depth, width = (32, 128) if block_e == 64 else (64, 64)
        sizes = {"BLOCK_T": depth, "BLOCK_D": width, "BLOCK_E": block_e}
        return around(Config(sizes, 4, 2), warps=(8,), stages=(3,))
    sizes = {"BLOCK_T": 16 if block_e == 16 else 32, "BLOCK_D": 64, "BLOCK_E": block_e}
    return around(Config(sizes, 8, 2), warps=(4,))


@kept
def plan(chip: Chip, total: int) -> Options:
    """Few blocks for the scan, but enough of them to fill the machine."""
    candidates = [Config({"BLOCK_A": a}, num_warps=w) for a, w in ((512, 4), (1024, 4), (2048, 8))]
    if total <= 4096:
        return Config({"BLOCK_A": 128}, num_warps=4), tuple(candidates)
    block, warps = (1024, 4) if total < 2**17 else (2048, 8)
    return Config({"BLOCK_A": block}, num_warps=warps), tuple(candidates)


@kept
def whole(chip: Chip, total: int) -> Options | None:
    """For a plan of one block; None for more assignments than one sorts as fast as many."""
    block = max(128, next_power_of_2(total))
    return None if block > 1024 else around(Config({"BLOCK_A": block}, max(4, block // 128)))


@kept
def scan(chip: Chip, num_blocks: int, block_e: int) -> Config:
    """As many warps as hold a tile at 32 counts a thread; of a larger tile 16 warps would spill."""
    block_b = min(next_power_of_2(num_blocks), max(1, _SCAN_TILE // block_e))
    warps = min(16, max(4, block_b * block_e // 1024))
    return Config({"BLOCK_B": block_b, "BLOCK_E": block_e}, warps)


@kept
def statistics(chip: Chip, clusters: int, is_fp32: bool, aligned: bool) -> Options:
    """For the sums over the tokens of a cluster; BLOCK_T is the depth of the product here."""
    # An element that starts anywhere has an address in registers.
    most, block_d = (32 if is_fp32 else 64, 64) if aligned else (16 if is_fp32 else 32, 32)
    block_c = min(most, max(16, next_power_of_2(clusters)))
    block_t = 32 if is_fp32 or block_c == 64 or not aligned else 64
    sizes = {"BLOCK_T": block_t, "BLOCK_D": block_d, "BLOCK_C": block_c}
    return around(Config(sizes), warps=(8,))


@kept
def keys(chip: Chip) -> Options:
    """For the keys by which a cluster's values are sorted."""
    return around(Config({"BLOCK_T": 64, "BLOCK_D": 32}), warps=(2, 8))


@kept
def ranks(chip: Chip) -> Options:
    """For the sums over sorted values."""
    return around(Config({"BLOCK_T": 128, "BLOCK_D": 16}), warps=(2, 8))


@kept
def reduce(chip: Chip) -> Options:
    """For the sum of the tiles of a cluster."""
    return around(Config({"BLOCK_T": 32, "BLOCK_D": 64}), warps=(2, 8))


@kept
def weights(chip: Chip, clusters: int) -> Options:
    """For the feature weights: a program adds up all of them, so its loads have to be many."""
    block_c = min(32, next_power_of_2(clusters))
    return around(Config({"BLOCK_D": 128, "BLOCK_C": block_c}, 8), warps=(4,))


def block_c(clusters: int) -> int:
    """A power of two above the number of clusters: few sizes, so that few kernels are compiled."""
    return 64 if clusters < 64 else 256 if clusters < 256 else next_power_of_2(clusters + 1)
