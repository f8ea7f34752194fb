"""The chips that launch configurations are made for."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

KIB = 1024


@dataclass(frozen=True)
class Chip:
    """What a configuration may depend on."""

    name: str
    shared: int  # bytes of shared memory (AMD: LDS) that one block may have
    is_amd: bool = False
    copies_blocks: bool = False  # of a tensor that a descriptor describes, by a unit of its own


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("sm_80", 163 * KIB),
        Chip("sm_86", 99 * KIB),
        Chip("sm_89", 99 * KIB),
        Chip("sm_90", 227 * KIB, copies_blocks=True),
        Chip("sm_100", 227 * KIB, copies_blocks=True),
        Chip("sm_120", 99 * KIB, copies_blocks=True),
        Chip("gfx90a", 64 * KIB, is_amd=True),
        Chip("gfx942", 64 * KIB, is_amd=True),
        Chip("gfx950", 160 * KIB, is_amd=True),
    )
}
# Interpreted kernels run as they would on this chip, but for blocks in bf16.
_INTERPRETED = replace(CHIPS["sm_90"], copies_blocks=False)


@functools.cache
def of(device: torch.device) -> Chip:
    """The chip of a device, or the nearest one that is known."""
    if device.type != "cuda":
        return _INTERPRETED
    if torch.version.hip:
        arch = torch.cuda.get_device_properties(device).gcnArchName
        return nearest(arch.partition(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return nearest(f"sm_{10 * major + minor}")


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
