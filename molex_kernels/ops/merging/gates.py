"""Gates of the segments, the loss that balances them, and the dynamic base."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from molex_kernels import _backends, _check
from molex_kernels._dtypes import accumulate_dtype, parameter_dtypes, without_autocast
from molex_kernels._masks import selected

for _name in ("segment_gates", "noisy_topk_gates", "cv_squared_loss", "propagate_base"):
    _backends.declare(_name, _backends.REFERENCE)

NOISE_EPSILON = 1e-2
CV_EPSILON = 1e-10
FIRST = ("own", "uniform")


def segment_gates(gates: Tensor, *, first: str = "own", impl: str | None = None) -> Tensor:
    """Gates for causal segments: segment s takes the gate of s - 1 (CAMEx on GPT-2).

    out_bs = gates_b,s-1  for s >= 1;  out_b0 = stopgrad(gates_b0), or 1/E each with "uniform".

    As published, segment 0 keeps its own gate, without gradient: its first tokens see the mean of
    the whole segment. With first="uniform" no token sees a later one. The last segment's gate is
    used by the balancing loss alone.

    Args:
        gates: [B, S, E], floating, S >= 1.
        first: the gate of segment 0, "own" (published) or "uniform" (strictly causal).
        impl: None or "reference", the only implementation.

    Returns:
        [B, S, E]. Differentiable (also twice). Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: another `impl`.
    """
    _check.floating("gates", gates, "B, S, E", (None, None, None))
    if gates.shape[1] < 1:
        raise ValueError("gates: expected shape [B, S, E] with S at least 1, got S=0")
    _check.choice("first", first, FIRST)
    _backends.select("segment_gates", impl, gates)
    start = gates[:, :1].detach()
    if first == "uniform":
        start = torch.full_like(start, 1 / max(gates.shape[2], 1))
    return torch.cat([start, gates[:, :-1]], 1)


def noisy_topk_gates(
    x: Tensor,
    w_gate: Tensor,
    w_noise: Tensor | None = None,
    *,
    top_k: int,
    training: bool,
    generator: torch.Generator | None = None,
    mask: Tensor | None = None,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Noisy top-k gates (Shazeer et al., arXiv 1701.06538), as CAMEx uses them.

    z = x w_gate;  in training, with w_noise:  z += n sigma,  n ~ N(0, 1),
    sigma = softplus(x w_noise) + 0.01.  gates = softmax over the K largest of z, else 0.

    load_e, in training with noise and K < E: the expected number of rows that choose e,
    sum_s P(expert e would be among the K largest if its noise were drawn anew); else the number of
    rows that do. K = E is a plain softmax. The K largest are `torch.topk`'s, to which a NaN is the
    largest: it is seen in the gates.

    Args:
        x: [S, D], one row per segment or sequence: the mean over its tokens.
        w_gate: [D, E], of x's dtype; under autocast, which changes nothing here, 16 bits or fp32.
        w_noise: [D, E], as w_gate, or None for no noise.
        top_k: K, from 1 to E.
        training: whether to add noise.
        generator: of the noise; None is PyTorch's own. Masked rows draw noise as well.
        mask: [S] bool, True for rows that count; None counts all. Another row may hold anything,
            NaN too: its gates are 0, so that nothing is merged into its base and
            `cv_squared_loss` leaves it out, the load does not count it, and its gradient is 0.
        impl: None or "reference", the only implementation.

    Returns:
        (gates [S, E], load [E]), fp32 (fp64 for fp64 inputs). Gates are differentiable in x, w_gate
        and w_noise; load is where it is an expectation. No host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: another `impl`.
    """
    _check.floating("x", x, "S, D", (None, None))
    dtypes = parameter_dtypes(x)
    _check.tensor("w_gate", w_gate, "D, E", (x.shape[1], None), dtypes, x)
    num_experts = w_gate.shape[1]
    if w_noise is not None:
        _check.tensor("w_noise", w_noise, "D, E", w_gate.shape, dtypes, x)
    _check.integer("top_k", top_k, 1, num_experts, of=" experts")
    if mask is not None:
        _check.tensor("mask", mask, "S", (x.shape[0],), (torch.bool,), x)
    _backends.select("noisy_topk_gates", impl, x)
    dtype = accumulate_dtype(x.dtype)
    x = selected(x.to(dtype), mask)
    clean = _product(x, w_gate)
    noisy, deviation = clean, None
    if training and w_noise is not None:
        deviation = F.softplus(_product(x, w_noise)) + NOISE_EPSILON
        noise = torch.empty_like(clean).normal_(generator=generator)
        noisy = clean + noise * deviation
    largest, index = noisy.topk(min(top_k + 1, num_experts), dim=1)
    gates = chosen_gates(noisy, largest[:, :top_k], index[:, :top_k], mask)
    if deviation is None or top_k == num_experts:
        return gates, (gates > 0).sum(0).to(dtype)
    # To stay in, a logit must beat the best one outside; to come in, the last one inside.
    outside, inside = largest[:, top_k, None], largest[:, top_k - 1, None]
    threshold = torch.where(noisy > outside, outside, inside)
    chance = torch.special.ndtr((clean - threshold) / deviation)
    return gates, selected(chance, mask).sum(0)


