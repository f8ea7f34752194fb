"""Starts a kernel with the configuration for its sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from molex_kernels._triton import direct, tuning
from molex_kernels._triton.tuning import Config, Options

Blocks = Mapping[str, int]


def launch(
    kernel: Any,
    grid: Callable[[Blocks], Sequence[int]],
    args: Sequence[Any] | Callable[[Blocks], Sequence[Any]],
    constants: Mapping[str, Any],
    options: Options,
    *,
    updates: Sequence[Tensor | None] = (),
) -> Config:
    """Starts a kernel with the configuration for this launch, and returns that.

    Args:
        kernel: A jitted function.
        grid: The number of programs, from the block sizes.
        args: The kernel's arguments up to its constants; from the block sizes where a partial
            result's size depends on them.
        constants: The kernel's compile-time arguments other than the block sizes.
        options: The pinned configuration, and what MOLEX_AUTOTUNE=1 tries.
        updates: Tensors that the kernel both reads and writes: a sweep leaves them as they were.
    """

    def start(config: Config) -> None:
        blocks = config.blocks
        direct.start(kernel, tuple(grid(blocks)), _of(args, blocks), constants, config)

    config = options[0]
    if tuning.AUTOTUNE:
        given = _of(args, config.blocks)
        device = next(t.device for t in _tensors(given))
        shape_class = _shape_class([kernel], given, constants, config)
        config = tuning.choose(shape_class, options, start, device, updates)
    start(config)
    return config


def shared(
    kernels: Sequence[Any], args: Sequence[Any], options: Options, start: Callable[[Config], None]
) -> Config:
    """The configuration for kernels whose block sizes must agree; `start` launches all of them."""
    if not tuning.AUTOTUNE:
        return options[0]
    device = next(t.device for t in _tensors(args))
    return tuning.choose(_shape_class(kernels, args, {}, options[0]), options, start, device)


def _of(args: Sequence[Any] | Callable[[Blocks], Sequence[Any]], blocks: Blocks) -> Sequence[Any]:
    return args(blocks) if callable(args) else args


def _tensors(args: Sequence[Any]) -> Iterator[Tensor]:
    for arg in args:
        first = arg[0] if isinstance(arg, tuple) else arg
        if isinstance(first, Tensor):
            yield first


def _shape_class(
    kernels: Sequence[Any], args: Sequence[Any], constants: Mapping[str, Any], pinned: Config
) -> str:
    """The kernels and their source, dtypes, sizes up to the next power of two, constants."""
    parts = [f"{k.__name__} {getattr(k, 'cache_key', '')[:16]}" for k in kernels]
    parts += [f"{str(t.dtype)[6:]}{[*map(_up, t.shape)]}" for t in _tensors(args)]
    parts += [str(_up(arg)) for arg in args if type(arg) is int]
    parts += [f"{name}={value}" for name, value in constants.items()]
    return " ".join([*parts, str(pinned)])


def _up(size: int) -> int:
    return size if size < 2 else 1 << (size - 1).bit_length()
