"""Router forward: logits, top-k and scores in one launch, with feature weights inside the GEMM."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from molex_kernels._dtypes import dot_precision
from molex_kernels._triton.tuning import Config, choose


@triton.jit
def _feature_weights(
    table_ptr, stride_wc, stride_wd,  # [C, D] fp32
    labels_ptr, stride_lt, stride_lm,  # [T, M]
    mix_ptr, stride_mt, stride_mm,  # [T, M] or None
    offs_t, offs_d, mask_t, mask_d, num_labels, num_clusters,
    HAS_MIX: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """w of a tile; 1 in place of the row of an unknown label."""
    stride_wd = tl.cast(stride_wd, tl.int64)
    stride_lm = tl.cast(stride_lm, tl.int64)
    stride_mm = tl.cast(stride_mm, tl.int64)
    weight = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    for m in range(num_labels):
        label = tl.load(labels_ptr + offs_t * stride_lt + m * stride_lm, mask=mask_t, other=-1)
        label = label.to(tl.int64)
        known = (label >= 0) & (label < num_clusters)
        row = tl.load(
            table_ptr + label[:, None] * stride_wc + offs_d[None, :] * stride_wd,
            mask=known[:, None] & mask_d[None, :],
            other=1.0,
        )
        if HAS_MIX:
            part = tl.load(mix_ptr + offs_t * stride_mt + m * stride_mm, mask=mask_t, other=0.0)
            row *= part.to(tl.float32)[:, None]
        weight += row
    return weight


@triton.jit
def _load_x(
    x_ptr, stride_xt, stride_xd,  # [T, D]
    table_ptr, stride_wc, stride_wd,  # [C, D] fp32 or None
    labels_ptr, stride_lt, stride_lm,  # [T, M] or None
    mix_ptr, stride_mt, stride_mm,  # [T, M] or None
    offs_t, offs_d, mask_t, mask_d, num_labels, num_clusters,
    UPCAST: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_MIX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A tile of w * x."""
    mask = mask_t[:, None] & mask_d[None, :]
    x = tl.load(
        x_ptr + offs_t[:, None] * stride_xt + offs_d[None, :] * stride_xd, mask=mask, other=0.0
    )
    if UPCAST:
        x = x.to(tl.float32)
    if HAS_WEIGHTS:
        x *= _feature_weights(
            table_ptr, stride_wc, stride_wd, labels_ptr, stride_lt, stride_lm,
            mix_ptr, stride_mt, stride_mm, offs_t, offs_d, mask_t, mask_d,
            num_labels, num_clusters, HAS_MIX, BLOCK_T, BLOCK_D,
        )  # fmt: skip
    return x


@triton.jit
def _router_fwd(
    x_ptr, stride_xt, stride_xd,  # [T, D]
    gate_ptr, stride_ge, stride_gd,  # [E, D]
    bias_ptr, stride_be,  # [E] or None
    expert_bias_ptr, stride_ee,  # [E] or None
    table_ptr, stride_wc, stride_wd,  # [C, D] fp32 or None
    labels_ptr, stride_lt, stride_lm,  # [T, M] or None
    mix_ptr, stride_mt, stride_mm,  # [T, M] or None
    index_ptr,  # [T, K] int64, contiguous
    weight_ptr,  # [T, K] fp32, contiguous
    logits_ptr,  # [T, E] fp32, contiguous
    T, D, E, top_k, num_labels, num_clusters,
    SCORE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr, HAS_MIX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    stride_xd = tl.cast(stride_xd, tl.int64)
    stride_gd = tl.cast(stride_gd, tl.int64)
    stride_be = tl.cast(stride_be, tl.int64)
    stride_ee = tl.cast(stride_ee, tl.int64)
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    mask_t = offs_t < T
    mask_e = offs_e < E

    z = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        x = _load_x(
            x_ptr, stride_xt, stride_xd, table_ptr, stride_wc, stride_wd,
            labels_ptr, stride_lt, stride_lm, mix_ptr, stride_mt, stride_mm,
            offs_t, offs_d, mask_t, mask_d, num_labels, num_clusters,
            UPCAST, HAS_WEIGHTS, HAS_MIX, BLOCK_T, BLOCK_D,
        )  # fmt: skip
        gate = tl.load(
            gate_ptr + offs_e.to(tl.int64)[None, :] * stride_ge + offs_d[:, None] * stride_gd,
            mask=mask_d[:, None] & mask_e[None, :],
            other=0.0,
        )
        if UPCAST:
            gate = gate.to(tl.float32)
        z = tl.dot(x, gate, z, input_precision=PRECISION)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + offs_e * stride_be, mask=mask_e, other=0.0).to(tl.float32)[None, :]
    mask_te = mask_t[:, None] & mask_e[None, :]
    tl.store(logits_ptr + offs_t[:, None] * E + offs_e[None, :], z, mask=mask_te)

    probability = z
    if SCORE == "softmax":
        shifted = tl.where(mask_e[None, :], z, float("-inf"))
        shifted = tl.exp(shifted - tl.max(shifted, axis=1)[:, None])
        probability = shifted / tl.sum(shifted, axis=1)[:, None]
    key = z
    if expert_bias_ptr is not None:
        if SCORE == "softmax":
            key = probability
        if SCORE == "sigmoid":
            key = tl.sigmoid(z)
        key += tl.load(expert_bias_ptr + offs_e * stride_ee, mask=mask_e, other=0.0).to(tl.float32)[
            None, :
        ]
    # Real experts are at least the lowest finite number, so they come before the padding at -inf.
    lowest = -3.4028234663852886e38
    key = tl.where(key > lowest, key, lowest)
    key = tl.where(mask_e[None, :], key, float("-inf"))

    offs_k = tl.arange(0, BLOCK_K)
    chosen = tl.full([BLOCK_T, BLOCK_K], float("-inf"), tl.float32)
    for k in range(top_k):
        best = tl.max(key, axis=1)
        expert = tl.min(tl.where(key == best[:, None], offs_e[None, :], BLOCK_E), axis=1)
        here = offs_e[None, :] == expert[:, None]
        value = tl.sum(tl.where(here, probability, 0.0), axis=1)
        chosen = tl.where(offs_k[None, :] == k, value[:, None], chosen)
        key = tl.where(here, float("-inf"), key)
        tl.store(index_ptr + offs_t * top_k + k, expert.to(tl.int64), mask=mask_t)

    mask_k = offs_k < top_k
    if SCORE == "sigmoid":
        chosen = tl.sigmoid(chosen)
    if SCORE == "softmax_topk":
        # The largest by hand: with an expert bias the first is not the largest logit.
        chosen = tl.exp(chosen - tl.max(chosen, axis=1)[:, None])
        chosen = chosen / tl.sum(chosen, axis=1)[:, None]
    mask_tk = mask_t[:, None] & mask_k[None, :]
    tl.store(weight_ptr + offs_t[:, None] * top_k + offs_k[None, :], chosen, mask=mask_tk)


