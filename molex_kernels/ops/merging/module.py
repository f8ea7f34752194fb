"""Merged linear layers and their MLP as modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molex_kernels import _backends, _check, _modules
from molex_kernels.ops.merging import published, task_gate
from molex_kernels.ops.merging.api import MASKS, camex_deltas, camex_linear
from molex_kernels.ops.merging.experts import ACTIVATIONS, activate
from molex_kernels.ops.merging.gates import (
    FIRST,
    cv_squared_loss,
    mean_of_tokens,
    noisy_topk_gates,
    propagate_base,
    segment_gates,
)
from molex_kernels.ops.merging.types import SCALES, KroneckerCurvature, nearest_factors

INIT_STD = 0.02


class CAMExLinear(_modules.Module):
    """A linear layer merged anew for every sequence, or every causal segment of one.

    CAMEx (arXiv 2502.18821): a noisy top-k gate on the mean of the tokens, then `camex_linear`.

    With `task_dim` the gate is the task's (`moe_level="task"` of the published code): of the mean
    over the N tokens of a description, embedded in Dt dimensions,

        gates = noisy_topk_gates(V mean_n task_n + v, w_gate, w_noise)

    in fp32. No token of x is in it, so that it is causal without segments. The published layer
    lets no gradient but the loss's through to such a gate; here it gets both.

    Parameters: `w_gate`, `w_noise` [D, E], or [Dg, E] with `task_weight` [Dg, Dt] (V) and
    `task_bias` [Dg] (v); `base` [O, D], `experts` [E, O, D]; with bias
    `base_bias` [O], `bias` [E, O]; with a curvature `out1`, `out2`, `in1`, `in2` and, with bias,
    `bias_out1`, `bias_out2`, as in `KroneckerCurvature`.

    Weights start as N(0, 0.02), biases as 0, w_noise as 0 (GPT-2 as published: unset), the
    curvature as the identity, V and v as `nn.Linear` has them.

    Args:
        in_features: D.
        out_features: O.
        num_experts: E.
        rank: of the curvature; 0 is none (the Euclidean baseline).
        mask: "ties" or None; the sign is elected as published, by the experts without their gates
            (`camex_merge` has other elections).
        expert_dropout: p in training, as in `camex_linear`; the published T5 layer has 0.1 where
            there is no mask.
        top_k: experts with a gate above 0; None is all of them, as in the published scripts and,
            on GPT-2, wherever there is a mask. With less than half of them the published code
            merges the chosen experts without base and curvature; this one does not.
        segment: None merges once per sequence, by its mean (as published later tokens included, and
            padding, unless forward is given a mask); a number merges every segment of that many
            tokens with the gate of the one before (published: 256 on GPT-2).
        first: the gate of a sequence's first segment, as in `segment_gates`.
        bias: whether there are biases. The published layers with a bias cannot run; this is what
            their code means.
        alpha: the step size.
        scale: of the curvature at the start, "published" (Delta = r tau) or
            "unit" (Delta = tau).
        loss_coef: of the balancing loss; published 1e-2 (T5), 1e-5 (GPT-2).
        own_base: False leaves out `base`, which forward then needs: the dynamic merging.
        task_dim: Dt, width of the embedded description that the gate sees in place of x; None is a
            gate on x. Not with `segment`.
        task_reduced: Dg, to which a description is projected; None is Dt // 16, as in the published
            GPT-2.
        impl: passed to the ops at each call.
        device: of the parameters.
        dtype: of the parameters.
    """

    base: nn.Parameter | None
    bias: nn.Parameter | None
    base_bias: nn.Parameter | None
    bias_out1: nn.Parameter | None
    bias_out2: nn.Parameter | None
    task_weight: nn.Parameter | None
    task_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        num_experts: int,
        *,
        rank: int = 1,
        mask: str | None = "ties",
        expert_dropout: float = 0.0,
        top_k: int | None = None,
        segment: int | None = None,
        first: str = "own",
        bias: bool = False,
        alpha: float = 1.0,
        scale: str = "published",
        loss_coef: float = 1e-2,
        own_base: bool = True,
        task_dim: int | None = None,
        task_reduced: int | None = None,
        impl: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check.integer("in_features", in_features, 1)
        _check.integer("out_features", out_features, 1)
        _check.integer("num_experts", num_experts, 1)
        _check.integer("rank", rank, 0)
        _check.choice("mask", mask, MASKS)
        _check.choice("scale", scale, SCALES)
        _check.choice("first", first, FIRST)
        if top_k is not None:
            _check.integer("top_k", top_k, 1, num_experts, of=" experts")
        if segment is not None:
            _check.integer("segment", segment, 1)
        _check.flags(bias=bias, own_base=own_base)
        _check.probability("expert_dropout", expert_dropout)
        _check.number("alpha", alpha, -float("inf"))
        _check.number("loss_coef", loss_coef, -float("inf"))
        gate_width = task_gate.width(in_features, segment, task_dim, task_reduced)
        _backends.check_impl(impl)
        self.top_k = num_experts if top_k is None else top_k
        self.mask, self.expert_dropout = mask, expert_dropout
        self.segment, self.first = segment, first
        self.alpha, self.scale, self.loss_coef, self.impl = alpha, scale, loss_coef, impl

        def parameter(*sizes: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(sizes, device=device, dtype=dtype))

        self.w_gate = parameter(gate_width, num_experts)
        self.w_noise = parameter(gate_width, num_experts)
        task = (
            None if task_dim is None else (parameter(gate_width, task_dim), parameter(gate_width))
        )
        self.register_parameter("task_weight", task and task[0])
        self.register_parameter("task_bias", task and task[1])
        self.experts = parameter(num_experts, out_features, in_features)
        self.register_parameter("base", parameter(out_features, in_features) if own_base else None)
        self.register_parameter("bias", parameter(num_experts, out_features) if bias else None)
        self.register_parameter("base_bias", parameter(out_features) if bias else None)
        out_sizes, in_sizes = nearest_factors(out_features), nearest_factors(in_features)
        factors = dict(zip(KroneckerCurvature._fields, (*out_sizes, *in_sizes), strict=True))
        factors |= dict(zip(("bias_out1", "bias_out2"), out_sizes, strict=True))
        for name, size in factors.items():
            is_there = rank > 0 and (bias or not name.startswith("bias"))
            factor = parameter(rank, num_experts, size, size) if is_there else None
            self.register_parameter(name, factor)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        for name, value in self.named_parameters():
            if name in ("w_gate", "experts", "base"):
                nn.init.normal_(value, std=INIT_STD)
            elif name in ("w_noise", "bias", "base_bias"):
                nn.init.zeros_(value)
            elif self.task_weight is not None and name.startswith("task"):
                bound = self.task_weight.shape[1] ** -0.5
                nn.init.uniform_(value, -bound, bound)
            else:
                value.copy_(torch.eye(value.shape[-1], dtype=value.dtype, device=value.device))
                if self.scale == "unit" and name.endswith("out1"):
                    value.div_(value.shape[0])

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls, linear: Any, num_experts: int, *, transposed: bool = False, **options: Any
    ) -> CAMExLinear:
        """As published: every expert a copy of the pretrained layer, and the base of expert 0.

        Args:
            linear: has a `weight` [O, D] (`transposed`: [D, O], as GPT-2's Conv1D) and maybe a
                `bias`.
            num_experts: E.
            transposed: whether the weight is [D, O].
            options: those of the class; the biases, device and dtype are the layer's.

        Returns:
            The merged layer.

        Raises:
            TypeError: a linear without a weight, or as the class.
            ValueError: as the class.
        """
        weight: Any = getattr(linear, "weight", None)
        bias: Any = getattr(linear, "bias", None)
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise TypeError(
                f"linear: expected a layer with a weight [O, D], got {type(linear).__name__}"
            )
        _check.flags(transposed=transposed)
        weight = weight.mT if transposed else weight
        out_features, in_features = weight.shape
        module = cls(
            in_features,
            out_features,
            num_experts,
            bias=bias is not None,
            **{"device": weight.device, "dtype": weight.dtype, **options},
        )
        module.experts.copy_(weight)
        if module.base is not None:
            module.base.copy_(module.experts[0])
        if module.bias is not None and module.base_bias is not None:
            module.bias.copy_(bias)
            module.base_bias.copy_(module.bias[0])
        return module

    def curvature(self) -> KroneckerCurvature | None:
        """The curvature, as `camex_deltas` takes it.

        Returns:
            The parameters in a tuple, or None without a curvature.
        """
        factors = [getattr(self, name) for name in KroneckerCurvature._fields]
        return None if factors[0] is None else KroneckerCurvature(*factors)

    def deltas(self, base: Tensor | None = None) -> Tensor:
        """`camex_deltas` of the parameters: to be made once and passed to forward while they stay.

        Args:
            base: [O, D], stands in for the module's own.

        Returns:
            [E, O, D].

        Raises:
            ValueError: there is no base.
        """
        return camex_deltas(
            self._base(base),
            self.experts,
            curvature=self.curvature(),
            mask=self.mask,
            impl=self.impl,
        )

    def next_base(
        self, gamma: float, *, base: Tensor | None = None, deltas: Tensor | None = None
    ) -> Tensor:
        """The base for the next layer of the dynamic merging: `propagate_base`.

        Args:
            gamma: the step size.
            base: [O, D], stands in for the module's own.
            deltas: what `deltas(base)` returned; None makes them.

        Returns:
            [O, D].

        Raises:
            ValueError: there is no base.
        """
        deltas = self.deltas(base) if deltas is None else deltas
        return propagate_base(self._base(base), deltas, gamma)

    def gates(
        self,
        x: Tensor,
        token_mask: Tensor | None = None,
        *,
        task: Tensor | None = None,
        task_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The gates of the segments of x; S = 1 for whole sequences.

        Args:
            x: [B, L, D].
            token_mask: [B, L] bool, as in forward.
            task: as in forward.
            task_mask: as in forward.

        Returns:
            (gates [B, S, E], load [E]); with a task that all sequences share, gates [1, 1, E].

        Raises:
            ValueError: `segment` does not divide L, or the module wants a task or has no place for
                one.
        """
        num_segments = self._num_segments(x)
        _modules.check_dtype(x, self.w_gate)
        task_gate.check(x, self.task_weight, task, task_mask, token_mask)
        weights: tuple[Tensor, Tensor] = (self.w_gate, self.w_noise)
        if task is None or self.task_weight is None or self.task_bias is None:
            length = x.shape[1] // num_segments
            counted = None
            if token_mask is not None:
                _check.tensor("token_mask", token_mask, "B, L", x.shape[:2], (torch.bool,), x)
                counted = token_mask.reshape(-1, length)
            rows = mean_of_tokens(x.reshape(-1, length, x.shape[2]), counted)
        else:
            counted = task_mask
            rows = task_gate.projected_mean(task, self.task_weight, self.task_bias, task_mask)
            weights = (self.w_gate.to(rows.dtype), self.w_noise.to(rows.dtype))
        gates, load = noisy_topk_gates(
            rows,
            *weights,
            top_k=self.top_k,
            training=self.training,
            mask=None if counted is None else counted.any(1),
        )
        return gates.unflatten(0, (-1, num_segments)), load

    @_modules.fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        base: Tensor | None = None,
        deltas: Tensor | None = None,
        token_mask: Tensor | None = None,
        task: Tensor | None = None,
        task_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Applies the layer to every sequence, or segment, with a weight of its own.

        Args:
            x: [B, L, D].
            base: [O, D], stands in for the module's own.
            deltas: what `deltas(base)` returned; None makes them.
            token_mask: [B, L] bool, True for tokens that count in the gates' means; None counts
                all, as published. A sequence or segment without such a token has gates of 0: the
                base alone, and no part in the loss. The layer is applied to masked tokens as well.
            task: [B, N, Dt], the embedded description of each sequence's task, or [1, N, Dt], of
                one that all share: the weight is then merged once. Needed with `task_dim` alone.
            task_mask: [B, N] ([1, N]) bool, True for tokens of the description that count; None
                counts all, padding too, as published.

        Returns:
            (y [B, L, O], the balancing loss), which is `loss_coef` (CV^2 of the gates' sum + CV^2
            of the load).

        Raises:
            ValueError: `segment` does not divide L, there is no base, or the module wants a task or
                has no place for one.
        """
        if isinstance(x, _modules.Loan):
            return x.use(self)
        gates, load = self.gates(x, token_mask, task=task, task_mask=task_mask)
        loss = self.loss_coef * cv_squared_loss(gates, load)
        if self.segment is not None:
            gates = segment_gates(gates, first=self.first)
        bias_curvature = None
        if self.bias_out1 is not None and self.bias_out2 is not None:
            bias_curvature = (self.bias_out1, self.bias_out2)
        length = x.shape[1] // gates.shape[1]
        if task is not None and task.shape[0] == 1:
            length = length * x.shape[0]  # all sequences are merged for at once
        gates = gates.flatten(0, 1)
        y = camex_linear(
            x.reshape(gates.shape[0], length, x.shape[2]),
            self._base(base),
            self.experts if deltas is None else None,
            gates,
            curvature=self.curvature() if deltas is None else None,
            mask=self.mask,
            deltas=deltas,
            alpha=self.alpha,
            bias=self.bias,
            base_bias=self.base_bias,
            bias_curvature=bias_curvature,
            expert_dropout=self.expert_dropout if self.training else 0.0,
            impl=self.impl,
        )
        return y.view(*x.shape[:2], y.shape[2]), loss

    def load_published(self, state_dict: Mapping[str, Tensor], prefix: str = "") -> None:
        """Copies the parameters from the published names that start with `prefix`.

        They are `w_gate`, `w_noise` [D, E], `weight` [E, O, D], `res_weight` [O, D], `bias` [E, O],
        `res_bias` [1, O] or [O], and `curve1_out`, `curve2_out`, `curve1_in`, `curve2_in` (with
        bias `curve1_bias`, `curve2_bias`) [r, E, m, m]; of a task's gate `task_proj.weight`
        [Dg, Dt] and `task_proj.bias` [Dg]; `mean` and `std`, which are 0 and 1. The published
        forward is that with scale="published", which only matters for parameters that start anew.

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of this layer start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a missing name, a name under two prefixes (the message says which), another
                shape, no name with this prefix, or weights that this module has no place for.
        """
        published.load(self, state_dict, {"": ""}, prefix)

    def extra_repr(self) -> str:
        num_experts, out_features, in_features = self.experts.shape
        curvature = self.curvature()
        rank = 0 if curvature is None else curvature.out1.shape[0]
        return (
            f"in_features={in_features}, out_features={out_features}, num_experts={num_experts}, "
            f"rank={rank}, mask={self.mask!r}, top_k={self.top_k}, segment={self.segment}, "
            f"bias={self.bias is not None}"
        )

    def _base(self, base: Tensor | None) -> Tensor:
        base = self.base if base is None else base
        if base is None:
            raise ValueError("base: expected a tensor [O, D]: the module has no base of its own")
        return base

    def _num_segments(self, x: Tensor) -> int:
        _check.floating("x", x, "B, L, D", (None, None, self.experts.shape[2]))
        length = x.shape[1]
        if length < 1:
            raise ValueError("x: expected shape [B, L, D] with L at least 1, got L=0")
        if self.segment is None:
            return 1
        if length % self.segment:
            below = length // self.segment * self.segment
            nearest = f"{below} or {below + self.segment}" if below else f"{self.segment}"
            raise ValueError(
                f"x: expected a length L that segments of {self.segment} divide, got {length}; "
                f"the nearest are {nearest}"
            )
        return length // self.segment


class CAMExMLP(_modules.Module):
    """Two merged linear layers with an activation between: D -> I -> D.

    With own_base=False the layers of a model share one pair of bases, moved from layer to layer by
    `next_bases` (the paper's dynamic merging): forward then takes the pair.

    Args:
        d_model: D.
        d_hidden: I.
        num_experts: E.
        activation: relu, gelu, gelu_tanh or silu.
        options: as in `CAMExLinear`, for both layers.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int,
        num_experts: int,
        *,
        activation: str = "relu",
        **options: Any,
    ) -> None:
        super().__init__()
        _check.integer("d_model", d_model, 1)
        _check.integer("d_hidden", d_hidden, 1)
        _check.choice("activation", activation, ACTIVATIONS)
        self.activation = activation
        self.up = CAMExLinear(d_model, d_hidden, num_experts, **options)
        self.down = CAMExLinear(d_hidden, d_model, num_experts, **options)

    def deltas(self, bases: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The deltas of both layers, for forward.

        Args:
            bases: stand in for the layers' own.

        Returns:
            ([E, I, D], [E, D, I]).

        Raises:
            ValueError: there is no base.
        """
        up, down = _modules.pair_of_tensors("bases", bases)
        return _modules.lend(
            (self.up, self.down), lambda one, two: (one.deltas(up), two.deltas(down))
        )

    def next_bases(
        self,
        gamma: float,
        *,
        bases: tuple[Tensor, Tensor] | None = None,
        deltas: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The pair of bases for the next layer.

        Args:
            gamma: the step size.
            bases: stand in for the layers' own.
            deltas: what `deltas(bases)` returned; None makes them.

        Returns:
            ([I, D], [D, I]).

        Raises:
            ValueError: there is no base.
        """
        base_up, base_down = _modules.pair_of_tensors("bases", bases)
        up, down = _modules.pair_of_tensors("deltas", deltas)
        return _modules.lend(
            (self.up, self.down),
            lambda one, two: (
                one.next_base(gamma, base=base_up, deltas=up),
                two.next_base(gamma, base=base_down, deltas=down),
            ),
        )

    @_modules.fx_leaf
    def forward(
        self,
        x: Tensor,
        *,
        bases: tuple[Tensor, Tensor] | None = None,
        deltas: tuple[Tensor, Tensor] | None = None,
        token_mask: Tensor | None = None,
        task: Tensor | None = None,
        task_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Applies both layers.

        Args:
            x: [B, L, D].
            bases: stand in for the layers' own.
            deltas: what `deltas(bases)` returned; None makes them.
            token_mask: [B, L] bool, as in `CAMExLinear.forward`, for both layers.
            task: as in `CAMExLinear.forward`, for both layers.
            task_mask: as in `CAMExLinear.forward`, for both layers.

        Returns:
            (y [B, L, D], the sum of both balancing losses).

        Raises:
            ValueError: as `CAMExLinear.forward` does.
        """
        base_up, base_down = _modules.pair_of_tensors("bases", bases)
        up, down = _modules.pair_of_tensors("deltas", deltas)
        gate = {"token_mask": token_mask, "task": task, "task_mask": task_mask}
        hidden, up_loss = self.up(x, base=base_up, deltas=up, **gate)
        acted = activate(hidden, self.activation)
        y, down_loss = self.down(acted, base=base_down, deltas=down, **gate)
        return y, up_loss + down_loss

    def load_published(
        self,
        state_dict: Mapping[str, Tensor],
        names: tuple[str, str] = ("wi", "wo"),
        *,
        prefix: str = "",
    ) -> None:
        """Copies both layers from T5's names, or those given: ("c_fc", "c_proj") for GPT-2.

        Args:
            state_dict: of one MLP (`wi.weight`, `wi.res_weight`, ...), or of a whole model.
            names: of the two layers, with what stands between them and the prefix.
            prefix: what the names of this MLP start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: as `CAMExLinear.load_published` does.
        """
        is_pair = isinstance(names, Sequence) and not isinstance(names, str) and len(names) == 2
        if not is_pair or not all(isinstance(name, str) for name in names):
            raise TypeError(f"names: expected those of the two layers, got {names!r}")
        published.load(self, state_dict, {"up.": f"{names[0]}.", "down.": f"{names[1]}."}, prefix)

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"