def chosen_gates(logits: Tensor, largest: Tensor, index: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax over the chosen logits, 0 for the others and in rows that do not count.

    Args:
        logits: [S, E].
        largest: [S, K], the chosen ones.
        index: [S, K], where they are.
        mask: [S] bool, True for rows that count; None counts all.

    Returns:
        [S, E].
    """
    gates = torch.zeros_like(logits).scatter(1, index, torch.softmax(largest, 1))
    return selected(gates, mask)


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """In x's dtype, whatever autocast says: in 16 bits other experts would be chosen."""
    with without_autocast(x):
        return torch.matmul(x, weight.to(x.dtype))


def mean_of_tokens(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean over the tokens of each segment, [S, T, D] -> [S, D], of those that `mask` counts.

    Args:
        x: [S, T, D].
        mask: [S, T] bool, True for tokens that count; None counts all. Others may hold anything and
            get a gradient of 0; a segment without a token that counts has the mean 0.

    Returns:
        [S, D] in x's dtype.
    """
    if mask is None:
        return x.mean(1)
    count = mask.sum(1, keepdim=True).clamp(min=1)
    total = selected(x, mask).sum(1, dtype=accumulate_dtype(x.dtype))
    return (total / count).to(x.dtype)


def cv_squared_loss(
    gates: Tensor, load: Tensor | None = None, *, impl: str | None = None
) -> Tensor:
    """How unevenly experts are used: CV^2(sum_s gates_s) + CV^2(load), without a coefficient.

    CV^2(v) = variance(v) / (mean(v)^2 + 1e-10), the variance unbiased; 0 for one expert. The
    published coefficient is 1e-2 on T5 and 1e-5 on GPT-2, with the gates before `segment_gates`.

    Args:
        gates: [..., E], floating.
        load: [E] or None.
        impl: None or "reference", the only implementation.

    Returns:
        A scalar, fp32 (fp64 for fp64 gates). Differentiable (also twice). Deterministic, no host
        synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: another `impl`.
    """
    _check.trailing("gates", gates, "..., E")
    num_experts = gates.shape[-1]
    _backends.select("cv_squared_loss", impl, gates)
    dtype = accumulate_dtype(gates.dtype)
    loss = _cv_squared(gates.to(dtype).reshape(-1, num_experts).sum(0))
    if load is not None:
        _check.floating("load", load, "E", (num_experts,))
        loss = loss + _cv_squared(load.to(dtype))
    return loss


def propagate_base(
    base: Tensor, deltas: Tensor, gamma: float, *, impl: str | None = None
) -> Tensor:
    """The next layer's base in the paper's dynamic merging: base + gamma / E sum_e Delta_e.

    One base for all layers, moved by every layer's experts, in place of a base per layer. It is not
    in the published code.

    Args:
        base: [...], of any shape: a weight [O, D] or a bias [O].
        deltas: [E, ...] of base's dtype, E >= 1: of a weight, what `camex_deltas` gives.
        gamma: the step size.
        impl: None or "reference", the only implementation.

    Returns:
        Like base, summed in fp32 and rounded once. Differentiable in base and deltas (also twice).
        Deterministic, no host synchronisation.

    Raises:
        TypeError: an argument of a bad type or dtype, which the message names.
        ValueError: an argument of a bad shape, device or value, which the message names.
        NotImplementedError: another `impl`.
    """
    _check.trailing("base", base, "...", 0)
    _check.floating("deltas", deltas, "E, ...", (None, *base.shape), base)
    if deltas.shape[0] < 1:
        raise ValueError("deltas: expected shape [E, ...] with E at least 1, got E=0")
    _check.number("gamma", gamma, -float("inf"))
    _backends.select("propagate_base", impl, base)
    dtype = accumulate_dtype(base.dtype)
    return (base.to(dtype) + gamma * deltas.to(dtype).mean(0)).to(base.dtype)


def _cv_squared(values: Tensor) -> Tensor:
    if values.shape[0] == 1:
        return values.new_zeros(())
    return values.var() / (values.mean() ** 2 + CV_EPSILON)
