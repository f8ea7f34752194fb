"""Which of its attentions PyTorch took in a call of `F.scaled_dot_product_attention`."""

from __future__ import annotations

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

_PREFIX = "aten::_scaled_dot_product_"
BACKENDS = {
    "attention_math": "math",
    "flash_attention": "flash",
    "flash_attention_for_cpu": "flash for CPUs",
    "efficient_attention": "efficient",
    "cudnn_attention": "cuDNN",
    "fused_attention_overrideable": "other",
}


def backends(call: Callable[[], object]) -> str:
    """Their names, such as "flash"; "" where the call has no such attention."""
    # PyTorch's choice depends on shape, dtype, chip and version, and compiled code calls it too.
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        call()
    names = {event.name.removeprefix(_PREFIX) for event in recorded.events()}
    return ", ".join(sorted({BACKENDS[name] for name in names & BACKENDS.keys()}))
