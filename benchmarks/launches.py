"""How many kernels a call launches, and how often it waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills on the GPU in one call."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == DeviceType.CUDA for event in recorded.events())


def waits(call: Callable[[], object]) -> int:
    """Times that the host waits for the GPU in one call."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)
