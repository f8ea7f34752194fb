"""A transformer's layers as a mixture of layer experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from molex_kernels import _backends, _check, _dtypes, _modules
from molex_kernels.ops.layer_mixing import gates, layout
from molex_kernels.ops.layer_mixing import published as checkpoint
from molex_kernels.ops.layer_mixing.api import LoRA, layer_linear, layer_mix, layer_vote
from molex_kernels.ops.layer_mixing.types import MODES

TARGETS = ("q", "k", "v", "out", "up", "down")
_THIRDS = {"q": 0, "k": 1, "v": 2}  # of a fused projection


class LayerExpertOutput(NamedTuple):
    """What a stack of mixed layers returns.

    Attributes:
        hidden: [B, N, D].
        balance_loss: [], unscaled.
        chosen: int64 [L], t where layer t is alone.
    """

    hidden: Tensor
    balance_loss: Tensor
    chosen: Tensor


class Held(NamedTuple):
    """A stack's parameters by name, as they are while the modules that hold them are called."""

    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    lora_a: Mapping[str, Tensor]
    lora_b: Mapping[str, Tensor]


class LayerExpertStack(_modules.Module):
    """The layers of a GPT-2, BERT, RoBERTa or ViT model, each mixed with one chosen for the batch.

    MoLEx (arXiv 2503.11144): z_{t+1} = c_0 u_t(z_t) + c_1 u_j(z_t), u the whole block with its
    residuals, j = layer_vote(gate_t(z_t)) one layer for the batch. Both blocks run together: each
    of their products is one `layer_linear`, their attention one call, and the choice stays on the
    device. With a gate on layer t it may choose itself, and is then computed twice, as published.

    Made by `from_transformers`. It takes the place of the model's layers only: embeddings, a final
    norm (GPT-2, ViT) and heads stay with the model. Weights are parameters stacked over layers,
    frozen unless asked otherwise; the model's own parameters become views of them.

    Options, and what the published code does:

    - Trainable are gates, mixing weights and adapters. A gate gets no gradient from the task, since
      j is discrete and no score multiplies the output: without `balance_loss` it stays as it was
      drawn. `straight_through=True` (ours, off by default) lets it learn: c_1 is multiplied by
      1 + p_j - p_j.detach(), p_j the mean probability of the chosen layer.
    - The balance loss of a mixed layer is n mean_{b,t} softmax(logits)_j, summed over mixed layers:
      the published counter is reset at every call. It pushes the chosen layer down, and its
      gradient reaches z as well. The published one is NaN where layers are left unmixed.
    - `forward_only=True`: the gate of layer t has L - t outputs that stand for layers t .. L - 1;
      the last but one takes the last, the last is not mixed. The published code forgets to add t.
    - `published=True` brings back what reads as a mistake: a cosine gate that normalises over the
      sequence, padding that votes and counts in the balance loss, learned mixing weights of a
      causal stack that are shared and then used raw, `forward_only` without the t.

    A key-value cache is refused: where the published code mixes keys and values of two layers into
    one slot, cached decoding is not the same function as the full forward pass.

    Gradients as those of `layer_linear` and `layer_mix`; deterministic but for dropout; under data
    parallelism each rank decides from its own batch, as published.

    Args:
        facts: what the layers have in common, as `from_transformers` finds it.
        num_layers: L.
        d_model: D.
        options: what `from_transformers` makes of its own options.
    """

    mixing: Tensor

    def __init__(self, facts: layout.Facts, num_layers: int, d_model: int, **options: Any) -> None:
        super().__init__()
        self.facts = facts
        self.num_layers = num_layers
        self.d_model = d_model
        self.weights = _modules.Parameters()
        self.biases = _modules.Parameters()
        self.lora_a = _modules.Parameters()
        self.lora_b = _modules.Parameters()
        self.lora_scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self._configure(**options)

    @classmethod
    def from_transformers(
        cls,
        model: nn.Module,
        *,
        layers_to_use: int | None = None,
        vote: str = "mode",
        individual_gates: bool = False,
        cosine_dim: int | None = None,
        mixing: Sequence[float] = (0.95, 0.05),
        learn_mixing: bool = False,
        individual_mixing: bool = False,
        forward_only: bool = False,
        straight_through: bool = False,
        lora_rank: int = 0,
        lora_alpha: float = 16.0,
        lora_dropout: float = 0.0,
        lora_targets: Sequence[str] = ("q", "v"),
        freeze: bool = True,
        published: bool = False,
        impl: str | None = None,
    ) -> LayerExpertStack:
        """A stack of the model's layers. The model keeps working: it shares the weights.

        Args:
            model: a transformers model (any head), alone or wrapped by PEFT with LoRA, whose
                adapters are taken over.
            layers_to_use: layers t < layers_to_use are mixed; None: all; 0: none, and the stack is
                the model. (The scripts for GPT-2 medium have 12 of 24. Those for RoBERTa write
                i <= n, one more.) Candidates are always all layers.
            vote: "mode", "mean_softmax" or "mean_sigmoid".
            individual_gates: a gate per mixed layer instead of one for all.
            cosine_dim: the projection width of cosine gates (published: 96 to 416); None: linear.
            mixing: (c_0, c_1); published: 0.95, 0.05 or 0.5, 0.5.
            learn_mixing: c = softmax of parameters that start at `mixing`, so that 0.95, 0.05 is
                0.711, 0.289 at first, as published.
            individual_mixing: mixing parameters per layer instead of one pair for all.
            forward_only: layer t chooses among t .. L - 1; it needs individual gates.
            straight_through: the gate learns from the task.
            lora_rank: r of new adapters; 0: none. They start as PEFT's: a uniform, b zero.
            lora_alpha: scaling is lora_alpha / r.
            lora_dropout: on the adapters' input, in training.
            lora_targets: of "q", "k", "v", "out", "up", "down"; published: ("q", "v").
            freeze: whether weights, biases and norms of the model get no gradient.
            published: see the class.
            impl: passed to the functions at each call.

        Returns:
            The stack, in the model's mode (training or not).

        Raises:
            TypeError: a wrong type.
            ValueError: an unknown kind of model, layers that differ, a wrong option, new adapters
                beside PEFT's.
        """
        _backends.check_impl(impl)
        _check.flags(
            individual_gates=individual_gates,
            learn_mixing=learn_mixing,
            individual_mixing=individual_mixing,
            forward_only=forward_only,
            straight_through=straight_through,
            freeze=freeze,
            published=published,
        )
        kind, layers = layout.layers_of(model)
        facts = layout.facts_of(kind, layers)
        num_layers = len(layers)
        limit = num_layers if layers_to_use is None else layers_to_use
        _check.integer("layers_to_use", limit, 0, num_layers, " layers")
        _check.choice("vote", vote, MODES)
        if not isinstance(mixing, Sequence) or len(mixing) != 2:
            raise ValueError(f"mixing: expected two coefficients, got {mixing!r}")
        for value in mixing:
            _check.number("mixing", value, -float("inf"))
        if cosine_dim is not None:
            _check.integer("cosine_dim", cosine_dim, 1)
        if forward_only and not individual_gates:
            raise ValueError("individual_gates: expected True where forward_only is, got False")
        _check.integer("lora_rank", lora_rank, 0)
        _check.number("lora_alpha", lora_alpha, 0.0)
        _check.probability("lora_dropout", lora_dropout)
        if isinstance(lora_targets, str) or not isinstance(lora_targets, Collection):
            raise TypeError(f"lora_targets: expected a sequence of names, got {lora_targets!r}")
        for target in lora_targets:
            _check.choice("lora_targets", target, TARGETS)

        norm = layout.part(layers[0], kind.norm1)
        stack = cls(
            facts,
            num_layers,
            norm.weight.shape[0],
            limit=limit,
            vote=vote,
            individual_gates=individual_gates,
            cosine_dim=cosine_dim,
            mixing=tuple(mixing),
            learn_mixing=learn_mixing,
            individual_mixing=individual_mixing,
            forward_only=forward_only,
            straight_through=straight_through,
            published=published,
            impl=impl,
            where={"device": norm.weight.device, "dtype": norm.weight.dtype},
        )
        stack._take_weights(layers, freeze)
        stack._take_adapters(layers)
        if lora_rank:
            if stack.lora_a:
                raise ValueError("lora_rank: expected 0 where the model has adapters")
            stack._new_adapters(lora_rank, lora_alpha / lora_rank, lora_dropout, lora_targets)
        return stack.train(model.training)

    @_modules.fx_leaf
    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: Any = None,
    ) -> LayerExpertOutput:
        """Runs all layers.

        Args:
            hidden: [B, N, D], what the model's embeddings give.
            attention_mask: bool [B, N], True for tokens that count, or a mask that scaled
                dot-product attention takes, [B or 1, H or 1, N, N], bool or added to the scores.
                Padding is left out of the vote only where the mask is [B, N].
            cache: refused.

        Returns:
            `LayerExpertOutput`; `hidden` is what the model's last layer would give.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape or device.
            NotImplementedError: a cache is given.
        """
        if cache is not None:
            raise NotImplementedError(
                "cache: expected None: decoding with a cache is another function than the full "
                "pass, since a slot would hold keys and values of two layers"
            )
        sizes = (None, None, self.d_model)
        _check.tensor("hidden", hidden, "B, N, D", sizes, _dtypes.FLOAT_DTYPES)
        for gate in self.gates:
            if _modules.is_plain(gate, type(gate)):
                _modules.check_dtype(hidden, next(gate.parameters()), "hidden")
        counted, mask = self._masks(hidden, attention_mask)
        return self._lent(lambda held: self._layers(held, hidden, counted, mask))

    def _lent(self, use: Callable[[Held], Any]) -> Any:
        """What `use` makes of the parameters, inside the calls of the modules that hold them."""
        holders = (self.weights, self.biases, self.lora_a, self.lora_b)
        return _modules.lend(holders, lambda *lent: use(Held(*(dict(p.items()) for p in lent))))

    def _layers(
        self, held: Held, hidden: Tensor, counted: Tensor | None, mask: Tensor | None
    ) -> LayerExpertOutput:
        ids = torch.arange(self.num_layers, device=hidden.device)
        balance = hidden.new_zeros((), dtype=_dtypes.accumulate_dtype(hidden.dtype))
        picks: list[Tensor] = []
        normed = None
        for t in range(self.num_layers):
            pick, chance, loss = self._choose(t, hidden, counted, ids)
            if loss is not None:
                balance = balance + loss
            own = ids[t : t + 1]
            index = own if pick is None else torch.cat((own, pick.view(1)))
            picks.append(own if pick is None else pick.view(1))
            coeff = self._coefficients(t, chance) if pick is not None else None
            hidden, normed = self._blocks(held, hidden, normed, index, coeff, mask)
        return LayerExpertOutput(hidden, balance, torch.cat(picks))

    def load_published(self, state_dict: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Copies a whole stack from the names of MoLEx' GPT-2: weights, adapters, gates, mixing.

        The names stand behind that of the model without its head (`transformer.`): `h.N.ln_1.*`,
        `h.N.attn.c_attn.*` with loralib's `lora_A` [2 r, D] and `lora_B` [2 D, r] (q's half, then
        v's), and so on; `gate.*` or `h.N.gate.*`; `weight_main` and `weight_other`, there or in
        `h.N.`. Weights that are views of a model's change there, too.

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of the stack start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a stack of other layers than GPT-2's, a missing name, another shape, a name
                under two prefixes (the message says which), no name with this prefix, or adapters
                and mixing weights that this stack has no place for.
        """
        self._lent(lambda held: checkpoint.load(self, held, state_dict, prefix))

    def extra_repr(self) -> str:
        return (
            f"{self.facts.layout.name}, num_layers={self.num_layers}, mixed={self.limit}, "
            f"vote={self.vote!r}, lora={sorted(self.lora_scaling)}, published={self.published}"
        )

    def _configure(
        self,
        *,
        limit: int,
        vote: str,
        individual_gates: bool,
        cosine_dim: int | None,
        mixing: tuple[float, float],
        learn_mixing: bool,
        individual_mixing: bool,
        forward_only: bool,
        straight_through: bool,
        published: bool,
        impl: str | None,
        where: Mapping[str, Any],
    ) -> None:
        self.limit = limit
        self.vote = vote
        self.individual_gates = individual_gates
        self.forward_only = forward_only
        self.straight_through = straight_through
        self.published = published
        self.impl = impl
        single = _dtypes.accumulate_dtype(where["dtype"])
        rows = self.num_layers if individual_mixing else 1
        start = torch.tensor([mixing] * rows, dtype=single, device=where["device"])
        self.softmax_mixing = learn_mixing and not (
            published and not individual_mixing and self.facts.layout.causal
        )
        if learn_mixing:
            self.mixing = nn.Parameter(start)
        else:
            self.register_buffer("mixing", start)
        self.gates = nn.ModuleList()
        gated = limit
        if forward_only:
            gated = min(limit, max(self.num_layers - 2, 0))
        for t in range(gated if individual_gates else min(gated, 1)):
            outputs = self.num_layers - t if forward_only else self.num_layers
            self.gates.append(
                gates.gate(self.d_model, outputs, cosine_dim, over_tokens=published, **where)
            )
        self.gated = gated

    def _take_weights(self, layers: Sequence[nn.Module], freeze: bool) -> None:
        kind = self.facts.layout
        for name, path in kind.linears.items():
            parts = [layout.linear_parts(layout.part(layer, path)) for layer in layers]
            self.weights[name] = nn.Parameter(layout.stacked([w for w, _ in parts], path))
            if parts[0][1] is not None:
                stack = layout.stacked([b for _, b in parts if b is not None], f"{path}.bias")
                self.biases[name] = nn.Parameter(stack)
        for name, path in (("norm1", kind.norm1), ("norm2", kind.norm2)):
            norms = [layout.part(layer, path) for layer in layers]
            self.weights[name] = nn.Parameter(layout.stacked([n.weight for n in norms], path))
            self.biases[name] = nn.Parameter(layout.stacked([n.bias for n in norms], path))
        for parameter in (*self.weights.values(), *self.biases.values()):
            parameter.requires_grad_(not freeze)

    def _take_adapters(self, layers: Sequence[nn.Module]) -> None:
        for name, path in self.facts.layout.linears.items():
            parts = [layout.adapter_parts(layout.part(layer, path)) for layer in layers]
            found = [p for p in parts if p is not None]
            if not found:
                continue
            if len(found) < len(parts) or any(p[2:] != found[0][2:] for p in found):
                raise ValueError(f"model: expected adapters alike on {path} of every layer")
            self.lora_a[name] = nn.Parameter(layout.stacked([p[0] for p in found], path))
            self.lora_b[name] = nn.Parameter(layout.stacked([p[1] for p in found], path))
            self.lora_scaling[name], self.lora_dropout[name] = found[0][2:]

    def _new_adapters(
        self, rank: int, scaling: float, dropout: float, targets: Sequence[str]
    ) -> None:
        held = self._lent(lambda held: held)
        for name in dict.fromkeys(targets):
            weight = self._slice(self._weight_of(held, name)[0], name)
            a = weight.new_empty(self.num_layers, rank, weight.shape[2])
            for one in a:
                nn.init.kaiming_uniform_(one, a=5**0.5)
            self.lora_a[name] = nn.Parameter(a)
            self.lora_b[name] = nn.Parameter(
                weight.new_zeros(self.num_layers, weight.shape[1], rank)
            )
            self.lora_scaling[name], self.lora_dropout[name] = scaling, dropout

    def _weight_of(self, held: Held, name: str) -> tuple[Tensor, Tensor | None]:
        """[L, N, D] and bias [L, N]: a whole fused projection for each of its parts."""
        key = name if name in self.facts.layout.linears else "qkv"
        weight = held.weights[key]
        weight = weight.mT if self.facts.layout.transposed else weight
        return weight, held.biases.get(key)

    def _slice(self, stack: Tensor, name: str) -> Tensor:
        """The rows of a fused projection's stack that belong to this part."""
        if name in self.facts.layout.linears or name not in _THIRDS:
            return stack
        third = stack.shape[1] // 3
        return stack[:, _THIRDS[name] * third : (_THIRDS[name] + 1) * third]

    def _linear(
        self, held: Held, name: str, x: Tensor, index: Tensor, shared: bool = False
    ) -> Tensor:
        weight, bias = self._weight_of(held, name)
        weight = self._slice(weight, name)
        bias = None if bias is None else self._slice(bias, name)
        key = "qkv" if name in _THIRDS and name not in held.lora_a else name
        if key not in held.lora_a:
            return layer_linear(x, weight, index, biases=bias, shared=shared, impl=self.impl)
        scaling, p = self.lora_scaling[key], self.lora_dropout[key]
        a, b = held.lora_a[key], held.lora_b[key]
        b = self._slice(b, name) if key == "qkv" else b
        if not (self.training and p):
            lora = LoRA(a, b, scaling)
            return layer_linear(
                x, weight, index, biases=bias, lora=lora, shared=shared, impl=self.impl
            )
        y = layer_linear(x, weight, index, biases=bias, shared=shared, impl=self.impl)
        # Each branch draws its own dropout, as two blocks in sequence would.
        apart = x.expand(index.shape[0], *x.shape) if shared else x
        down = layer_linear(F.dropout(apart, p), a.to(x.dtype), index, impl=self.impl)
        return y + scaling * layer_linear(down, b.to(down.dtype), index, impl=self.impl)

    def _norm(
        self, held: Held, name: str, x: Tensor, index: Tensor, *, is_standard: bool = False
    ) -> Tensor:
        """Each branch's LayerNorm; `is_standard`: x has mean 0 and variance 1 already."""
        if not is_standard:
            x = F.layer_norm(x, (self.d_model,), eps=self.facts.eps)
        weight = held.weights[name].index_select(0, index)[:, None, None]
        return x * weight + held.biases[name].index_select(0, index)[:, None, None]

    def _blocks(
        self,
        held: Held,
        z: Tensor,
        normed: Tensor | None,
        index: Tensor,
        coeff: Tensor | None,
        mask: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """The mixture of the branches' blocks; with pre-norm also its standardised form."""
        facts = self.facts
        pre_norm = facts.layout.pre_norm
        if pre_norm:
            source = z if normed is None else normed
            x = self._norm(held, "norm1", source, index, is_standard=normed is not None)
        else:
            x = z
        attended = self._attention(held, x, index, mask, shared=not pre_norm)
        h = z + self._dropout(self._linear(held, "out", attended, index), facts.hidden_dropout)
        if not pre_norm:
            h = self._norm(held, "norm1", h, index)
        inner = self._norm(held, "norm2", h, index) if pre_norm else h
        inner = facts.activation(self._linear(held, "up", inner, index))
        f = self._dropout(self._linear(held, "down", inner, index), facts.hidden_dropout)
        mixture: dict[str, Any] = {"impl": self.impl}
        if coeff is None:
            mixture["coeff"] = f.new_ones(1, dtype=_dtypes.accumulate_dtype(f.dtype))
        else:
            mixture["logits" if self.softmax_mixing else "coeff"] = coeff
        if pre_norm:
            return layer_mix(f, residual=h, norm=(None, None, facts.eps), **mixture)
        return layer_mix(self._norm(held, "norm2", h + f, index), **mixture), None

    def _attention(
        self, held: Held, x: Tensor, index: Tensor, mask: Tensor | None, shared: bool
    ) -> Tensor:
        """All branches' attention in one call; [G, B, N, D]."""
        heads = self.facts.heads
        branches, (batch, length) = index.shape[0], x.shape[-3:-1]
        q, k, v = (
            self._linear(held, name, x, index, shared)
            .view(branches * batch, length, heads, -1)
            .transpose(1, 2)
            for name in ("q", "k", "v")
        )
        causal = self.facts.layout.causal
        if mask is not None and mask.shape[0] == batch:
            mask = mask.expand(branches, *mask.shape).flatten(0, 1)
        out = F.scaled_dot_product_attention(
            *(q, k, v, mask),
            dropout_p=self.facts.attention_dropout if self.training else 0.0,
            is_causal=causal and mask is None,
            scale=self.facts.scaling,
        )
        return out.transpose(1, 2).reshape(branches, batch, length, -1)

    def _choose(
        self, t: int, z: Tensor, counted: Tensor | None, ids: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The layer beside t, the mean probability of it, and the balance loss; None without."""
        if t >= self.limit or (self.forward_only and t == self.num_layers - 1):
            return None, None, None
        if t >= self.gated:
            return ids[t + 1], None, None
        logits = self.gates[t if len(self.gates) > 1 else 0](z)
        pick = layer_vote(logits, mode=self.vote, mask=counted, impl=self.impl)
        chances = torch.softmax(logits, -1, dtype=_dtypes.accumulate_dtype(logits.dtype))
        if counted is None:
            mean = chances.mean((0, 1))
        else:
            count = counted.sum().clamp(min=1)
            mean = torch.where(counted[..., None], chances, 0).sum((0, 1)) / count
        chance = mean.index_select(0, pick.view(1)).squeeze(0)
        loss = logits.shape[-1] * chance
        if self.forward_only and not self.published:
            pick = pick + t
        return pick, chance, loss

    def _coefficients(self, t: int, chance: Tensor | None) -> Tensor:
        """[2]: logits where learned through a softmax, else the coefficients."""
        coeff = self.mixing[t if self.mixing.shape[0] > 1 else 0]
        if chance is None or not self.straight_through:
            return coeff
        gain = 1 + chance - chance.detach()
        if self.softmax_mixing:
            # A softmax of shifted logits would change both: their logarithm is what moves c_1.
            return coeff + torch.stack((torch.zeros_like(gain), gain.log()))
        return coeff * torch.stack((torch.ones_like(gain), gain))

    def _masks(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens vote, and the mask for the attention."""
        if mask is None:
            return None, None
        if not isinstance(mask, Tensor):
            _check.tensor("attention_mask", mask, "B, N", (None, None), (torch.bool,))
        batch, length = hidden.shape[:2]
        if mask.dim() == 2:
            _check.tensor("attention_mask", mask, "B, N", (batch, length), (torch.bool,), hidden)
            full = mask[:, None, None]
            if self.facts.layout.causal:
                ones = torch.ones(length, length, dtype=torch.bool, device=mask.device)
                full = full & ones.tril()
            return None if self.published else mask, full
        dtypes = (torch.bool, hidden.dtype)
        sizes = (None, None, None, length)
        _check.tensor("attention_mask", mask, "B, H, N, N", sizes, dtypes, hidden)
        return None, mask

    def _dropout(self, x: Tensor, p: float) -> Tensor:
        return F.dropout(x, p, training=self.training) if p else x
