"""The chips that launch configurations are made for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from molex_kernels._triton.sizes import cdiv

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """What a configuration may depend on."""

    name: str
    shared: int  # bytes of shared memory (AMD: LDS) that one block may have
    multiprocessors: int  # of the largest card with it; `of` has the device's own number
    is_amd: bool = False
    copies_blocks: bool = False  # of a tensor that a descriptor describes, by a unit of its own

    def programs(self, num_tiles: int, resident: int) -> int:
        """Programs among which the tiles are dealt out evenly: no more than run at once.

        resident: how many of them share a multiprocessor.
        """
        return cdiv(num_tiles, cdiv(num_tiles, self.multiprocessors * resident))


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 163 * KIB, 108),
        Chip("sm_86", 99 * KIB, 84),
        Chip("sm_89", 99 * KIB, 142),
        Chip("sm_90", 227 * KIB, 132, copies_blocks=True),
        Chip("sm_100", 227 * KIB, 148, copies_blocks=True),
        Chip("sm_120", 99 * KIB, 188, copies_blocks=True),
        Chip("gfx90a", 64 * KIB, 104, is_amd=True),
        Chip("gfx942", 64 * KIB, 304, is_amd=True),
        Chip("gfx950", 160 * KIB, 256, is_amd=True),
    )
}
# Interpreted kernels run as they would on this chip, but for blocks in bf16.
_INTERPRETED = replace(CHIPS["sm_90"], copies_blocks=False)


@functools.cache
def of(device: torch.device) -> Chip:
    """The chip of a device, or the nearest one that is known, with its multiprocessors."""
    if device.type != "cuda":
        return _INTERPRETED
    properties = torch.cuda.get_device_properties(device)
    name = f"sm_{10 * properties.major + properties.minor}"
    if torch.version.hip:
        name = properties.gcnArchName.partition(":")[0]
    return replace(nearest(name), multiprocessors=properties.multi_processor_count)


def nearest(name: str) -> Chip:
    """The chip of this name; else the newest of its maker that is not newer, else the oldest."""
    if name in CHIPS:
        return CHIPS[name]
    is_amd = name.startswith("gfx")
    known = sorted((c for c in CHIPS.values() if c.is_amd == is_amd), key=lambda c: _age(c.name))
    older = [chip for chip in known if _age(chip.name) < _age(name)]
    return older[-1] if older else known[0]


def _age(name: str) -> int:
    """A number that grows from one chip of a maker to the next."""
    if name.startswith("gfx"):
        return int(name.removeprefix("gfx"), 16)
    return int(name.removeprefix("sm_"))
