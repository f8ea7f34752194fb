"""Layers as experts (MoLEx) in transformers' models, which keep their layers and weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from molex_kernels import _modules
from molex_kernels.integrations import _handover
from molex_kernels.integrations._handover import Handover, Part, Place, mix_in
from molex_kernels.integrations._layers import check_open
from molex_kernels.ops.layer_mixing import parts
from molex_kernels.ops.layer_mixing.blocks import Given, Held
from molex_kernels.ops.layer_mixing.module import LayerExpertOutput, LayerExpertStack

_KIND = "install_layer_experts"
_NO_CACHE = "a slot would hold keys and values of two layers"
# What a layer may be given beside hidden states, masks and positions, and what it stands for.
_REFUSED = {
    **dict.fromkeys(("cache", "past_key_values", "layer_past"), "a cache"),
    "encoder_hidden_states": "cross attention",
    "cu_seq_lens_q": "sequences packed into one",
}


class _Place(Place):
    """Where a layer finds the experts, its number, and the names of its arguments."""

    def __init__(self, experts: _Experts, number: int, names: Sequence[str]) -> None:
        super().__init__()
        self.experts = experts
        self.number = number
        self.names = names


class _Layer(Part):
    """A layer that runs mixed with the one that is chosen for the batch."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place: Any = self.molex_place
        given = kwargs.pop(_handover._NAME, None)
        named = {**dict(zip(place.names, args, strict=False)), **kwargs}
        return place.experts.run(place.number, given, named)


