"""What routing hands to the other ops: who goes where, with which weight, and in which order."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Routing(NamedTuple):
    """A router's decision for T tokens: K of E experts each, best first.

    `expert_weight` and `logits` are fp32 (fp64 for fp64 input) and carry gradients.

    Attributes:
        expert_index: [T, K] int64: distinct experts of each token, best first.
        expert_weight: [T, K]: the score of each chosen expert.
        logits: [T, E]: the router's output before selection.
    """

    expert_index: Tensor
    expert_weight: Tensor
    logits: Tensor


class RoutePlan(NamedTuple):
    """The T*K assignments in the order of their experts; made once, shared by many ops.

    An id outside [0, E) is no local expert: such assignments come last, in their own order, at rows
    `offsets[-1]` and after.

    Attributes:
        counts: [E] int32: assignments to each expert.
        offsets: [E] int32: ends of the experts' rows (inclusive cumulative sum of counts).
        permutation: [T*K] int64: row in expert order -> assignment t * K + k; stable.
        inverse: [T*K] int64: assignment -> row in expert order.
    """

    counts: Tensor
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor
