"""A transformer's layers as a mixture of layer experts."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from molex_kernels import _backends, _check, _dtypes, _modules
from molex_kernels.ops.layer_mixing import gates, parts, positions
from molex_kernels.ops.layer_mixing import published as checkpoint
from molex_kernels.ops.layer_mixing.api import layer_vote
from molex_kernels.ops.layer_mixing.blocks import Blocks, Given, Held
from molex_kernels.ops.layer_mixing.types import MODES

TARGETS = ("q", "k", "v", "out", "up", "down", "gate")


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


class LayerExpertStack(_modules.Module):
    """The layers of a transformers model, each mixed with one that is chosen for the batch.

    MoLEx (arXiv 2503.11144): z_{t+1} = c_0 u_t(z_t) + c_1 u_j(z_t), u the whole block with its
    residuals, j = layer_vote(gate_t(z_t)) one layer for the batch. Both blocks run together: each
    of their products is one `layer_linear`, their attention one call, and the choice stays on the
    device. With a gate on layer t it may choose itself, and is then computed twice, as published.

    Made by `from_transformers` of GPT-2, OPT, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Gemma,
    Granite, StableLM (not its parallel residual), StarCoder2, BERT, RoBERTa, XLM-RoBERTa,
    CamemBERT, ELECTRA, DistilBERT, MPNet, the encoders of T5, mT5 and UMT5, ViT, DeiT, I-JEPA,
    SigLIP and CLIP's vision models, with rotary positions, grouped queries, gated MLPs, RMSNorm,
    norms of heads and scaled residuals where those have them, and a sliding window where all layers
    have the same. It takes the place of the model's layers only: embeddings, a final norm and heads
    stay with the model. Weights are parameters stacked over layers, frozen unless asked otherwise;
    the model's own parameters become views of them.

    A bias on the scores by the distance of two tokens (T5's, arXiv 1910.10683) is
    weights["position_bias"], [1 or L, buckets, heads]. One table that the layers share, as T5's and
    MPNet's, is not mixed; where each layer has its own (UMT5), a block uses its layer's.

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

    def __init__(self, facts: parts.Facts, num_layers: int, d_model: int, **options: Any) -> None:
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
        self.rotary: nn.Module | None = None
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
                adapters are taken over. Every parameter of its layers has to be known.
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
            lora_targets: of "q", "k", "v", "out", "up", "down" and, of a gated MLP, "gate";
                published: ("q", "v").
            freeze: whether weights, biases and norms of the model get no gradient.
            published: see the class.
            impl: passed to the functions at each call.

        Returns:
            The stack, in the model's mode (training or not).

        Raises:
            TypeError: a wrong type.
            ValueError: an unknown kind of model, layers that differ or do more than is known (soft
                caps, cross attention, parameters that the layout does not name, sliding windows in
                some layers only), a wrong option, new adapters beside PEFT's.
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
        found = parts.layers_of(model)
        facts = parts.facts_of(found)
        num_layers = len(found.layers)
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
        if "gate" in lora_targets and "gate" not in found.layout.linears:
            raise ValueError(f"lora_targets: expected no 'gate' in {found.layout.name} layers")
        linears = parts.linears_of(found.layout, list(found.layers))
        if lora_rank and any(parts.adapter_parts(linear) is not None for _, linear in linears):
            raise ValueError("lora_rank: expected 0 where the model has adapters")

        norm = parts.part(found.layers[0], found.layout.norm1)
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
        stack._take(found, freeze)
        if lora_rank:
            stack._new_adapters(lora_rank, lora_alpha / lora_rank, lora_dropout, lora_targets)
        return stack.train(model.training)

    @_modules.fx_leaf
    def forward(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        cache: Any = None,
    ) -> LayerExpertOutput:
        """Runs all layers.

        Args:
            hidden: [B, N, D], what the model's embeddings give.
            attention_mask: bool [B, N], True for tokens that count, or a mask that scaled
                dot-product attention takes, [B or 1, H or 1, N, N], bool or added to the scores.
                Padding is left out of the vote only where the mask is [B, N].
            position_ids: int64 or int32 [B or 1, N], for the rotary positions of a model that has
                them; None is 0 to N - 1. Elsewhere the embeddings have taken them.
            cache: refused.

        Returns:
            `LayerExpertOutput`; `hidden` is what the model's last layer would give.

        Raises:
            TypeError: a wrong dtype.
            ValueError: a wrong shape or device, positions that nothing is rotated by.
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
        given = Given(counted, mask, self._positions(hidden, position_ids))
        return self._lent(
            lambda held: self._layers(held, hidden, self._biased(held, hidden, given)[0])
        )

    def _lent(self, use: Callable[[Held], Any]) -> Any:
        """What `use` makes of the parameters, inside the calls of the modules that hold them."""
        holders = (self.weights, self.biases, self.lora_a, self.lora_b)
        return _modules.lend(holders, lambda *lent: use(Held(*(dict(p.items()) for p in lent))))

    def _layers(self, held: Held, hidden: Tensor, given: Given) -> LayerExpertOutput:
        balance = hidden.new_zeros((), dtype=_dtypes.accumulate_dtype(hidden.dtype))
        chosen: list[Tensor] = []
        normed = None
        for t in range(self.num_layers):
            hidden, normed, pick, loss = self._layer(t, held, hidden, normed, given)
            balance = balance if loss is None else balance + loss
            chosen.append(pick)
        return LayerExpertOutput(hidden, balance, torch.cat(chosen))

    def _biased(
        self, held: Held, hidden: Tensor, given: Given, bias: Tensor | None = None
    ) -> tuple[Given, Tensor | None]:
        """With the bias by positions; and that bias [1, H, N, N] where all layers share it.

        `bias` is that, from a layer before. Where each layer has a table, the blocks look it up.
        """
        if self.facts.buckets is None:
            return given, None
        tables = held.weights["position_bias"]
        if bias is None:
            buckets = positions.relative_buckets(
                hidden.shape[1], *self.facts.buckets, hidden.device
            )
            if len(tables) > 1:
                return given._replace(buckets=buckets), None
            bias = positions.position_bias(tables[0][None], buckets)
        mask = positions.with_bias(given.mask, bias.to(hidden.dtype))
        return given._replace(mask=mask), bias

    def _layer(
        self, t: int, held: Held, hidden: Tensor, normed: Tensor | None, given: Given
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """Layer t mixed: hidden, its standardised form, the choice [1], the balance loss."""
        ids = torch.arange(self.num_layers, device=hidden.device)
        pick, chance, loss = self._choose(t, hidden, given.counted, ids)
        index = ids[t : t + 1]
        if pick is None:
            single = _dtypes.accumulate_dtype(hidden.dtype)
            mixture = {"coeff": hidden.new_ones(1, dtype=single)}
            chosen = index
        else:
            mixture = self._mixture(t, chance)
            chosen = pick.view(1)
            index = torch.cat((index, chosen))
        hidden, normed = self._blocks(held, given).mixed(hidden, normed, index, mixture)
        return hidden, normed, chosen, loss

    def _blocks(self, held: Held, given: Given) -> Blocks:
        adapters = {name: (s, self.lora_dropout[name]) for name, s in self.lora_scaling.items()}
        return Blocks(self.facts, held, adapters, given, self.training, self.impl)

    def load_published(self, state_dict: Mapping[str, Tensor], *, prefix: str = "") -> None:
        """Copies a whole stack from MoLEx' GPT-2 or RoBERTa: weights, adapters, gates, mixing.

        The names stand behind that of the model without its head (`transformer.`, or
        `roberta.encoder.`): `h.N.ln_1.*`, `h.N.attn.c_attn.*` with loralib's `lora_A` [2 r, D] and
        `lora_B` [2 D, r] (q's half, then v's), and so on; in RoBERTa transformers' own behind
        `layer.N.`, with `lora_A` [r, D] and `lora_B` [D, r] of `query` and `value`; `gate.*`,
        `weight_main` and `weight_other` there or in each layer. Weights that are views of a model's
        change there, too.

        Args:
            state_dict: of the checkpoint, or of a whole model.
            prefix: what the names of the stack start with; "" takes them from anywhere.

        Raises:
            TypeError: a value that is no floating tensor.
            ValueError: a stack of other layers than these, a missing name, another shape, a name
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

    def _take(self, found: parts.Found, freeze: bool) -> None:
        """Makes what the layers have the stack's own."""
        layers = list(found.layers)
        self.rotary = found.rotary
        for name, path in found.layout.linears.items():
            linears = [parts.linear_parts(parts.part(layer, path)) for layer in layers]
            self._own(self.weights, name, [w for w, _ in linears], path)
            self._own(self.biases, name, [b for _, b in linears], f"{path}.bias")
            adapters = self._adapters(layers, name, path)
            if adapters is not None:
                self._own(self.lora_a, name, adapters[0], path)
                self._own(self.lora_b, name, adapters[1], path)
        for name, path in self.facts.norms.items():
            norms = [parts.part(layer, path) for layer in layers]
            self._own(self.weights, name, [n.weight for n in norms], path)
            biases = [getattr(n, "bias", None) for n in norms]
            self._own(self.biases, name, biases, f"{path}.bias")
        if found.tables:
            tables = [table.weight for table in found.tables]
            self._own(self.weights, "position_bias", tables, "the positions' bias")
        for parameter in (*self.weights.values(), *self.biases.values()):
            parameter.requires_grad_(not freeze)

    def _own(
        self, where: _modules.Parameters, name: str, parameters: Sequence[Any], path: str
    ) -> None:
        parts.check_alike(parameters, path)
        if parameters[0] is not None:
            where[name] = nn.Parameter(parts.stacked(parameters, path))

    def _adapters(
        self, layers: Sequence[nn.Module], name: str, path: str
    ) -> tuple[list[Tensor], list[Tensor]] | None:
        """PEFT's adapters on one product of every layer; keeps their scaling and dropout."""
        every = [parts.adapter_parts(parts.part(layer, path)) for layer in layers]
        found = [each for each in every if each is not None]
        if not found:
            return None
        if len(found) < len(every) or any(each[2:] != found[0][2:] for each in found):
            raise ValueError(f"model: expected adapters alike on {path} of every layer")
        self.lora_scaling[name], self.lora_dropout[name] = found[0][2:]
        return [each[0] for each in found], [each[1] for each in found]

    def _new_adapters(
        self, rank: int, scaling: float, dropout: float, targets: Sequence[str]
    ) -> None:
        held, facts = self._lent(lambda held: held), self.facts
        rows = {"q": facts.heads, "k": facts.key_heads, "v": facts.key_heads}
        for name in dict.fromkeys(targets):
            weight = held.weights[name if name in facts.layout.linears else "qkv"][0]
            outputs, inputs = weight.mT.shape if facts.layout.transposed else weight.shape
            outputs = rows[name] * facts.head_width if name in rows else outputs
            a = weight.new_empty(self.num_layers, rank, inputs)
            for one in a:
                nn.init.kaiming_uniform_(one, a=5**0.5)
            self.lora_a[name] = nn.Parameter(a)
            self.lora_b[name] = nn.Parameter(weight.new_zeros(self.num_layers, outputs, rank))
            self.lora_scaling[name], self.lora_dropout[name] = scaling, dropout

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

    def _mixture(self, t: int, chance: Tensor | None) -> dict[str, Tensor]:
        """What `layer_mix` takes: "coeff" [2], or "logits" [2] where a softmax is left to it."""
        coeff = self.mixing[t if self.mixing.shape[0] > 1 else 0]
        if chance is None or not self.straight_through:
            return {"logits" if self.softmax_mixing else "coeff": coeff}
        if self.softmax_mixing:
            coeff = torch.softmax(coeff, 0)
        gain = 1 + chance - chance.detach()
        return {"coeff": coeff * torch.stack((torch.ones_like(gain), gain))}

    def _masks(self, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Which tokens vote, and the mask for the attention."""
        batch, length = hidden.shape[:2]
        facts = self.facts
        is_narrow = facts.window is not None and facts.window < length
        if mask is None:
            return None, self._seen(length, hidden.device)[None, None] if is_narrow else None
        if not isinstance(mask, Tensor):
            _check.tensor("attention_mask", mask, "B, N", (None, None), (torch.bool,))
        if mask.dim() == 2:
            _check.tensor("attention_mask", mask, "B, N", (batch, length), (torch.bool,), hidden)
            full = mask[:, None, None]
            if facts.layout.causal or is_narrow:
                full = full & self._seen(length, mask.device)
            return None if self.published else mask, full
        dtypes = (torch.bool, hidden.dtype)
        sizes = (None, None, None, length)
        _check.tensor("attention_mask", mask, "B, H, N, N", sizes, dtypes, hidden)
        return None, mask

    def _seen(self, length: int, device: torch.device) -> Tensor:
        """bool [N, N]: the keys that a token attends to where there is no padding."""
        seen = torch.ones(length, length, dtype=torch.bool, device=device)
        if self.facts.layout.causal:
            seen = seen.tril()
        window = self.facts.window
        return seen if window is None else seen.triu(1 - window)

    def _positions(
        self, hidden: Tensor, position_ids: Tensor | None
    ) -> tuple[Tensor, Tensor] | None:
        """cos and sin of the positions, as the model's own module makes them."""
        length = hidden.shape[1]
        if self.rotary is None:
            if position_ids is not None:
                raise ValueError(
                    f"position_ids: expected None in {self.facts.layout.name} layers, whose "
                    f"positions are in hidden, got {type(position_ids).__name__}"
                )
            return None
        if position_ids is None:
            position_ids = torch.arange(length, device=hidden.device)[None]
        _check.index("position_ids", position_ids, "B, N", (None, length), hidden)
        if position_ids.shape[0] not in (1, hidden.shape[0]):
            raise ValueError(
                f"position_ids: expected shape [B, N] or [1, N] with B={hidden.shape[0]}, "
                f"got {list(position_ids.shape)}"
            )
        cos, sin = self.rotary(hidden, position_ids)
        return cos, sin