class _Experts(LayerExpertStack):
    """The stack of a model that keeps its layers: it reads the weights where they are.

    Attributes:
        last: of the last forward pass, `LayerExpertOutput`; None before.
    """

    last: LayerExpertOutput | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.last = None
        self._now: Held | None = None
        self._all: tuple[nn.Module, ...] = ()  # a tuple, so that they are no children
        self._tables: tuple[nn.Module, ...] = ()
        # By module and name, since loading and moving may put other parameters in their place.
        self._frozen: list[tuple[nn.Module, str]] = []
        self._hooks: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None, "_now": None}

    def forward(self, *args: Any, **kwargs: Any) -> LayerExpertOutput:
        """Refused: the layers run in the model."""
        raise NotImplementedError("forward: expected a call of the model that has these experts")

    def run(self, t: int, given: _handover.Given | None, named: dict[str, Any]) -> Any:
        """Layer t of the model's forward pass; what the model's own layer returns."""
        assert given is not None
        if given.has_grad and not torch.is_grad_enabled():
            raise RuntimeError(
                f"gradient_checkpointing: expected use_reentrant=False with {_KIND}, got True: the "
                "gates would get no gradient from the balance loss"
            )
        for name, what in _REFUSED.items():
            if named.get(name) is not None:
                raise NotImplementedError(f"{name}: expected None with {_KIND}, got {what}")
        hidden = named["hidden_states"]
        mask = self._masks(hidden, _as_ours(named.get("attention_mask"), hidden))[1]
        counted = None if self.published else given.mask
        rotary = named["position_embeddings"] if self.facts.layout.rotary else None
        inputs = Given(counted, mask, rotary)

        def mixed(held: Held) -> tuple[Any, ...]:
            biased, bias = self._biased(held, hidden, inputs, named.get("position_bias"))
            return *self._layer(t, held, hidden, None, biased), bias

        out, _, pick, loss, bias = self._lent(mixed)
        given.made[_KIND] = (*given.before.get(_KIND, ()), (pick, loss))
        returned = {"hidden_states": out, "position_bias": bias}
        return tuple(map(returned.get, self.facts.layout.returns)) or out

    def begin(self, decoder: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Before the decoder: parameters and adapters are those that the layers have now."""
        handover: Any = decoder.molex_handover
        names = handover.arguments
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        if named.get("use_cache"):
            raise NotImplementedError(f"use_cache: expected False with {_KIND}: {_NO_CACHE}")
        config: Any = decoder.config
        if named.get("output_attentions") or getattr(config, "output_attentions", False):
            raise NotImplementedError(
                f"output_attentions: expected False with {_KIND}, where the attention of two "
                "layers is computed at once"
            )
        self.last, self._now = None, self._read()
        if "use_cache" in names and len(args) <= names.index("use_cache"):
            kwargs = {**kwargs, "use_cache": False}
        return args, kwargs

    def end(self, decoder: nn.Module, args: Any, output: Any) -> None:
        """After the decoder: what its layers have chosen."""
        handover: Any = decoder.molex_handover
        made = () if handover.last is None else handover.last.made.get(_KIND, ())
        if not made:
            return
        losses = [loss for _, loss in made if loss is not None]
        hidden = output[0]
        balance = torch.stack(losses).sum() if losses else hidden.new_zeros(())
        self.last = LayerExpertOutput(hidden, balance, torch.cat([pick for pick, _ in made]))

    def freeze(self) -> None:
        """From `put_in` to `take_out`, weights of the layers that train do so no more."""
        linears = [linear for _, linear in parts.linears_of(self.facts.layout, self._all)]
        norms = [parts.part(each, path) for each in self._all for path in self.facts.norms.values()]
        self._frozen = [
            (module, name)
            for module in (
                *(getattr(each, "base_layer", each) for each in (*linears, *norms)),
                *self._tables,
            )
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        ]

    def put_in(self, decoder: nn.Module, layers: nn.ModuleList) -> None:
        """The layers run in here while the decoder runs."""
        handover = Handover(decoder, layers)
        handover.no_cache[_KIND] = _NO_CACHE
        decoder.molex_handover = handover  # type: ignore[assignment]
        decoder.molex_experts = self
        self._hooks = [
            decoder.register_forward_pre_hook(self.begin, with_kwargs=True),
            decoder.register_forward_hook(self.end, prepend=True),
        ]
        for number, layer in enumerate(layers):
            names = list(inspect.signature(type(layer).forward).parameters)[1:]
            mix_in(layer, _Layer, _Place(self, number, names))
        for module, name in self._frozen:
            getattr(module, name).requires_grad_(False)

    def take_out(self, decoder: nn.Module) -> None:
        """The model as it was."""
        layers: Any = nn.ModuleList(self._all)
        _handover.take_out(decoder, layers)
        for hook in self._hooks:
            hook.remove()
        # PEFT freezes what it adapts, and could not do so where it was frozen already.
        linears = parts.linears_of(self.facts.layout, self._all)
        if not any(hasattr(linear, "base_layer") for _, linear in linears):
            for module, name in self._frozen:
                getattr(module, name).requires_grad_(True)
        del decoder.molex_experts

    def _take(self, found: parts.Found, freeze: bool) -> None:
        self._all = tuple(found.layers)
        self._tables = found.tables
        for layer in found.layers:
            check_open(type(layer).__name__, layer)
        for path, linear in parts.linears_of(found.layout, self._all):
            base = getattr(linear, "base_layer", linear)
            if not _modules.is_plain(base, type(base)):
                raise ValueError(
                    f"model: expected {path} without hooks, parametrizations and a forward of its "
                    f"own, got {type(base).__name__} with some (offloading sets them)"
                )
        super()._take(found, freeze)
        self.rotary = None  # the model rotates by positions of its own
        self._now = self._read()

    def _own(
        self, where: _modules.Parameters, name: str, parameters: Sequence[Any], path: str
    ) -> None:
        parts.check_alike(parameters, path)

    def _read(self) -> Held:
        """The parameters where they are, with adapters that have come or changed since."""
        held = Held({}, {}, {}, {})
        read: tuple[Any, ...] = held

        def keep(number: int, name: str, tensors: list[Any]) -> None:
            if tensors[0] is not None:
                read[number][name] = tuple(tensors)

        for name, path in self.facts.layout.linears.items():
            linears = [parts.part(layer, path) for layer in self._all]
            for number, tensors in enumerate(zip(*map(parts.linear_parts, linears), strict=True)):
                keep(number, name, list(tensors))
            adapters = self._adapters(self._all, name, path)
            if adapters is None:
                continue
            if len(self.lora_a):
                raise ValueError("lora_rank: expected 0 where the model has adapters")
            keep(2, name, adapters[0])
            keep(3, name, adapters[1])
        for name, path in self.facts.norms.items():
            norms = [parts.part(layer, path) for layer in self._all]
            keep(0, name, [norm.weight for norm in norms])
            keep(1, name, [getattr(norm, "bias", None) for norm in norms])
        if self._tables:
            keep(0, "position_bias", [table.weight for table in self._tables])
        return held

    def _lent(self, use: Callable[[Held], Any]) -> Any:
        now = self._now
        assert now is not None
        return super()._lent(
            lambda own: use(
                now._replace(
                    lora_a={**now.lora_a, **own.lora_a}, lora_b={**now.lora_b, **own.lora_b}
                )
            )
        )


def install_layer_experts(model: nn.Module, **options: Any) -> LayerExpertStack:
    """Lets each layer of a model run mixed with one that is chosen for the batch (MoLEx).

    MoLEx (arXiv 2503.11144) as in `LayerExpertStack`, which says what it computes and which models
    it takes, inside of the model's own forward pass: embeddings, final norm, heads and losses are
    the model's, and so are weights, names and adapters. What is new stands in `molex_experts` of
    the decoder, and in the model's parameters and state dict: gates, mixing weights, adapters of
    `lora_rank`. With layers_to_use=0 the model is what it was.

        experts = install_layer_experts(model, straight_through=True)
        loss = model(**batch).loss + 0.01 * experts.last.balance_loss

    `experts.last` is the `LayerExpertOutput` of the last forward pass: `balance_loss`, unscaled,
    for the loss, `chosen` layers, and the decoder's `hidden`. A loss of Trainer adds it in
    `compute_loss`.

    Adapters of PEFT are the model's, trained where they are and saved by PEFT, whether they come
    before this call or after it; PEFT freezes what it finds, so that gates train where it comes
    before. A checkpoint of the model has what is new as well; a model of `from_pretrained` gets it
    by this call with the same options and then `load_state_dict`.

    Training, `gradient_checkpointing_enable()` in its non-reentrant kind, which is the default of
    transformers, several forward passes before their backward passes, `torch.compile`, deepcopy and
    pickling work as without it. A cache is refused (`generate(..., use_cache=False)` runs), and so
    are attention weights as an output, cross attention, packed sequences and the masks of flex
    attention, for attention is PyTorch's `scaled_dot_product_attention`. Installed again, it starts
    anew. `uninstall` takes it out and lets the weights train again that it has frozen, where PEFT
    has not come since.

    Args:
        model: a transformers model (any head), alone or wrapped by PEFT with LoRA.
        options: of `LayerExpertStack.from_transformers`.

    Returns:
        The stack, with `last`. It is called by the model only.

    Raises:
        TypeError: an unknown option, a wrong type.
        ValueError: an unknown kind of model, layers that differ or do more than is known, a wrong
            option, a linear layer with hooks or a parametrization. Nothing is changed then.
    """
    allowed = inspect.signature(LayerExpertStack.from_transformers).parameters
    unknown = sorted(set(options) - (set(allowed) - {"model"}))
    if unknown:
        raise TypeError(f"options: expected some of {sorted(allowed)[1:]}, got {unknown}")
    layers = parts.layers_of(model).layers
    decoder = _decoder(model, layers)
    before = _experts(decoder)
    if before is not None:
        before.take_out(decoder)
    try:
        experts = _Experts.from_transformers(model, **options)
    except Exception:
        if before is not None:
            before.put_in(decoder, layers)
        raise
    assert isinstance(experts, _Experts)
    if options.get("freeze", True):
        experts.freeze()
    experts.put_in(decoder, layers)
    return experts


def is_mixed(layer: nn.Module) -> bool:
    """Whether it runs as an expert, so that the modules in it are not called."""
    return isinstance(layer, _Layer)


def take_out(model: nn.Module) -> bool:
    """Undoes `install_layer_experts`; False where there is nothing."""
    found = [(module, _experts(module)) for module in model.modules()]
    installed = [(decoder, experts) for decoder, experts in found if experts is not None]
    for decoder, experts in installed:
        experts.take_out(decoder)
    return bool(installed)


def _experts(decoder: nn.Module) -> _Experts | None:
    """Its own: wrappers such as PEFT's answer for what they wrap."""
    child = decoder._modules.get("molex_experts")
    return child if isinstance(child, _Experts) else None


def _decoder(model: nn.Module, layers: nn.ModuleList) -> nn.Module:
    """The nearest of transformers' models around the layers: it gets the mask of the tokens."""
    path = next(name for name, module in model.named_modules() if module is layers)
    names = path.split(".")
    for length in range(len(names) - 1, -1, -1):
        around = model.get_submodule(".".join(names[:length]))
        if around is not layers and hasattr(type(around), "base_model_prefix"):
            return around
    raise ValueError(
        f"model: expected one of transformers' models around the layers, got {type(model).__name__}"
    )


def _as_ours(mask: Any, hidden: Tensor) -> Tensor | None:
    """The mask that the model gives its layers, as the stack takes it."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(
            f"model: expected one with attn_implementation 'sdpa' or 'eager' with {_KIND}, got "
            f"a mask of {type(mask).__name__}"
        )
    if mask.dim() == 2:
        return mask.bool()
    return mask.to(hidden.dtype) if mask.is_floating_point() else mask
