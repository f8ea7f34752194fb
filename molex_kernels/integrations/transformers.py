"""This package's ops in transformers' models.

    from molex_kernels.integrations.transformers import install_experts
    install_experts()
    model.set_experts_implementation("molex")     # or from_pretrained(..., experts_implementation=)

    from molex_kernels.integrations.transformers import install_ac_router, install_momentum
    install_ac_router(model)                      # routes by the clusters of the layer before
    install_momentum(model, mk.HeavyBall(mu=0.7)) # steps against the experts, with momentum

    from molex_kernels.integrations.transformers import install_merged_experts
    install_merged_experts(model)                 # one expert per segment, merged from all

    from molex_kernels.integrations.transformers import install_rpc_attention
    install_rpc_attention(model, layers=[0])      # BERT, ViT, GPT-2, Llama: robust attention

    from molex_kernels.integrations.transformers import install_layer_experts
    experts = install_layer_experts(model)        # each layer with one chosen for the batch

Weights, names and checkpoints stay as they are, adapters of PEFT on the expert weights included.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from molex_kernels import _modules
from molex_kernels.integrations import _attention, _layer_experts, _stacked
from molex_kernels.integrations._attention import install_rpc_attention
from molex_kernels.integrations._handover import Handover, Stack
from molex_kernels.integrations._layer_experts import install_layer_experts
from molex_kernels.integrations._merged_experts import install_merged_experts
from molex_kernels.integrations._momentum import install_momentum
from molex_kernels.integrations._routers import install_ac_router
from molex_kernels.ops.dispatch.api import grouped_gemm, moe_mlp
from molex_kernels.ops.dispatch.types import Activation, ClampedSwiGLU
from molex_kernels.ops.routing.api import route_plan

# Imported here, once: `torch.compile` traces what stands below, and no import belongs in there.
try:
    from transformers import activations
    from transformers.integrations import moe
except ImportError as error:
    _MISSING: ImportError | None = error
    _POINTWISE: dict[str, tuple[type, ...]] = {}
else:
    _MISSING = None
    _POINTWISE = {
        "silu": (nn.SiLU, getattr(activations, "SiLUActivation", nn.SiLU)),
        "relu": (nn.ReLU,),
        "relu_squared": (activations.ReLUSquaredActivation,),
        "gelu": (activations.GELUActivation,),
        "gelu_tanh": (activations.GELUTanh, activations.NewGELUActivation),
    }

__all__ = [
    "experts_forward",
    "install_ac_router",
    "install_experts",
    "install_layer_experts",
    "install_merged_experts",
    "install_momentum",
    "install_rpc_attention",
    "uninstall",
]

_GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh", "relu": "reglu"}
# The one gate of transformers with clamps and a shift, by where it is defined.
_GPT_OSS = ("transformers.models.gpt_oss.modeling_gpt_oss", "GptOssExperts._apply_gate")

NAME = "molex"


def install_experts() -> str:
    """Registers "molex" with transformers' experts implementations, and returns that name.

    It serves every model whose experts transformers keeps in stacked weights (Mixtral, OLMoE,
    Qwen-MoE, DeepSeek, gpt-oss and others): with or without gate and bias, in either layout. Known
    activations, gpt-oss' among them, run as one `moe_mlp`; experts with another gate, activation or
    norm of their own run that code between two `grouped_gemm`. Routers stay the model's. Dropless,
    deterministic, without waiting for the device; ids of experts on other ranks contribute nothing.

    A model that has no such experts is refused by `set_experts_implementation("molex")`, which then
    names the model's class: transformers alone would change nothing and not say so.

    Returns:
        The name, "molex".

    Raises:
        NotImplementedError: transformers (before 5.0) or its absence leaves nothing to register
            with.
    """
    if _MISSING is not None:
        raise NotImplementedError(
            f"install_experts: expected transformers 5.0 or later with its experts interface: "
            f"{_MISSING}"
        ) from _MISSING
    moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    _let_the_name_through()
    return NAME


def uninstall(model: nn.Module) -> bool:
    """Takes out what the functions here have installed into a model, which then is as it came.

    What `set_experts_implementation("molex")` has changed is put back by giving it another name.

    Args:
        model: the whole model, or the part of it that was given when it was installed.

    Returns:
        Whether there was something.

    Raises:
        TypeError: a model that is no module.
        ValueError: a model that has been wrapped since then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    was_there = _layer_experts.take_out(model)
    if any(isinstance(vars(m).get("molex_handover"), Handover) for m in model.modules()):
        was_there = Stack(model).uninstall() or was_there
    return _attention.uninstall(model) or was_there


