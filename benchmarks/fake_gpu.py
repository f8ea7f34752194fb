"""A GPU that there is not, for what happens on the host: kernels are neither compiled nor run.

`install()` has the ops run Triton for tensors in the CPU's memory. Triton specialises launches as
for an H100; its compiler is left out, and the driver only counts launches, or keeps them.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver as drivers
from triton.runtime.jit import JITFunction


class FakeDriver(CudaDriver):
    """In the place of CUDA's driver."""

    def __init__(self) -> None:
        self.count = 0
        self.keeps = False
        # (grid, compiled kernel, the kernel's arguments)
        self.launches: list[tuple[tuple[int, ...], Compiled, tuple[Any, ...]]] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def start(self, *given: Any) -> None:
        """What a compiled kernel is started by."""
        self.count += 1
        if self.keeps:
            self.launches.append((given[:3], given[4], given[9:]))


class Compiled:
    """A specialisation of a kernel, as the compiler would have made it."""

    def __init__(self, driver: FakeDriver, key: Any) -> None:
        self.key = key
        self.run = driver.start
        self.function = self
        self.packed_metadata = ()

    def launch_metadata(self, grid: Any, stream: int, *args: Any) -> None:
        """Nothing: there are no hooks."""


def install() -> FakeDriver:
    """Before the first call of an op, in a process of its own that interprets no kernel."""
    from molex_kernels import _backends
    from molex_kernels._triton import chips

    fake = FakeDriver()
    drivers.set_active(fake)

    def compile_nothing(kernel: Any, key: Any, signature: Any, device: int, *_: Any) -> Compiled:
        found = kernel.device_caches[device][0][key] = Compiled(fake, key)
        return found

    JITFunction._do_compile = compile_nothing
    chips.of = lambda device: chips.CHIPS["sm_90"]
    _backends._INTERPRETED = True  # which says that Triton takes tensors of the CPU
    stands_for = _backends.TRITON_INTERPRETED
    object.__setattr__(stands_for, "dtypes", _backends.KERNEL_DTYPES)
    object.__setattr__(stands_for, "why_not", _backends.TRITON.why_not)
    _backends.DEFAULT = "triton"
    torch.set_num_threads(1)
    return fake
