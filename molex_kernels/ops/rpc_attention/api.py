"""Robust and scaled attention: public functions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels import _check, _dtypes, _philox
from molex_kernels._backends import (
    CPU,
    CUDA,
    REFERENCE,
    SDPA,
    TRITON,
    cpu_product_dtype,
    declare,
    select,
)
from molex_kernels._differentiable import Once
from molex_kernels.ops.rpc_attention import op, placement, reference

_scaled = Once("scaled_attention")

THRESHOLDS = ("lam_times_mu", "lam_over_mu")
CAUSAL = (False, True, "prefix")
MAX_WIDTH = 128  # of a head, in the kernels

declare("rpc_attention", TRITON, CUDA, CPU, REFERENCE)
declare("scaled_attention", SDPA, REFERENCE)


def rpc_attention(
    k: Tensor,
    v: Tensor,
    *,
    num_iters: int,
    lam: float | None = None,
    threshold: str | float | Tensor = "lam_times_mu",
    mu_width: int | None = None,
    mu_divisor: float = 4.0,
    q: Tensor | None = None,
    causal: bool | str = False,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    return_sparse: bool = False,
    impl: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Robust symmetric attention: k is split into a low-rank part L and a sparse part S.

    With A(a, b, v) = softmax(a b^T scale) v over the tokens, soft_T(a) = sign(a) max(|a| - T, 0)
    and L = u = 0, `num_iters` times:
        S = soft_T(k - L + u);   C = k - S - u;   L = A(C, C, v);   u = u + k - L - S
    L is returned. T = lam * mu with mu = N * mu_width / (mu_divisor * ||k||_1) for each head, the
    norm over its tokens and features.

    RPC-Attention (arXiv 2406.13762) keeps Y = mu u; this form has the same results and gradients.
    Its released code, which is the default here, differs from principal component pursuit as
    textbooks have it: T = lam * mu falls as k grows, so it is not scale-equivariant, where the
    textbook (and the paper) has T = lam / mu; u is subtracted in C; and mu counts the width of the
    whole model (`mu_width` = H * d) and not of one head. With S empty the first iteration is plain
    symmetric attention A(k, k, v), the second is A(L, L, v) of that.

    Products take operands in k's dtype and accumulate in fp32; everything else is fp32. Under
    autocast k, v and q are cast, of any dtypes, and T may be 16 bits or fp32. Differentiable in k,
    v, q and a tensor T, once; to k also through mu. At |a| = T the gradient is that of |a| > T, as
    published. Deterministic for a given seed. Never waits for the device. A head
    whose norm is below 1e-20 takes that for its norm.

    Args:
        k: [B, H, N, d]. fp16, bf16, fp32 (fp64: reference only). NaN in k or v is NaN in every row
            that sees it and, through mu, in the whole head.
        v: like k, of its dtype.
        num_iters: at least 1.
        lam: at least 0; not used where `threshold` gives T.
        threshold: "lam_times_mu" (published), "lam_over_mu", or T itself: a number, or a tensor
            [B, H] or, for each token its own, [B, H, N], in k's dtype or fp32, at least 0
            (infinity keeps S empty).
        mu_width: as above; None is H * d, as published.
        mu_divisor: as above.
        q: [B, H, N, d], attends in place of C: L = A(q, C, v). This project's, not the authors'.
        causal: True masks later tokens in every iteration, while mu still sees the whole segment.
            "prefix" also takes N and the norm over the tokens up to each row, which makes T one per
            token and the whole strictly causal. The authors released no causal form.
        key_mask: [B, N] bool, True for the tokens that there are. The others are no keys, count
            neither in N nor in the norm, and their own rows are 0, whatever k, v and q hold there.
            So is all of a sequence without any.
        scale: of the scores; None is 1 / sqrt(d).
        dropout_p: probability that an element of the last iteration's softmax is dropped, in
            [0, 1); the others are divided by 1 - dropout_p. 0 in evaluation.
        dropout_seed: int64 scalar on k's device; the same seed drops the same elements, whatever
            the implementation. None draws one from torch's generator. Ignored when dropout_p is 0.
        return_sparse: whether S of the last iteration is returned, too.
        impl: "cuda" or "triton" (d <= 128), "cpu" or "reference". None takes the first of them
            that supports the inputs; of a GPU's two, the one that `python -m molex_kernels.env`
            names for the chip, dtype, d and N. The reference makes N x N tensors, the others do
            not.

    Returns:
        [B, H, N, d] in k's dtype; with `return_sparse` also S [B, H, N, d] in fp32.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, range or option.
        NotImplementedError: the explicit `impl` cannot run, such as a kernel with d > 128.
    """
    k, v, q = _dtypes.autocast(k, v, q)
    (threshold,) = _dtypes.kept(k, threshold)
    _check_heads("k", k)
    _check.same_shape("v", v, (k.dtype,), k, "k")
    if q is not None:
        _check.same_shape("q", q, (k.dtype,), k, "k")
    _check.integer("num_iters", num_iters, 1)
    _check.choice("causal", causal, CAUSAL)
    _check.flags(return_sparse=return_sparse)
    _check_key_mask(key_mask, k)
    _check_scale(scale)
    _philox.check(dropout_p, dropout_seed, k)
    given = _check_threshold(threshold, lam, mu_width, mu_divisor, k)
    width = k.shape[3]
    too_wide = f"d = {width} is above {MAX_WIDTH}" if width > MAX_WIDTH else None
    limits = {"triton": too_wide, "cuda": too_wide or placement.too_small(k)}
    chosen = select("rpc_attention", impl, k, **limits)
    if given:
        bound = _threshold_tensor(threshold, k)
    else:
        over = threshold == "lam_over_mu"
        mu_width = k.shape[1] * width if mu_width is None else mu_width
        numbers: Any = (lam, over, mu_width, mu_divisor, causal == "prefix")
        bound = reference.thresholds(k, key_mask, *numbers)
    seed = None
    if dropout_p > 0:
        seed = _philox.draw_seed(k) if dropout_seed is None else dropout_seed
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    options = (num_iters, scale, causal is not False, float(dropout_p))
    if chosen == "reference":
        low, sparse = reference.rpc_attention(k, v, q, bound, key_mask, *options, seed)
    else:
        inputs = (k, v, q, bound, key_mask, seed)
        low, sparse = op.rpc_attention(impl, *inputs, *options, return_sparse)
    return (low, sparse) if return_sparse else low


