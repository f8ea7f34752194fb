"""RPC attention's CUDA kernels on a CPU: built by g++ over `cuda_on_cpu`, called by ctypes."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_bool, c_float, c_int32, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from molex_kernels import _philox

ROOT = Path(__file__).parents[1]
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SHARED_LIMIT = 227 * 1024  # of an H200
CLUSTER_LIMIT = 8


class _Tensor4(Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("row", c_int64)]


class _Problem(Structure):
    _fields_ = [
        ("dtype", c_int32),
        ("batch", c_int32),
        ("heads", c_int32),
        ("length", c_int32),
        ("width", c_int32),
        ("iterations", c_int32),
        ("causal", c_int32),
        ("scale", c_float),
        ("k", _Tensor4),
        ("v", _Tensor4),
        ("q", _Tensor4),
        ("threshold", c_void_p),
        ("threshold_head", c_int64),
        ("threshold_row", c_int64),
        ("key_mask", c_void_p),
        ("seed", c_void_p),
        ("dropped", c_uint32),
        ("kept_scale", c_float),
        ("shared_limit", c_int32),
        ("cluster_limit", c_int32),
    ]


class _Forward(Structure):
    _fields_ = [
        ("problem", _Problem),
        *(
            (name, c_void_p)
            for name in ("out", "sparse", "out_rest", "low_ranks", "stats", "scratch")
        ),
    ]


class _Backward(Structure):
    _fields_ = [
        ("problem", _Problem),
        ("grad_out", _Tensor4),
        ("grad_sparse", _Tensor4),
        *(
            (name, c_void_p)
            for name in (
                *(
                    "out",
                    "out_rest",
                    "low_ranks",
                    "stats",
                    "grad_k",
                    "grad_v",
                    "grad_q",
                    "grad_threshold",
                ),
                "scratch",
            )
        ),
    ]


@dataclass
class Call:
    """The arguments of one call, as the operator has them."""

    k: Tensor
    v: Tensor
    q: Tensor | None
    threshold: Tensor
    key_mask: Tensor | None
    num_iters: int
    scale: float
    is_causal: bool
    dropout_p: float = 0.0
    seed: Tensor | None = None


@dataclass
class Result:
    out: Tensor
    sparse: Tensor
    out_rest: Tensor
    low_ranks: Tensor
    stats: Tensor


class Library:
    """The kernels; `seed` orders the fibers of every launch that follows."""

    def __init__(self, path: Path) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.forward_scratch.restype = self._c.backward_scratch.restype = c_int64
        self._c.runs_on_chip.restype = c_bool
        self._c.set_options.argtypes = (ctypes.c_uint64, c_int32, c_int32)
        for name in ("runs_on_chip", "forward_scratch", "backward_scratch"):
            getattr(self._c, name).argtypes = (POINTER(_Problem),)

    def schedule(self, seed: int, left_out: tuple[int, int] = (-1, -1)) -> None:
        self._c.set_options(seed, *left_out)

    @contextmanager
    def without_clusters(self) -> Iterator[None]:
        """A device whose clusters have no room."""
        self._c.set_clusters(c_bool(False))
        try:
            yield
        finally:
            self._c.set_clusters(c_bool(True))

    def barriers(self) -> list[tuple[int, int]]:
        """Those that a thread has met since `schedule`, by kind and number."""
        kinds = range(self._c.barrier_kinds())
        return [(kind, i) for kind in kinds for i in range(self._c.most_barriers(kind))]

    def runs_on_chip(self, call: Call, **limits: int) -> bool:
        return self._c.runs_on_chip(byref(_problem(call, **limits)))

    def on_chip(self, call: Call) -> tuple[int, int]:
        """Threads and bytes of shared memory of a block of the cluster that holds a head."""
        threads, shared = c_int32(), c_int32()
        self._c.on_chip_block(byref(_problem(call)), byref(threads), byref(shared))
        return threads.value, shared.value

    def shared_bytes(self, call: Call) -> dict[str, int]:
        """What the kernels of fixed tiles ask for."""
        problem = _problem(call)
        return {
            "step": self._c.step_shared_bytes(byref(problem)),
            "gradient": self._c.gradient_shared_bytes(byref(problem)),
        }

    def forward(self, call: Call, **limits: int) -> Result:
        problem, shape = _problem(call, **limits), call.k.shape
        n = call.num_iters
        result = Result(
            _unwritten(shape, call.k.dtype),
            _unwritten(shape, torch.float32),
            _unwritten((0,) if call.k.dtype == torch.float32 else shape, call.k.dtype),
            _unwritten((n - 1, *shape), torch.float32),
            _unwritten((n, 2, *shape[:3]), torch.float32),
        )
        scratch = _scratch(self._c.forward_scratch(byref(problem)))
        fields = (*vars(result).values(), scratch)
        parameters = _Forward(problem, *(t.data_ptr() or None for t in fields))
        assert self._c.forward(byref(parameters)) == 0
        _unharmed(scratch)
        return result

    def backward(
        self, call: Call, result: Result, grad_out: Tensor, grad_sparse: Tensor | None
    ) -> dict[str, Tensor]:
        problem = _problem(call)
        gradients = {"k": _unwritten(call.k.shape, call.k.dtype)}
        gradients["v"] = gradients["k"].clone()
        if call.q is not None:
            gradients["q"] = gradients["k"].clone()
        gradients["threshold"] = _unwritten(call.threshold.shape, torch.float32)
        scratch = _scratch(self._c.backward_scratch(byref(problem)))
        pointers = [
            *(t.data_ptr() or None for n, t in vars(result).items() if n != "sparse"),
            *(gradients[n].data_ptr() if n in gradients else None for n in "kvq"),
            gradients["threshold"].data_ptr(),
            scratch.data_ptr(),
        ]
        parameters = _Backward(problem, _tensor4(grad_out), _tensor4(grad_sparse), *pointers)
        assert self._c.backward(byref(parameters)) == 0
        _unharmed(scratch)
        return gradients


def build(folder: Path) -> Library:
    """Compiles the kernels and the machine that runs them."""
    path = folder / "librpc_attention.so"
    sources = [ROOT / "tests/cuda_on_cpu" / name for name in ("machine.cpp", "rpc_attention.cpp")]
    include = [f"-I{ROOT / folder}" for folder in ("tests/cuda_on_cpu", "csrc")]
    flags = ["-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    subprocess.run(["g++", *flags, *include, *sources, "-o", path], check=True)
    return Library(path)


_CANARY = 256


def _scratch(size: int) -> Tensor:
    """NaN in every type, and a strip behind it that has to stay as it is."""
    return torch.full((size + _CANARY,), 0xFF, dtype=torch.uint8)


def _unharmed(scratch: Tensor) -> None:
    assert (scratch[-_CANARY:] == 0xFF).all(), "written behind the scratch memory"


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


def _tensor4(t: Tensor | None) -> _Tensor4:
    if t is None:
        return _Tensor4(None, 0, 0, 0)
    assert t.stride(3) == 1
    return _Tensor4(t.data_ptr(), *t.stride()[:3])


def _problem(
    call: Call, shared_limit: int = SHARED_LIMIT, cluster_limit: int = CLUSTER_LIMIT
) -> _Problem:
    batch, heads, length, width = call.k.shape
    threshold = call.threshold
    assert threshold.is_contiguous()
    return _Problem(
        *(DTYPES[call.k.dtype], batch, heads, length, width, call.num_iters, call.is_causal),
        *(call.scale, _tensor4(call.k), _tensor4(call.v), _tensor4(call.q)),
        *(threshold.data_ptr(), *(threshold.shape[2:] or (1,)), threshold.dim() == 3),
        None if call.key_mask is None else call.key_mask.data_ptr(),
        None if call.seed is None else call.seed.data_ptr(),
        *(_philox.threshold(call.dropout_p), 1 / (1 - call.dropout_p)),
        *(shared_limit, cluster_limit),
    )
