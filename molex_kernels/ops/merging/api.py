"""Curvature-aware merging: public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from molex_kernels import _check, _dtypes
from molex_kernels._backends import CPU, REFERENCE, TRITON, declare, select
from molex_kernels.ops.merging import op, reference
from molex_kernels.ops.merging.types import KroneckerCurvature

MASKS = (None, "ties")
ELECTIONS = ("unweighted", "weighted")
FACTORS = KroneckerCurvature._fields
BIAS_FACTORS = ("out1", "out2")

declare("camex_merge", TRITON, CPU, REFERENCE)
declare("camex_deltas", TRITON, CPU, REFERENCE)
declare("camex_linear", TRITON, CPU, REFERENCE)


def camex_deltas(
    base: Tensor,
    experts: Tensor,
    *,
    curvature: KroneckerCurvature | None = None,
    mask: str | None = None,
    impl: str | None = None,
) -> Tensor:
    """What every expert adds to the base when its gate is 1 (CAMEx, arXiv 2502.18821).

    tau_e = experts_e - base,   Delta_e = mask_e * M_e tau_e,
    M_e tau = sum_r (out1_re (x) out2_re) tau (in1_re (x) in2_re)^T.

    `mask="ties"`: mask_e = [sign(tau_e) == sign(sum_j tau_j)] element by element, of tau before the
    curvature; it is 1 where all experts equal the base. The mask is a constant in the gradient.
    Without curvature M is the identity: plain task vectors. This is the sign election of TIES
    (arXiv 2306.01708) on unweighted task vectors, as CAMEx publishes it, without its trim and its
    disjoint mean; `camex_merge` has the others.

    The deltas depend on parameters alone: they can be kept from one change of them to the next and
    passed to `camex_linear`. The factors are applied one after the other, where the published code
    holds r copies of tau.

    Differentiable in base, experts and the factors, once. Deterministic. Never waits for the
    device. Extra memory: a few fp32 tensors [E, O, D], whatever the rank.

    Args:
        base: [O, D]. fp16, bf16, fp32 (fp64: reference only).
        experts: [E, O, D], E >= 1, of base's dtype.
        curvature: `KroneckerCurvature` of base's dtype, any rank r >= 1, any factors with o1 o2 = O
            and d1 d2 = D; or None.
        mask: "ties" or None.
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs.

    Returns:
        [E, O, D] in base's dtype, summed in fp32. For 16-bit inputs Triton multiplies tau in TF32
        and keeps what stands between two factors in base's dtype. Autocast is left out: the
        difference of two weights needs their precision.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or mask, no expert.
        NotImplementedError: the explicit `impl` cannot run.
    """
    layer = Layer(base, experts, curvature).promoted()
    _check.choice("mask", mask, MASKS)
    check_deltas(layer)
    chosen = select("camex_deltas", impl, layer.base)
    return deltas_of(layer, mask, chosen if chosen == "reference" else impl)


def camex_merge(
    base: Tensor,
    experts: Tensor,
    gates: Tensor,
    *,
    curvature: KroneckerCurvature | None = None,
    mask: str | None = None,
    alpha: float = 1.0,
    elect: str = "unweighted",
    normalize: bool = False,
    density: float = 1.0,
    impl: str | None = None,
) -> Tensor:
    """The merged weight of every segment: W_s = base + alpha sum_e gates_se Delta_e.

    For a look at the weights, or to export them: `camex_linear` does not keep them. The deltas are
    those of `camex_deltas`, by `impl`; the sum over experts is in fp32, on a GPU PyTorch's. On a
    CPU and without curvature the deltas are made on the way and never rounded.

    With mask="ties", elect="weighted" this is TIES merging (arXiv 2306.01708) as mergekit has it,
    where normalize=True is the default. Element by element,

        tau_e = experts_e - base, where |tau_e| is among the density O D largest of e; else 0
        keep_se = [sign(gates_se tau_e) == sign_s]
        sign_s = 1 where sum_e gates_se tau_e >= 0, else -1             elect="weighted"
        W_s = base + alpha sum_e keep_se gates_se M_e tau_e / n_s
        n_s = 1, or with normalize  sum_e keep_se gates_se, unless that is 0

    elect="unweighted" keeps [sign(tau_e) == sign(sum_e tau_e)], the same in every segment: CAMEx as
    published, and what `camex_linear` and the modules do. Without a mask every keep is 1. A gate is
    a weight, also one of 0: the NaN of an expert reaches every segment.

    Args:
        base: as in `camex_deltas`.
        experts: as in `camex_deltas`.
        gates: [S, E], fp32 or base's dtype; rows need not sum to one.
        curvature: as in `camex_deltas`; of what is left of tau by `density`.
        mask: as in `camex_deltas`.
        alpha: the step size of the paper; the published code has 1.
        elect: "unweighted" or "weighted", by gates times task vectors; needs mask="ties".
        normalize: whether the sum is divided by the gates of the experts that are kept.
        density: the share of each task vector that is kept, in (0, 1]: the int(density O D) largest
            in size, at least one; of equal ones those that come first.
        impl: as in `camex_deltas`; what these options ask for is composed of PyTorch's operators.

    Returns:
        [S, O, D] in base's dtype. Differentiable in base, experts, gates and the factors, once;
        what is kept is a constant. The options take fp32 tensors [S, E, O, D] of memory.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or option.
        NotImplementedError: the explicit `impl` cannot run.
    """
    base, experts, curvature = Layer(base, experts, curvature).promoted()[:3]
    _check.floating("base", base, "O, D", (None, None))
    _check_experts(experts, base)
    _check_gates("gates", gates, base, (None, experts.shape[0]))
    _check.number("alpha", alpha, -float("inf"))
    _check.flags(normalize=normalize)
    _check_election(mask, elect, normalize, density)
    weights = _scaled(gates, 1.0, base.dtype)
    if elect == "unweighted" and not normalize and density == 1.0:
        layer = Layer(base, experts, curvature)
        check_deltas(layer)
        return _merge(layer, _scaled(gates, alpha, base.dtype), mask, impl)
    if density < 1.0:
        experts = reference.trim(base, experts, density)
    delta = camex_deltas(base, experts, curvature=curvature, impl=impl)
    kept = None
    if mask == "ties":
        kept = reference.elected(base, experts, weights if elect == "weighted" else None)
    return reference.merge_kept(base, delta, weights, kept, normalize, alpha)


def camex_linear(
    x: Tensor,
    base: Tensor,
    experts: Tensor | None,
    gates: Tensor,
    *,
    curvature: KroneckerCurvature | None = None,
    mask: str | None = None,
    deltas: Tensor | None = None,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    base_bias: Tensor | None = None,
    bias_curvature: Sequence[Tensor] | None = None,
    expert_dropout: float = 0.0,
    impl: str | None = None,
) -> Tensor:
    """A linear layer whose weight is merged anew for every segment (CAMEx, arXiv 2502.18821).

    y_s = x_s W_s^T + b_s,
    W_s = base + alpha sum_e keep_se gates_se Delta_e,
    b_s = base_bias + alpha sum_e keep_se gates_se Delta_e(bias).

    Delta is that of `camex_deltas`; of a bias, tau_e = bias_e - base_bias as [o1, o2] with the
    curvature sum_r (out1_re (x) out2_re) and its own mask. The merged weights are never written
    as a whole: tiles are merged on their way into the product, forward and backward, and the gates'
    gradient <dW_s, Delta_e> is taken while a tile of dW_s = dy_s^T x_s is at hand. In fp16 and bf16
    with T > 64, a GPU merges pieces of at most 48 MiB for several segments at once, and keeps dW in
    such pieces. Extra memory does not grow with S beyond that, but for a partial sum per segment
    and tile of the gates' gradient and, in fp16 and bf16 on a CPU, for x and dy in fp32 during the
    backward pass. On matrix tiles (bf16, Intel's AMX) there are packed copies in bf16 in
    their place, of x also in the forward pass.

    One op for a family: no curvature and no mask is soft merging of task vectors, "ties" adds the
    election of signs as CAMEx publishes it (by unweighted task vectors; `camex_merge` has TIES as
    others publish it), expert_dropout DARE-like dropout of whole experts.

    A gate is a weight, also one of 0: where an expert holds NaN or inf, W_s and y_s are NaN in
    every segment, as in the product with a gate of 0 they are.

    keep_se is 1 / (1 - p) with probability 1 - p, else 0, drawn once per call from PyTorch's
    generator; p = `expert_dropout`. The published code draws one for the weight (p = 0.1) and
    another for the bias; here both share it.

    Differentiable in x, base, experts, gates, deltas, the biases and all factors, once.
    Deterministic but for the dropout. Never waits for the device.

    Args:
        x: [S, T, D]. fp16, bf16, fp32 (fp64: reference only).
        base: [O, D] of x's dtype, any strides.
        experts: [E, O, D]; None when `deltas` are given.
        gates: [S, E], fp32 or x's dtype; rows need not sum to one.
        curvature: as in `camex_deltas`.
        mask: as in `camex_deltas`.
        deltas: [E, O, D] from `camex_deltas(base, experts, ...)`, in place of `experts` and
            `curvature`, which must then be None; `mask` is then that of the biases alone. Their
            gradient reaches base, experts and curvature through the call that made them.
        alpha: the step size of the paper; the published code has 1.
        bias: [E, O] or None; it needs `base_bias`.
        base_bias: [O] or None; without `bias` it is added as it is.
        bias_curvature: (out1 [r, E, o1, o1], out2 [r, E, o2, o2]) or None. The published code means
            this and cannot run it.
        expert_dropout: p in [0, 1).
        impl: "triton", "cpu" or "reference"; None takes the fastest that supports the inputs.

    Returns:
        [S, T, O] in x's dtype. W_s is summed in fp32 and rounded to x's dtype, the product
        accumulated in fp32. Under autocast x, base and the deltas are cast; the deltas are made
        before that, in the parameters' dtype.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or option.
        NotImplementedError: the explicit `impl` cannot run.
    """
    layer = Layer(base, experts, curvature, deltas, bias, base_bias, bias_curvature).promoted()
    _check.floating("x", x, "S, T, D", (None, None, None))
    check_options(mask, alpha, expert_dropout)
    check_layer(layer, x, gates, in_features=x.shape[2])
    chosen = select("camex_linear", impl, _dtypes.autocast(x)[0])
    named = chosen if chosen == "reference" else impl
    return linear(x, layer, gates, mask, alpha, expert_dropout, named)


class Layer(NamedTuple):
    """The parameters of one merged linear layer, as `camex_linear` has them."""

    base: Tensor
    experts: Any  # a tensor, or None where deltas are given
    curvature: KroneckerCurvature | None = None
    deltas: Tensor | None = None
    bias: Tensor | None = None
    base_bias: Tensor | None = None
    bias_curvature: Sequence[Tensor] | None = None

    def promoted(self) -> Any:
        """In one dtype under autocast, but for deltas, which have been made in it."""
        deltas = self.deltas
        return Layer(*_parameters(*self._replace(deltas=None)))._replace(deltas=deltas)


def check_options(mask: Any, alpha: Any, expert_dropout: Any) -> None:
    """The options of `camex_linear`."""
    _check.choice("mask", mask, MASKS)
    _check.number("alpha", alpha, -float("inf"))
    _check_dropout(expert_dropout)


def check_deltas(
    layer: Layer, between: tuple[int | None, int | None] = (None, None), of: str = ""
) -> None:
    """What deltas are made of, where the base has the sizes [O, D] = `between`.

    `of` stands behind the names of arguments in a message.
    """
    base, experts = layer.base, layer.experts
    _check.floating(f"base{of}", base, "O, D", between)
    _check_experts(experts, base, f"experts{of}")
    _check_factors(f"curvature{of}", layer.curvature, FACTORS, base, experts.shape[0])


def check_layer(
    layer: Layer,
    x: Tensor,
    gates: Tensor,
    *,
    out_features: int | None = None,
    in_features: int,
    num_experts: int | None = None,
    of: str = "",
    of_gates: str = "",
) -> None:
    """Everything that one merged layer takes beside its input [S, T, D], of the dtype of x."""
    dtypes = _dtypes.parameter_dtypes(x)
    base = layer.base
    _check.tensor(f"base{of}", base, "O, D", (out_features, in_features), dtypes, x)
    num_experts = _check_stack(layer, dtypes, num_experts, of).shape[0]
    _check_gates(f"gates{of_gates}", gates, x, (x.shape[0], num_experts))
    _check_bias(layer, num_experts, of)
    for name, factors, fields in (
        ("curvature", layer.curvature, FACTORS),
        ("bias_curvature", layer.bias_curvature, BIAS_FACTORS),
    ):
        _check_factors(f"{name}{of}", factors, fields, base, num_experts)


def linear(
    x: Tensor,
    layer: Layer,
    gates: Tensor,
    mask: str | None,
    alpha: float,
    expert_dropout: float,
    impl: str | None,
) -> Tensor:
    """`camex_linear` of checked arguments, `layer` being promoted and `impl` selected."""
    gates = _scaled(gates, alpha, x.dtype)
    if expert_dropout:
        keep = torch.rand_like(gates) >= expert_dropout
        gates = torch.where(keep, gates / (1 - expert_dropout), 0)
    merged_bias = None
    if layer.base_bias is not None:
        merged_bias = _merged_bias(layer, layer.base_bias, gates, mask)
    deltas = deltas_of(layer, mask, impl) if layer.deltas is None else layer.deltas
    x, base, deltas = _dtypes.autocast(x, layer.base, deltas)
    if impl == "reference":
        return reference.linear(x, base, deltas, gates, merged_bias)
    return op.linear(impl, x, base, deltas, gates, merged_bias)


def deltas_of(layer: Layer, mask: str | None, impl: str | None) -> Tensor:
    """`camex_deltas` of checked arguments, `layer` being promoted and `impl` selected."""
    ties = mask == "ties"
    curvature = layer.curvature
    if impl == "reference":
        return reference.deltas(layer.base, layer.experts, curvature, ties)
    factors = (None,) * 4 if curvature is None else curvature
    return op.deltas(impl, layer.base, layer.experts, *factors, ties)


def _parameters(*values: Any) -> Any:
    """Tensors and tuples of them, brought to one dtype under autocast: deltas are made in it."""
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    found = iter(_dtypes.promoted(*flat))
    return [
        tuple(next(found) for _ in value) if isinstance(value, tuple) else next(found)
        for value in values
    ]


def _merge(layer: Layer, gates: Tensor, mask: str | None, impl: str | None) -> Tensor:
    """The weights of checked arguments; on a CPU one pass, which makes deltas without curvature."""
    chosen = select("camex_merge", impl, layer.base)
    named = chosen if chosen == "reference" else impl
    if chosen == "cpu" and layer.curvature is None:
        return op.merge(named, layer.base, layer.experts, gates, True, mask == "ties")
    deltas = deltas_of(layer, mask, named)
    if chosen == "cpu":
        return op.merge(named, layer.base, deltas, gates, False, False)
    return reference.merge(layer.base, deltas, gates)


def _merged_bias(layer: Layer, base_bias: Tensor, gates: Tensor, mask: str | None) -> Tensor:
    """[S, O] in the gates' dtype. Biases are small: PyTorch's operators do them."""
    base_bias = base_bias.to(gates.dtype)[:, None]
    if layer.bias is None:
        return base_bias.mT.expand(gates.shape[0], -1)
    bias = layer.bias.to(gates.dtype)[..., None]
    given = None
    if layer.bias_curvature is not None:
        out1, out2 = (factor.to(gates.dtype) for factor in layer.bias_curvature)
        one = out1.new_ones(*out1.shape[:2], 1, 1)
        given = (out1, out2, one, one)
    delta = reference.deltas(base_bias, bias, given, mask == "ties")
    return reference.merge(base_bias, delta, gates).squeeze(2)


def _scaled(gates: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    gates = gates.to(_dtypes.accumulate_dtype(dtype))
    return gates if alpha == 1.0 else gates * alpha


def _check_election(mask: str | None, elect: Any, normalize: Any, density: Any) -> None:
    _check.choice("mask", mask, MASKS)
    _check.choice("elect", elect, ELECTIONS)
    if elect == "weighted" and mask is None:
        raise ValueError("mask: expected 'ties' with elect='weighted', got None")
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
    _check.number("density", density, 0.0, exclusive=True)
    if density > 1:
        raise ValueError(f"density: expected above 0 and at most 1, got {density}")


def _check_experts(
    experts: Any, base: Tensor, name: str = "experts", num_experts: int | None = None
) -> None:
    _check.floating(name, experts, "E, O, D", (num_experts, *base.shape), base)
    if experts.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [E, O, D] with E at least 1, got E=0")


def _check_stack(
    layer: Layer, dtypes: Sequence[torch.dtype], num_experts: int | None, of: str
) -> Tensor:
    """The experts, or the deltas in their place."""
    base, experts, deltas = layer.base, layer.experts, layer.deltas
    if deltas is None:
        if experts is None:
            raise TypeError(f"experts{of}: expected a tensor [E, O, D] where no deltas are given")
        _check_experts(experts, base, f"experts{of}", num_experts)
        return experts
    for name, value in (("experts", experts), ("curvature", layer.curvature)):
        if value is not None:
            raise ValueError(f"{name}{of}: expected None where deltas are given")
    name = f"deltas{of}"
    _check.tensor(name, deltas, "E, O, D", (num_experts, *base.shape), dtypes, base)
    if deltas.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [E, O, D] with E at least 1, got E=0")
    return deltas


def _check_gates(name: str, gates: Tensor, x: Tensor, sizes: Sequence[int | None]) -> None:
    dtypes = tuple(dict.fromkeys((*_dtypes.parameter_dtypes(x), torch.float32)))
    _check.tensor(name, gates, "S, E", sizes, dtypes, x)


def _check_bias(layer: Layer, num_experts: int, of: str) -> None:
    base, bias, base_bias = layer.base, layer.bias, layer.base_bias
    if bias is not None:
        _check.floating(f"bias{of}", bias, "E, O", (num_experts, base.shape[0]), base)
        if base_bias is None:
            raise TypeError(f"base_bias{of}: expected a tensor [O] where a bias is given")
    elif layer.bias_curvature is not None:
        raise TypeError(f"bias{of}: expected a tensor [E, O] where a bias_curvature is given")
    if base_bias is not None:
        _check.floating(f"base_bias{of}", base_bias, "O", (base.shape[0],), base)


def _check_factors(
    name: str,
    curvature: Sequence[Tensor] | None,
    fields: Sequence[str],
    base: Tensor,
    num_experts: int,
) -> None:
    """The factors against the base [O, D]."""
    if curvature is None:
        return
    if not isinstance(curvature, tuple) or len(curvature) != len(fields):
        expected = "a KroneckerCurvature" if len(fields) == 4 else f"a tuple ({', '.join(fields)})"
        raise TypeError(f"{name}: expected {expected}, got {type(curvature).__name__}")
    rank = None
    for field, factor in zip(fields, curvature, strict=True):
        where = f"{name}.{field}"
        _check.trailing(where, factor, "r, E, m, m", 4, dtypes=(base.dtype,))
        rank = factor.shape[0] if rank is None else rank
        size = factor.shape[-1]
        _check.floating(where, factor, "r, E, m, m", (rank, num_experts, size, size), base)
    if not rank:
        raise ValueError(f"{name}: expected a rank of at least 1, got r=0")
    for letter, first, second, size in (
        ("O", 0, 1, base.shape[0]),
        ("D", 2, 3, base.shape[1]),
    ):
        if first < len(fields):
            a, b = curvature[first].shape[3], curvature[second].shape[3]
            if a * b != size:
                raise ValueError(
                    f"{name}: expected {fields[first]} and {fields[second]} of sizes whose product "
                    f"is {letter}={size}, got {a} and {b}"
                )


def _check_dropout(p: float) -> None:
    _check.number("expert_dropout", p, 0.0)
    if p >= 1:
        raise ValueError(f"expert_dropout: expected at least 0 and below 1, got {p}")
