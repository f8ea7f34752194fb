"""Picks an implementation, or raises with every reason why not.

Names: `reference` (plain PyTorch, everywhere), `cpu` (native CPU code), `triton` (NVIDIA, AMD, or a
CPU under Triton's interpreter), `cuda` (compiled CUDA), `sdpa` (composed from PyTorch's fused
attention, everywhere). An explicit `impl=` runs or raises; it never falls back. `MOLEX_IMPL`, read
at import, takes the place of `impl=None` for the ops that have such an implementation; otherwise
the first one that supports the inputs is taken.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from molex_kernels import _check, _extension
from molex_kernels._dtypes import FLOAT_DTYPES, KERNEL_DTYPES

NAMES = ("cuda", "triton", "sdpa", "cpu", "reference")
DEFAULT = os.environ.get("MOLEX_IMPL") or None

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HAS_TRITON = importlib.util.find_spec("triton") is not None

_Result = TypeVar("_Result")

_log = logging.getLogger("molex_kernels")


@dataclass(frozen=True)
class Implementation:
    """What one implementation needs, whatever the op. Without devices it runs on all there are."""

    name: str
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    why_not: Callable[[], str | None]

    def runs_on(self, device: str) -> bool:
        """Whether it runs on this kind of device."""
        return not self.devices or device in self.devices


def _always() -> str | None:
    return None


def interpreted() -> bool:
    """Whether Triton kernels run under its interpreter, on the CPU."""
    return _INTERPRETED


def _triton_missing() -> str | None:
    return None if _HAS_TRITON else "triton is not installed"


def _constant(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """Lets tracing take the result for a constant: what is built does not change in a run.

    `torch.compiler.assume_constant_result` does just this, and imports Dynamo and Triton first.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _version(package: str) -> str:
    return str(importlib.import_module(package).__version__)


def runs_triton(device: str) -> bool:
    """Whether Triton kernels run on this kind of device, interpreted ones on a CPU."""
    return device in TRITON.devices or (device == "cpu" and interpreted())


@_constant
def _interpreter_missing() -> str | None:
    """Triton before 3.7 takes arrays of one element for numbers, which numpy 2.4 no longer does."""
    if not _HAS_TRITON:
        return _triton_missing()
    triton, numpy = _version("triton"), _version("numpy")
    if _minor(triton) < (3, 7) and _minor(numpy) >= (2, 4):
        return (
            f"the interpreter of Triton {triton} fails with numpy {numpy}: "
            "pip install 'numpy<2.4', or Triton 3.7 or later"
        )
    return None