def _let_the_name_through() -> None:
    """Where transformers checks the name, a model without experts says so.

    Early releases of transformers 5 check names against a fixed list, whatever is registered; and
    every release takes any name for a model that will never look at it.
    """
    from transformers import PreTrainedModel

    models: Any = PreTrainedModel
    check = models.get_correct_experts_implementation
    if hasattr(check, "lets_molex_through"):
        return
    try:
        check(None, NAME)  # the model matters to names of their own only
        is_known = True
    except ValueError:
        is_known = False

    @functools.wraps(check)
    def with_ours(model: Any, requested: str | None) -> str:
        if requested == NAME:
            _refuse_without_experts(model, models)
            if not is_known:
                return NAME
        return check(model, requested)

    with_ours.lets_molex_through = True  # type: ignore[attr-defined]
    models.get_correct_experts_implementation = with_ours


def _refuse_without_experts(model: Any, models: Any) -> None:
    """A model whose parts are not there yet, or an early release, says nothing of its experts."""
    if not isinstance(model, models) or not any(True for _ in model.children()):
        return
    parts = [part for part in model.modules() if isinstance(part, models)]
    if not any(getattr(p, "_can_set_experts_implementation", lambda: True)() for p in parts):
        raise ValueError(
            f"set_experts_implementation: expected a model whose experts are in stacked weights "
            f"behind transformers' experts interface, got {type(model).__name__}, which has none: "
            f"{NAME!r} would change nothing"
        )


def experts_forward(
    experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers calls in the place of an experts module's forward.

    Args:
        experts: the module.
        hidden_states: [T, D].
        top_k_index: [T, K].
        top_k_weights: [T, K].

    Returns:
        [T, D].
    """
    return _compute(experts, hidden_states, top_k_index, top_k_weights)


def _compute(
    experts: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    stacked: Callable[[str], Tensor] | None = None,
) -> Tensor:
    """`stacked` gives the parameters of the experts by name: the module's own, or a rank's part."""
    read = stacked or functools.partial(getattr, experts)
    w_up, w_down, b_up, b_down = _stacked.weights(experts, read)
    scores = top_k_weights.to(torch.promote_types(top_k_weights.dtype, hidden_states.dtype))
    activation = _activation(experts)
    if activation is not None:
        return moe_mlp(
            hidden_states,
            top_k_index,
            scores,
            w_up,
            w_down,
            b_up=b_up,
            b_down=b_down,
            activation=activation,
            gate_layout="concat" if _stacked.says(experts, "is_concatenated") else "interleaved",
        )
    top_k = top_k_index.shape[1]
    plan = route_plan(top_k_index, w_down.shape[0])
    # Every row is taken once, so that the gradient of the gather adds nothing up in a free order.
    rows = hidden_states.repeat_interleave(top_k, 0)[plan.permutation]
    hidden = grouped_gemm(rows, w_up, plan.offsets, bias=b_up)
    hidden = (
        experts._apply_gate(hidden)
        if _stacked.says(experts, "has_gate")
        else experts.act_fn(hidden)
    )
    rows = grouped_gemm(hidden.to(rows.dtype), w_down, plan.offsets, bias=b_down)
    if _stacked.says(experts, "has_post_expert_norm"):
        rows = experts.post_expert_norm(rows)
    by_token = rows[plan.inverse].view(*top_k_index.shape, -1)
    return (by_token * scores[..., None]).sum(1, dtype=scores.dtype).to(hidden_states.dtype)


def _activation(experts: Any) -> Activation | None:
    """The activation that `moe_mlp` has for what these experts do; None for code of their own."""
    if _stacked.says(experts, "has_post_expert_norm"):
        return None
    pointwise = _pointwise(experts.act_fn) if hasattr(experts, "act_fn") else None
    if not _stacked.says(experts, "has_gate"):
        return pointwise
    gate = type(experts)._apply_gate
    if "_apply_gate" in experts.__dict__:
        return None  # somebody put another one there
    if (gate.__module__, gate.__qualname__) == _GPT_OSS:
        return ClampedSwiGLU(experts.alpha, experts.limit)
    if gate is not moe._default_apply_gate:
        return None
    return _GATED.get(pointwise or "")


def _pointwise(function: Any) -> str | None:
    if not isinstance(function, nn.Module) or not _modules.is_plain(function, type(function)):
        return None  # somebody counts on its call
    for name, classes in _POINTWISE.items():
        if type(function) in classes:
            return name
    if isinstance(function, nn.GELU):
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return None
