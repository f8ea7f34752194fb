"""RPC attention's CUDA kernels on a CPU: built by g++ over `cuda_on_cpu`, bound by pybind11."""

from __future__ import annotations

import importlib.util
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pybind11
import torch
from torch import Tensor

from molex_kernels import _philox

ROOT = Path(__file__).parents[1]
DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
SHARED_LIMIT = 227 * 1024  # of an H200
CLUSTER_LIMIT = 8
SOURCES = ("machine.cpp", "warp_groups.cpp", "rpc_attention.cpp")


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
        spec = importlib.util.spec_from_file_location("rpc_attention", path)
        assert spec is not None
        assert spec.loader is not None
        self._c: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._c)

    def schedule(self, seed: int, left_out: tuple[int, int] = (-1, -1)) -> None:
        self._c.set_options(seed, *left_out)

    @contextmanager
    def without_clusters(self) -> Iterator[None]:
        """A device whose clusters have no room."""
        self._c.set_clusters(False)
        try:
            yield
        finally:
            self._c.set_clusters(True)

    @contextmanager
    def without_warp_groups(self) -> Iterator[None]:
        """A device that has no products by warp groups."""
        self._c.set_warp_groups(False)
        try:
            yield
        finally:
            self._c.set_warp_groups(True)

    def runs_in_warp_groups(self, call: Call, **limits: int) -> bool:
        return self._c.runs_in_warp_groups(self._problem(call, **limits))

    def barriers(self) -> list[tuple[int, int]]:
        """Those that a thread has met since `schedule`, by kind and number."""
        kinds = range(self._c.barrier_kinds)
        return [(kind, i) for kind in kinds for i in range(self._c.most_barriers(kind))]

    def runs_on_chip(self, call: Call, **limits: int) -> bool:
        return self._c.runs_on_chip(self._problem(call, **limits))

    def on_chip(self, call: Call) -> tuple[int, int]:
        """Threads and bytes of shared memory of a block of the cluster that holds a head."""
        return self._c.on_chip_block(self._problem(call))

    def gradient_is_on_chip(self, call: Call, **limits: int) -> bool:
        return self._c.gradient_is_on_chip(self._problem(call, **limits))

    def gradient_block(self, call: Call) -> tuple[int, int]:
        """As `on_chip`, of the backward pass."""
        return self._c.gradient_block(self._problem(call))

    def shared_bytes(self, call: Call) -> dict[str, int]:
        """What the kernels of fixed tiles ask for."""
        problem = self._problem(call)
        return {
            "step": self._c.step_shared_bytes(problem),
            "gradient": self._c.gradient_shared_bytes(problem),
        }

    def forward(self, call: Call, **limits: int) -> Result:
        problem, shape = self._problem(call, **limits), call.k.shape
        n = call.num_iters
        result = Result(
            _unwritten(shape, call.k.dtype),
            _unwritten(shape, torch.float32),
            _unwritten((0,) if call.k.dtype == torch.float32 else shape, call.k.dtype),
            _unwritten((n - 1, *shape), torch.float32),
            _unwritten((n, 2, *shape[:3]), torch.float32),
        )
        scratch = _scratch(self._c.forward_scratch(problem))
        pointers = {name: _pointer(t) for name, t in vars(result).items()}
        parameters = _filled(self._c.Forward(), problem=problem, scratch=_pointer(scratch))
        assert self._c.forward(_filled(parameters, **pointers)) == 0
        _unharmed(scratch)
        return result

    def backward(
        self,
        call: Call,
        result: Result,
        grad_out: Tensor,
        grad_sparse: Tensor | None,
        **limits: int,
    ) -> dict[str, Tensor]:
        problem = self._problem(call, **limits)
        gradients = {"k": _unwritten(call.k.shape, call.k.dtype)}
        gradients["v"] = gradients["k"].clone()
        if call.q is not None:
            gradients["q"] = gradients["k"].clone()
        gradients["threshold"] = _unwritten(call.threshold.shape, torch.float32)
        scratch = _scratch(self._c.backward_scratch(problem))
        parameters = _filled(
            self._c.Backward(),
            problem=problem,
            grad_out=self._tensor4(grad_out),
            grad_sparse=self._tensor4(grad_sparse),
            scratch=_pointer(scratch),
            **{name: _pointer(t) for name, t in vars(result).items() if name != "sparse"},
            **{f"grad_{name}": _pointer(t) for name, t in gradients.items()},
        )
        assert self._c.backward(parameters) == 0
        _unharmed(scratch)
        return gradients

    def _problem(
        self, call: Call, shared_limit: int = SHARED_LIMIT, cluster_limit: int = CLUSTER_LIMIT
    ) -> Any:
        batch, heads, length, width = call.k.shape
        threshold = call.threshold
        assert threshold.is_contiguous()
        return _filled(
            self._c.Problem(),
            dtype=DTYPES[call.k.dtype],
            batch=batch,
            heads=heads,
            length=length,
            width=width,
            iterations=call.num_iters,
            causal=call.is_causal,
            scale=call.scale,
            k=self._tensor4(call.k),
            v=self._tensor4(call.v),
            q=self._tensor4(call.q),
            threshold=_pointer(threshold),
            threshold_head=threshold.shape[2] if threshold.dim() == 3 else 1,
            threshold_row=threshold.dim() == 3,
            key_mask=_pointer(call.key_mask),
            seed=_pointer(call.seed),
            dropped=_philox.threshold(call.dropout_p),
            kept_scale=1 / (1 - call.dropout_p),
            shared_limit=shared_limit,
            cluster_limit=cluster_limit,
        )

    def _tensor4(self, t: Tensor | None) -> Any:
        made = self._c.Tensor4()
        if t is None:
            return made
        assert t.stride(3) == 1
        batch, head, row, _ = t.stride()
        return _filled(made, data=t.data_ptr(), batch=batch, head=head, row=row)


def _filled(parameters: Any, **fields: Any) -> Any:
    """The struct with these fields, which it has to have."""
    for name, value in fields.items():
        setattr(parameters, name, value)
    return parameters


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def build(path: Path) -> None:
    """Compiles the kernels and the machine that runs them into a `Library`'s file."""
    sources = [ROOT / "tests/cuda_on_cpu" / name for name in SOURCES]
    include = [f"-I{ROOT / folder}" for folder in ("tests/cuda_on_cpu", "csrc")]
    include += [f"-I{folder}" for folder in (pybind11.get_include(), sysconfig.get_path("include"))]
    flags = ["-std=c++20", "-O2", "-march=native", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]
    flags += [
        "-Wno-attributes"
    ]  # symbols stay visible, by which launches find their kernels' names
    subprocess.run(["g++", *flags, *include, *sources, "-o", path], check=True)


_CANARY = 256


def _scratch(size: int) -> Tensor:
    """NaN in every type, and a strip behind it that has to stay as it is."""
    return torch.full((size + _CANARY,), 0xFF, dtype=torch.uint8)


def _unharmed(scratch: Tensor) -> None:
    assert (scratch[-_CANARY:] == 0xFF).all(), "written behind the scratch memory"


def _unwritten(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)
