"""Which of a GPU's two kernels take a call that names none: what each needs, and a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from molex_kernels import _backends
from molex_kernels._triton import chips
from molex_kernels._triton.tuning import kept

HALVES = (torch.float16, torch.bfloat16)
SINGLE = (torch.float32,)
NVIDIA = tuple(chip.name for chip in chips.CHIPS.values() if not chip.is_amd)
MANY = 2**63


@dataclass(frozen=True)
class Measured:
    """Where both implementations were measured side by side.

    Attributes:
        results: File under benchmarks/results, whose name ends in the commit.
        shape: What the names of the shapes begin with.
        are_older: Whether a kernel has changed since that commit.
    """

    results: str
    shape: str
    are_older: bool = False

    def __str__(self) -> str:
        older = ", older kernels" if self.are_older else ""
        return f"measured at {self.shape}{older}: benchmarks/results/{self.results}"


class Call(NamedTuple):
    """What a row is chosen by. `width` is d, `tokens` N.

    `trains`: whether the call keeps what its backward pass needs, or is that pass. `drops`: whether
    it has dropout.
    """

    chip: str
    dtype: torch.dtype
    width: int
    tokens: int
    num_iters: int
    trains: bool
    drops: bool


@dataclass(frozen=True)
class Row:
    """What takes the calls of these dtypes, of d from `least` to `most` and N up to `tokens`.

    Without `measured` it is predicted. `trains`: for both passes of calls with a gradient, or for
    those without one; None: for all. `iterations`: the fewest and the most. `drops`: whether also
    for calls with dropout.
    """

    impl: str
    dtypes: tuple[torch.dtype, ...]
    least: int
    most: int
    tokens: int
    chips: tuple[str, ...]
    measured: Measured | None = None
    trains: bool | None = None
    iterations: tuple[int, int] = (1, MANY)
    drops: bool = True

    def holds(self, call: Call) -> bool:
        """Whether the row is for this call."""
        fits = self.least <= call.width <= self.most and call.tokens <= self.tokens
        fewest, most = self.iterations
        same = self.trains in (None, call.trains) and fewest <= call.num_iters <= most
        same = same and (self.drops or not call.drops)
        return same and fits and call.dtype in self.dtypes and call.chip in self.chips


_FIRST = "nvidia-h200/ops-2026-11-26-80ebb09cdf.json"
_LATEST = Measured("nvidia-h100/ops-2026-11-28-b4548a3.json", "B256-H3-N197-d64")
_GROUPS = (HALVES, 33, 64, 256, ("sm_90",), _LATEST)

# The first row that holds decides, so that no prediction overrides a measurement. A measured row is
# for the padded width that was measured, for which both kernels are compiled, and heads as long as
# stay on chip.
TABLE = (
    # At two iterations a step of Triton's is the faster one at N = 197, by a tenth. With dropout
    # CUDA has other kernels here than those measured.
    Row("triton", *_GROUPS, trains=True, iterations=(1, 2)),
    Row("cuda", *_GROUPS, trains=True, iterations=(3, MANY), drops=False),
    Row("triton", *_GROUPS, trains=False, iterations=(1, 1)),
    Row("cuda", *_GROUPS, trains=False, iterations=(2, MANY), drops=False),
    Row("cuda", HALVES, 1, 16, 256, ("sm_90",), Measured(_FIRST, "B96-H8-N256-d16", True)),
    Row("cuda", SINGLE, 33, 64, 256, ("sm_90",), _LATEST),
    # All iterations on chip, with the warps of two blocks on a multiprocessor.
    Row("cuda", HALVES, 1, 32, 256, NVIDIA),
    Row("triton", HALVES + SINGLE, 1, MANY, MANY, tuple(chips.CHIPS)),
)


@kept
def row_of(call: Call) -> Row:
    """The row of the table that decides."""
    return next(row for row in TABLE if row.holds(call))


def implementation(k: Tensor, num_iters: int, trains: bool, drops: bool) -> str:
    """ "cuda" where the table says so and it runs, or "" for what the device has first."""
    if k.device.type != "cuda":
        return ""
    tokens, width = k.shape[2:]
    chip = chips.of(k.device).name
    impl = row_of(Call(chip, k.dtype, width, tokens, num_iters, trains, drops)).impl
    runs = impl == "cuda" and _backends.CUDA.why_not() is None and too_small(k) is None
    return impl if runs else ""


def block_memory(k: Tensor) -> int:
    """Bytes of shared memory that the largest block of the CUDA kernels takes, in a backward pass.

    It holds 3 tiles of 64 rows, twice 3 of `columns` rows, and 3 numbers for each of the latter.
    """
    size, width = k.element_size(), max(16, 1 << (k.shape[3] - 1).bit_length())
    columns = (32 if width > 64 else 64) * 2 // size
    return (3 * 64 + 6 * columns) * (width + 8) * size + 24 * columns


def too_small(k: Tensor) -> str | None:
    """Why the CUDA kernels do not run on a GPU, such as those of gaming cards."""
    if k.device.type != "cuda":
        return None
    needed, memory = block_memory(k), _backends.block_memory(k.device.index)
    if memory >= needed:
        return None
    return f"blocks need {needed} bytes of shared memory, the device gives them {memory}"


def lines() -> list[str]:
    """The table as text."""
    return [_line(row) for row in TABLE]


def _line(row: Row) -> str:
    dtypes = " ".join(str(dtype).removeprefix("torch.") for dtype in row.dtypes)
    if row.most == MANY:
        return f"{row.impl:<7} everything else, predicted"
    where = "any NVIDIA" if row.chips == NVIDIA else " ".join(row.chips)
    shape = f"d {row.least}-{row.most}, N up to {row.tokens}"
    fewest, most = row.iterations
    if (fewest, most) != (1, MANY):
        shape += f", n {fewest}" if fewest == most else f", n from {fewest} on"
    if row.trains is not None:
        shape += ", with a gradient" if row.trains else ", without a gradient"
    if not row.drops:
        shape += ", without dropout"
    return f"{row.impl:<7} {dtypes}, {shape}, {where}: {row.measured or 'predicted'}"
