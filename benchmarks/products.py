"""What multiplies matrices of 16 bits on a CPU: its own instructions, or fp32's."""

from __future__ import annotations

import functools
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

NONE = "none"
UNKNOWN = "unknown"
# Per dtype, the fastest first: the flag of /proc/cpuinfo, and its usual name.
INSTRUCTIONS = {
    torch.bfloat16: {"amx_bf16": "AMX", "avx512_bf16": "AVX-512 BF16", "bf16": "Arm BF16"},
    torch.float16: {"amx_fp16": "AMX", "avx512_fp16": "AVX-512 FP16", "asimdhp": "Arm FP16"},
}


@functools.cache
def instructions(dtype: torch.dtype) -> str:
    """Name of the CPU's fastest instructions for products in this dtype.

    "none" where it has none and "unknown" where the system does not say.
    """
    if dtype == torch.float32:
        return torch.backends.cpu.get_cpu_capability()
    flags = _flags()
    if not flags:
        return UNKNOWN
    return next((name for flag, name in INSTRUCTIONS[dtype].items() if flag in flags), NONE)


def native(dtype: torch.dtype) -> bool:
    """Whether the CPU is known to multiply in this dtype."""
    return instructions(dtype) not in (NONE, UNKNOWN)


def path(facts: Mapping[str, Any]) -> str | None:
    """Which tiles the extension multiplies on, of `molex_kernels.env`'s facts; None if unsaid."""
    tiles = facts["extension"].get("tiles")
    return f"tiles {tiles}" if tiles else None


def _flags() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    if platform.system() != "Linux" or not info.exists():
        return frozenset()
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
    return frozenset(found.group(1).split()) if found else frozenset()
