"""The models of `python -m benchmarks.models`, each in several forms that share its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from molex_kernels import HeavyBall

Batch = dict[str, Tensor]
Loss = Callable[[Batch], Tensor]
Gradients = list[Any]  # of Tensor, or None

BALANCE = 0.01  # of MoLEx' balance loss, as the published scripts have it for CoLA
MIXING = (0.95, 0.05)
RANK = 8  # of the adapters, on queries and values


@dataclass(frozen=True)
class Form:
    """A way to compute a model.

    `install` changes the model it is given and returns its loss. `oracle` names the form that is
    the same function by other code; `against` the forms that its time is compared with.
    """

    name: str
    install: Callable[[Any], Loss]
    is_ours: bool = True
    oracle: str | None = None
    against: tuple[str, ...] = ()
    is_timed: bool = True


@dataclass(frozen=True)
class Case:
    """A model of transformers with random weights, and its forms."""

    name: str
    kind: str
    sizes: dict[str, Any]
    batch: int
    length: int
    forms: tuple[Form, ...]
    has_adapters: bool = False

    @property
    def shape(self) -> str:
        """The sizes in one word, as the ops' cases have them."""
        sizes = self.sizes
        word = f"B{self.batch}-N{self.length}-D{sizes['hidden_size']}"
        word += f"-L{sizes['num_hidden_layers']}"
        if experts := sizes.get("num_experts"):
            width, top_k = sizes["moe_intermediate_size"], sizes["num_experts_per_tok"]
            return f"{word}-I{width}-E{experts}-K{top_k}"
        return f"{word}-I{sizes['intermediate_size']}-r{RANK}"

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The model as transformers makes it, drawn from a fixed seed."""
        from transformers import AutoConfig, AutoModelForCausalLM

        # Weights of 1 / sqrt(D) keep what each layer adds as large as what is there at any width.
        spread = self.sizes["hidden_size"] ** -0.5
        config = AutoConfig.for_model(self.kind, **self.sizes, initializer_range=spread)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation="sdpa"
            )
        if self.has_adapters:
            model = _adapted(model)
        return model.to(device).train()

    def draw(self, device: torch.device) -> Batch:
        """Random tokens, which are the labels, too."""
        generator = torch.Generator().manual_seed(1)
        size = (self.batch, self.length)
        tokens = torch.randint(self.sizes["vocab_size"], size, generator=generator).to(device)
        return {"input_ids": tokens, "labels": tokens}


class Step:
    """One form of a model, on the weights of that model."""

    def __init__(self, form: Form, model: Any, batch: Batch) -> None:
        own = copied(model)
        self._loss, self._batch = form.install(own), batch
        self._held = [p for p in model.parameters() if p.requires_grad]
        self._trained = list({*self._held, *(p for p in own.parameters() if p.requires_grad)})

    def step(self) -> None:
        self._loss(self._batch).backward()
        self._clear()

    @torch.no_grad()
    def forward(self) -> None:
        self._loss(self._batch)

    def gradients(self) -> tuple[float, Gradients]:
        """The loss, and the gradients of those parameters that all forms have."""
        loss = self._loss(self._batch)
        loss.backward()
        found = [p.grad for p in self._held]
        self._clear()
        return loss.item(), found

    def _clear(self) -> None:
        for parameter in self._trained:
            parameter.grad = None


def copied(model: Any) -> Any:
    """The model's modules and configuration once more, with the very same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def _adapted(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    # Without PEFT's start at zero, from which no gradient would reach the half of the adapters.
    options = LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(model, options, autocast_adapter_dtype=False)


def _loss_of(model: Any) -> Loss:
    return lambda batch: model(**batch, use_cache=False).loss


def _experts(name: str) -> Callable[[Any], Loss]:
    def install(model: Any) -> Loss:
        from molex_kernels.integrations.transformers import install_experts

        install_experts()
        model.set_experts_implementation(name)
        return _loss_of(model)

    return install


def _ac_router(experts: str, impl: str | None = None) -> Callable[[Any], Loss]:
    def install(model: Any) -> Loss:
        from molex_kernels.integrations.transformers import install_ac_router

        install_ac_router(model, impl=impl)
        return _experts(experts)(model)

    return install


