"""The one place that starts a kernel, and one that is compiled without Triton's own search for it.

That search takes longer than most of these kernels run: it specialises each argument anew. Here the
arguments themselves are the key, so two launches share a compiled kernel only where Triton could
see no difference between them.
"""

from __future__ import annotations

import inspect
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaDriver
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from molex_kernels._triton.arguments import STRIDED
from molex_kernels._triton.tuning import Config

_MOST = 4096  # kept launches of a kernel: sizes that change at every call must not fill the memory
# Emulation and recording replace it, after this module is imported or before: then none is direct.
_RUN = JITFunction.run if inspect.isfunction(JITFunction.run) else None
if _RUN is not None and _RUN.__code__.co_filename != inspect.getfile(JITFunction):
    _RUN = None
Kept = dict[Any, tuple[Any, tuple[Any, ...]]]  # a compiled kernel and its constants, by key
_kept: defaultdict[Any, Kept] = defaultdict(dict)
_watching = threading.local()


def start(
    kernel: Any,
    grid: tuple[int, ...],
    args: Sequence[Any],
    constants: Mapping[str, Any],
    config: Config,
) -> None:
    """`kernel[grid](*args, **constants, **config.launch_options())`"""
    active: Any = driver.active if is_plain(kernel) and is_free() else None
    kept: Kept = {}
    key = None
    if active is not None:
        kept = _kept[kernel.fn]  # a kernel's own hash is that of its source
        device = active.get_current_device()
        key = _key(device, args, constants, config)
    found = kept.get(key)
    if found is None:
        compiled = kernel[grid](*args, **constants, **config.launch_options())
        if key is not None and hasattr(compiled, "run"):  # it may be a promise of one
            if len(kept) >= _MOST:
                kept.clear()
            given = {**constants, **config.blocks}
            kept[key] = compiled, tuple(given[p.name] for p in kernel.params[len(args) :])
        _tell(kernel, None, grid, args, ())
        return
    compiled, rest = found
    run(compiled, grid, active.get_current_stream(device), (*args, *rest))
    _tell(kernel, compiled, grid, args, rest)


def run(compiled: Any, grid: tuple[int, ...], stream: Any, args: Sequence[Any]) -> None:
    """Hands a compiled kernel to the driver."""
    second, third = (*grid[1:], 1, 1)[:2]
    compiled.run(
        grid[0],
        second,
        third,
        stream,
        compiled.function,
        compiled.packed_metadata,
        *(None, None, None),  # what hooks get, and the hooks
        *args,
    )


def current_stream() -> Any:
    """Of the current device."""
    active: Any = driver.active
    return active.get_current_stream(active.get_current_device())


@contextmanager
def watched_by(watcher: Callable[..., None] | None) -> Iterator[None]:
    """Inside, each launch of this thread is told: kernel, compiled, grid, args, constants.

    `compiled` is None for one that went through Triton.
    """
    before = getattr(_watching, "watcher", None)
    _watching.watcher = watcher
    try:
        yield
    finally:
        _watching.watcher = before


def _tell(*launch: Any) -> None:
    watcher = getattr(_watching, "watcher", None)
    if watcher is not None:
        watcher(*launch)


def is_free() -> bool:
    """Whether nothing stands between kernels and CUDA's driver, as a profiler's hooks would."""
    return (
        JITFunction.run is _RUN
        and not (knobs.runtime.interpret or knobs.runtime.debug)
        and not knobs.compilation.instrumentation_mode
        and isinstance(driver.active, CudaDriver)
        and not _calls(knobs.runtime.launch_enter_hook)
        and not _calls(knobs.runtime.launch_exit_hook)
    )


def is_plain(kernel: Any) -> bool:
    """Whether nothing of the kernel's own does, either."""
    return type(kernel) is JITFunction and not (kernel.pre_run_hooks or kernel.debug)


def _calls(hook: Any) -> bool:
    return hook is not None and getattr(hook, "calls", True) != []


def _key(
    device: int, args: Sequence[Any], constants: Mapping[str, Any], config: Config
) -> tuple[Any, ...]:
    """All that a launch is specialised on: of a pointer its dtype and its alignment."""
    key = [device, config, *constants.items()]
    for arg in args:
        if type(arg) is int or arg is None:
            key.append(arg)
        elif isinstance(arg, Tensor):
            key += (arg.dtype, arg.data_ptr() % 16 == 0)
        elif type(arg) in STRIDED:
            first = arg[0]
            key += (type(arg), first.dtype, first.data_ptr() % 16 == 0, *arg[1:])
        elif type(arg) is TensorDescriptor:  # made for the launch, and specialised on its blocks
            key += (TensorDescriptor, arg.base.dtype, *arg.block_shape)
        elif isinstance(arg, tuple):
            key.append(_key(device, arg, {}, config))
        else:  # a float is never a constant
            key.append(float if type(arg) is float else (type(arg), arg))
    return tuple(key)