def launch_fwd(
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    expert_bias: Tensor | None,
    table: Tensor | None,
    labels: Tensor | None,
    mix: Tensor | None,
    top_k: int,
    score: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """expert_index [T, K], expert_weight [T, K] and logits [T, E]."""
    tokens, dim = x.shape
    experts = gate.shape[0]
    index = x.new_empty(tokens, top_k, dtype=torch.int64)
    weight = x.new_empty(tokens, top_k, dtype=torch.float32)
    logits = x.new_empty(tokens, experts, dtype=torch.float32)
    if tokens == 0:
        return index, weight, logits
    upcast = table is not None or x.dtype != gate.dtype
    block_e = max(16, triton.next_power_of_2(experts))

    def launch(config: Config) -> None:
        _router_fwd[(triton.cdiv(tokens, config.blocks["BLOCK_T"]),)](
            x, *x.stride(), gate, *gate.stride(), *vector(gate_bias), *vector(expert_bias),
            *weights_of(table, labels, mix), index, weight, logits,
            tokens, dim, experts, top_k, *sizes_of(table, labels),
            SCORE=score, PRECISION=precision(x.dtype, upcast), UPCAST=upcast,
            HAS_WEIGHTS=table is not None, HAS_MIX=mix is not None,
            BLOCK_E=block_e, BLOCK_K=max(8, triton.next_power_of_2(top_k)),
            **config.launch_options(),
        )  # fmt: skip

    operands = "fp32" if x.dtype == torch.float32 else "upcast" if upcast else "16-bit"
    pinned, candidates = _configs(block_e, operands)
    shape_class = (x.dtype, operands, table is not None, block_e, triton.next_power_of_2(dim))
    launch(choose("router_fwd", shape_class, pinned, candidates, launch, on_gpu=x.is_cuda))
    return index, weight, logits


def _configs(block_e: int, operands: str) -> tuple[Config, list[Config]]:
    """The accumulator holds all E experts: fewer tokens a block where there are many.

    operands: "16-bit", "fp32", or "upcast" from 16 bit, which multiplies on tensor cores too.
    """
    if operands == "16-bit":
        rows = min(64, max(16, 8192 // block_e))
        depth, stages = (64, 3) if block_e <= 256 else (32, 2)
        warps = 4 if block_e <= 256 else 8
        smaller = ((16, depth), (rows, 32))
        candidates = [Config({"BLOCK_T": r, "BLOCK_D": d}, warps, stages) for r, d in smaller]
        return Config({"BLOCK_T": rows, "BLOCK_D": depth}, warps, stages), candidates
    rows, depth = 16, 32 if block_e <= 128 else 16
    warps = 4 if block_e <= 128 else 8
    if block_e == 1024:
        rows, warps = (8, 8) if operands == "fp32" else (16, 16)
    candidates = [Config({"BLOCK_T": rows, "BLOCK_D": 16}, warps, s) for s in (2, 3)]
    return Config({"BLOCK_T": rows, "BLOCK_D": depth}, warps, 2), candidates


def precision(dtype: torch.dtype, upcast: bool) -> str:
    """How `tl.dot` multiplies fp32: as three tf32 products where the inputs were 16-bit."""
    if upcast and dtype != torch.float32:
        return "ieee" if torch.version.hip else "tf32x3"
    return dot_precision(dtype)


def vector(value: Tensor | None) -> tuple[Tensor | None, int]:
    """Pointer and stride of an optional vector."""
    return (None, 0) if value is None else (value, value.stride(0))


def matrix(value: Tensor | None) -> tuple[Tensor | None, int, int]:
    """Pointer and strides of an optional matrix."""
    return (None, 0, 0) if value is None else (value, value.stride(0), value.stride(1))


def weights_of(table: Tensor | None, labels: Tensor | None, mix: Tensor | None) -> tuple:
    """The kernel arguments of the feature weights."""
    return (*matrix(table), *matrix(labels), *matrix(mix))


def sizes_of(table: Tensor | None, labels: Tensor | None) -> tuple[int, int]:
    """Labels per token and clusters."""
    return (0 if labels is None else labels.shape[1], 0 if table is None else table.shape[0])