def _momentum(experts: str, impl: str | None = None) -> Callable[[Any], Loss]:
    def install(model: Any) -> Loss:
        from molex_kernels.integrations.transformers import install_momentum

        install_momentum(model, HeavyBall(0.7), impl=impl)
        return _experts(experts)(model)

    return install


def _mixed(model: Any) -> Loss:
    from molex_kernels.integrations.transformers import install_layer_experts

    experts: Any = install_layer_experts(model, individual_gates=True, mixing=MIXING)
    _set_gates(experts.gates)
    loss = _loss_of(model)
    return lambda batch: loss(batch) + BALANCE * experts.last.balance_loss


class _TwoLayers(nn.Module):
    """One of the model's layers and the one that the batch votes for, in sequence, as published."""

    def __init__(self, number: int, layers: Sequence[nn.Module], losses: list[Tensor]) -> None:
        super().__init__()
        weight = next(layers[0].parameters())
        self.gate = nn.Linear(weight.shape[1], len(layers)).to(weight)
        self.number, self.losses = number, losses
        self.all = tuple(layers)  # a tuple, so that they are no children

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        logits = self.gate(hidden)
        votes = logits.argmax(-1).flatten()
        pick = int(votes.mode().values)  # the host waits for it
        chance = logits.softmax(-1, dtype=torch.float32).mean((0, 1))[pick]
        self.losses.append(len(self.all) * chance)
        own, other = (self.all[i](hidden, *args, **kwargs) for i in (self.number, pick))
        return MIXING[0] * own + MIXING[1] * other


def _in_sequence(model: Any) -> Loss:
    decoder = next(m for m in model.modules() if isinstance(getattr(m, "layers", 0), nn.ModuleList))
    layers, losses = list(decoder.layers), []  # type: tuple[list[nn.Module], list[Tensor]]
    decoder.layers = nn.ModuleList(_TwoLayers(t, layers, losses) for t in range(len(layers)))
    _set_gates([layer.gate for layer in decoder.layers])
    loss = _loss_of(model)

    def with_balance(batch: Batch) -> Tensor:
        losses.clear()
        return loss(batch) + BALANCE * torch.stack(losses).sum()

    return with_balance


@torch.no_grad()
def _set_gates(gates: Sequence[Any]) -> None:
    """The same in every form and dtype; the gate of layer t prefers the layer after it.

    A batch whose votes are nearly even would choose another layer after any rounding.
    """
    generator = torch.Generator().manual_seed(2)
    for t, gate in enumerate(gates):
        drawn = torch.randn(gate.weight.shape, generator=generator) / gate.in_features**0.5
        gate.weight.copy_(0.5 * drawn.bfloat16())
        gate.bias.zero_()
        gate.bias[(t + 1) % len(gates)] = 2.0


_EXPERTS = (
    Form("eager", _experts("eager"), is_ours=False),
    Form("grouped_mm", _experts("grouped_mm"), is_ours=False, oracle="eager"),
    Form("molex", _experts("molex"), oracle="eager", against=("eager", "grouped_mm")),
    Form("plain ac_router", _ac_router("eager", "reference"), is_timed=False),
    Form("ac_router", _ac_router("molex"), oracle="plain ac_router", against=("molex",)),
    Form("plain momentum", _momentum("eager", "reference"), is_timed=False),
    Form("momentum", _momentum("molex"), oracle="plain momentum", against=("molex",)),
)
_LAYERS = (
    Form("model", _loss_of, is_ours=False),
    Form("two_in_sequence", _in_sequence, is_ours=False),
    Form("layer_experts", _mixed, oracle="two_in_sequence", against=("model", "two_in_sequence")),
)


def cases(device: torch.device) -> tuple[Case, ...]:
    """As large as real ones on a GPU; elsewhere tiny, which shows that they run."""
    is_large = device.type == "cuda"
    experts = {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    } if is_large else {
        "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    }  # fmt: skip
    layers = {
        "vocab_size": 32000, "hidden_size": 2048, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 8192,
    } if is_large else {
        "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96,
    }  # fmt: skip
    experts["norm_topk_prob"] = True
    # Hundreds of tokens at the least: of few, one that rounding routes elsewhere decides the error.
    tokens, tuned = ((2, 2048), (8, 128)) if is_large else ((4, 128), (2, 32))
    return (
        Case("experts", "qwen3_moe", experts, *tokens, _EXPERTS),
        Case("layers", "llama", layers, *tuned, _LAYERS, has_adapters=True),
    )
