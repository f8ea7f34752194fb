"""Operators of merging and their gradients."""

from __future__ import annotations

from molex_kernels import _operators
from molex_kernels.ops.merging import reference

_TRITON = "molex_kernels.ops.merging.kernels.launch"
_MERGED = (
    "Tensor base, Tensor experts, Tensor? out1, Tensor? out2, Tensor? in1, Tensor? in2, bool ties"
)

deltas = _operators.Pass(
    "camex_deltas",
    f"({_MERGED}) -> Tensor deltas",
    f"(Tensor ddeltas, {_MERGED}, bool[] needs) -> (Tensor dbase, Tensor dexperts, "
    "Tensor dout1, Tensor dout2, Tensor din1, Tensor din2)",
    fake=lambda a: a.experts.new_empty(a.experts.shape),
    triton=_TRITON,
    reference=lambda a: reference.deltas(
        a.base, a.experts, None if a.out1 is None else a[2:6], a.ties
    ),
    op="camex_deltas, camex_linear, camex_merge",
)

linear = _operators.Pass(
    "camex_linear",
    "(Tensor x, Tensor base, Tensor deltas, Tensor gates, Tensor? bias) -> Tensor",
    "(Tensor dy, Tensor x, Tensor base, Tensor deltas, Tensor gates, bool[] needs)"
    " -> (Tensor dx, Tensor dbase, Tensor ddeltas, Tensor dgates, Tensor dbias)",
    fake=lambda a: a.x.new_empty(a.x.shape[0], a.x.shape[1], a.base.shape[0]),
    like={"bias": lambda a: a.gates.new_empty(a.x.shape[0], a.base.shape[0])},
    triton=_TRITON,
    reference=lambda a: reference.linear(*a),
)

# Without curvature the deltas are made on the way: of a base that is subtracted, under the mask
# where `ties`. Else `experts` are the deltas.
_WEIGHTS = "Tensor base, Tensor experts, Tensor gates, bool subtracts, bool ties"

merge = _operators.Pass(
    "camex_merge",
    f"({_WEIGHTS}) -> Tensor weights",
    f"(Tensor dweights, {_WEIGHTS}, bool[] needs)"
    " -> (Tensor dbase, Tensor dexperts, Tensor dgates)",
    fake=lambda a: a.base.new_empty(a.gates.shape[0], *a.base.shape),
    reference=lambda a: reference.merge(
        a.base,
        reference.deltas(a.base, a.experts, None, a.ties) if a.subtracts else a.experts,
        a.gates,
    ),
)