def scaled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    *,
    scale: float | None = None,
    impl: str | None = None,
) -> Tensor:
    """Attention whose values are corrected by a learned part of themselves.

    With P(a, b) = softmax(a b^T scale):
        s a scalar:   P(q, k) (v - s P(k, k) v)
        s [H, N, N]:  P(q, k) (v - s v), which is P (I - s) v
    As in the code of RPC-Attention (arXiv 2406.13762), which writes I as a tensor of B x H x N x N;
    here it is never made.

    Differentiable in everything. Under autocast all are cast. Deterministic where PyTorch's
    `scaled_dot_product_attention` is. Never waits for the device.

    Args:
        q: [B, H, N, d]. fp16, bf16, fp32 (fp64: reference only).
        k: like q, of its dtype.
        v: like q, of its dtype.
        s: [] or [1], or [H, N, N]; of q's dtype or fp32.
        scale: of the scores; None is 1 / sqrt(d).
        impl: "sdpa" (PyTorch's fused attention and, for a matrix, one product) or "reference";
            None takes the first that supports the inputs.

    Returns:
        [B, H, N, d] in q's dtype.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or range.
        NotImplementedError: the explicit `impl` cannot run.
    """
    q, k, v = _dtypes.autocast(q, k, v)
    _check_heads("q", q)
    (s,) = _dtypes.kept(q, s)
    for name, value in (("k", k), ("v", v)):
        _check.same_shape(name, value, (q.dtype,), q, "q")
    _check_s(s, q)
    _check_scale(scale)
    chosen = select("scaled_attention", impl, q)
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else float(scale)
    if chosen == "reference":
        return reference.scaled_attention(q, k, v, s, scale)
    dtype = v.dtype
    products = cpu_product_dtype(dtype) if v.is_cpu else dtype
    q, k, v, s = _scaled(*(t.to(products) for t in (q, k, v, s)))
    with _dtypes.without_autocast(v):
        if s.dim() == 3:
            # matmul would write s once for each of the batch.
            part = torch.einsum("hij,bhjd->bhid", s, v)
        else:
            part = s * F.scaled_dot_product_attention(k, k, v, scale=scale)
        return F.scaled_dot_product_attention(q, k, v - part, scale=scale).to(dtype)


def _check_heads(name: str, x: Any) -> None:
    _check.floating(name, x, "B, H, N, d", (None,) * 4)
    if x.shape[1] < 1 or x.shape[3] < 1:
        raise ValueError(
            f"{name}: expected shape [B, H, N, d] with H and d at least 1, got {list(x.shape)}"
        )


def _check_key_mask(key_mask: Any, k: Tensor) -> None:
    if key_mask is not None:
        _check.tensor("key_mask", key_mask, "B, N", k.shape[::2], (torch.bool,), k)


def _check_scale(scale: Any) -> None:
    if scale is not None:
        _check.number("scale", scale, -math.inf, exclusive=True)


def check_bound(lam: Any, mu_width: Any, mu_divisor: Any) -> None:
    """What T is computed from where it is not given."""
    _check.number("lam", lam, 0.0)
    if mu_width is not None:
        _check.integer("mu_width", mu_width, 1)
    _check.number("mu_divisor", mu_divisor, 0.0, exclusive=True)


def _check_threshold(threshold: Any, lam: Any, mu_width: Any, mu_divisor: Any, k: Tensor) -> bool:
    """Whether `threshold` gives T itself."""
    if isinstance(threshold, str):
        _check.choice("threshold", threshold, THRESHOLDS)
        check_bound(lam, mu_width, mu_divisor)
        return False
    check_bound(0.0 if lam is None else lam, mu_width, mu_divisor)  # which are not used
    if not isinstance(threshold, Tensor):
        if threshold != math.inf:
            _check.number("threshold", threshold, 0.0)
        return True
    letters = "B, H, N" if threshold.dim() == 3 else "B, H"
    dtypes = (k.dtype, _dtypes.accumulate_dtype(k.dtype))
    _check.tensor("threshold", threshold, letters, k.shape[: len(letters.split(","))], dtypes, k)
    return True


def _threshold_tensor(threshold: Any, k: Tensor) -> Tensor:
    dtype = _dtypes.accumulate_dtype(k.dtype)
    if isinstance(threshold, Tensor):
        return threshold.to(dtype)
    return k.new_full(k.shape[:2], threshold, dtype=dtype)


def _check_s(s: Any, q: Tensor) -> None:
    dtypes = (q.dtype, _dtypes.accumulate_dtype(q.dtype))
    if isinstance(s, Tensor) and s.dim() < 2 and s.numel() == 1:
        _check.tensor("s", s, "1" if s.dim() else "", s.shape, dtypes, q)
    else:
        _check.tensor("s", s, "H, N, N", (q.shape[1], q.shape[2], q.shape[2]), dtypes, q)