def _minor(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


@_constant
def _extension_missing() -> str | None:
    return _extension.why_not()


@_constant
def _cuda_missing() -> str | None:
    return _extension.why_not("cuda")


@_constant
def cpu_product_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a CPU is to multiply: fp32 for 16 bits that oneDNN does not take on this machine.

    ATen's own loops over 16 bits take several times as long as a product in fp32.
    """
    takes = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported,
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    if dtype not in takes or (torch.backends.mkldnn.is_available() and takes[dtype]()):
        return dtype
    return torch.float32


@_constant
def block_memory(device: int) -> int:
    """Bytes of shared memory that a block may have on this CUDA device."""
    properties = torch.cuda.get_device_properties(device)
    return getattr(properties, "shared_memory_per_block_optin", 0)


REFERENCE = Implementation("reference", (), FLOAT_DTYPES, _always)
SDPA = Implementation("sdpa", (), KERNEL_DTYPES, _always)
CPU = Implementation("cpu", ("cpu",), KERNEL_DTYPES, _extension_missing)
CPU_ATEN = Implementation("cpu", ("cpu",), KERNEL_DTYPES, _always)
TRITON = Implementation("triton", ("cuda",), KERNEL_DTYPES, _triton_missing)
# bf16 arithmetic is silently wrong under the interpreter, so it is refused there.
TRITON_INTERPRETED = Implementation(
    "triton", ("cpu",), (torch.float16, torch.float32), _interpreter_missing
)
CUDA = Implementation("cuda", ("cuda",), KERNEL_DTYPES, _cuda_missing)


# By op, in the order of preference; the last one is the reference.
IMPLEMENTATIONS: dict[str, tuple[Implementation, ...]] = {}


def declare(op: str, *implementations: Implementation) -> None:
    """States what `op` may run on, once, where the op is."""
    IMPLEMENTATIONS[op] = implementations


def check_impl(impl: str | None) -> None:
    """The name of an implementation, or None: what can be known of `impl` before a call."""
    _check.choice("impl", impl, (*NAMES, None))


def select(
    op: str,
    impl: str | None,
    x: Tensor,
    **limits: str | None,
) -> str:
    """The name of the implementation of `op` that runs for `x`.

    `limits` maps a name to the reason why that implementation cannot take this call's shapes, or to
    None.
    """
    implementations = IMPLEMENTATIONS[op]
    name = impl
    if name is not None:
        check_impl(name)
    elif DEFAULT is not None:
        _check.choice("MOLEX_IMPL", DEFAULT, NAMES)
        name = next((i.name for i in implementations if i.name == DEFAULT), None)
    if name is not None:
        reason = _why_not(op, name, x.device.type, x.dtype) or limits.get(name)
        if reason is None:
            return name
        raise NotImplementedError(
            f"{op}: impl={name!r} cannot run: {reason}. " + _others(op, name, x, limits)
        )
    device, dtype = x.device.type, x.dtype
    for candidate in implementations:
        if candidate.name == "triton" and device == "cpu":
            continue  # interpreted kernels are for tests
        # A tensor without memory has results of the shapes that every kernel gives.
        if (candidate.runs_on(device) or device == "meta") and _takes(candidate, dtype):
            reason = (device != "meta" and candidate.why_not()) or limits.get(candidate.name)
            if reason is None:
                return candidate.name
            _warn_once(op, candidate.name, reason)
    raise NotImplementedError(f"{op}: " + _others(op, "", x, limits))


def _why_not(op: str, name: str, device: str, dtype: torch.dtype) -> str | None:
    for candidate in IMPLEMENTATIONS[op]:
        if candidate.name != name:
            continue
        if name == "triton" and device == "cpu":
            if not interpreted():
                return "it needs a GPU (or TRITON_INTERPRET=1 before the import, for tests)"
            candidate = TRITON_INTERPRETED
        if not candidate.runs_on(device):
            return f"it runs on {' or '.join(candidate.devices)}, the inputs are on {device}"
        if not _takes(candidate, dtype):
            names = ", ".join(str(d).removeprefix("torch.") for d in candidate.dtypes)
            return f"it takes {names}; the inputs are {str(dtype).removeprefix('torch.')}"
        return candidate.why_not()
    return f"{op} has no such implementation"


def _takes(implementation: Implementation, dtype: torch.dtype) -> bool:
    """`dtypes` are floating ones: ops on indices alone have checked theirs before."""
    return dtype in implementation.dtypes or not dtype.is_floating_point


def reasons(op: str, device: str) -> dict[str, str | None]:
    """Why each implementation of `op` does not run on this kind of device; None where it does."""
    return {i.name: _why_not(op, i.name, device, torch.float32) for i in IMPLEMENTATIONS[op]}


def _others(op: str, tried: str, x: Tensor, limits: dict[str, str | None]) -> str:
    lines = []
    for other in IMPLEMENTATIONS[op]:
        if other.name == tried:
            continue
        reason = _why_not(op, other.name, x.device.type, x.dtype)
        lines.append(f"{other.name}: {reason or limits.get(other.name) or 'would run'}")
    return "Others: " + "; ".join(lines)


_warned: set[tuple[str, str, str]] = set()


@_constant
def _warn_once(op: str, name: str, reason: str) -> None:
    if (op, name, reason) not in _warned:
        _warned.add((op, name, reason))
        _log.warning("%s: %r cannot run, taking the next implementation: %s", op, name, reason)
