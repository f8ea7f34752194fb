"""Expert parallelism as a style of `parallelize_module`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.utils.parametrize import is_parametrized

from molex_kernels import _check
from molex_kernels.ops.dispatch.module import MoEMLP, compute, routed_tokens
from molex_kernels.ops.momentum.module import MomentumMoE
from molex_kernels.ops.routing.types import RoutePlan
from molex_kernels.parallel import exchange

STRATEGIES = ("all_to_all", "all_gather")


class ExpertParallel(ParallelStyle):
    """Shards the experts of a module over the ranks of a mesh dimension; tokens stay at home.

        parallelize_module(model, mesh["ep"], {"layers.*.experts": ExpertParallel()})

    Of E experts, rank r of P has those from r E / P up to (r + 1) E / P. Each parameter of the
    experts becomes a `DTensor`, Shard(0), of what rank 0 has (`src_data_rank` of
    `parallelize_module`); the module is called with this rank's tokens, as before, and returns
    their outputs: those of one process to rounding, where ranks together have its tokens.

    `all_to_all`: each chosen row of a token goes to the rank of its expert and comes back, to be
    weighted and summed at home. A call waits for the device once, since the collective takes the
    numbers of rows from the host; the backward pass waits for nothing. Ranks may have any numbers
    of tokens, and none. Sent are about 2 T K (P - 1) / P rows a rank and pass. Experts compute what
    they are sent, however unevenly.

    `all_gather`: all ranks get the tokens of all, with ids and weights, and compute what their own
    experts contribute, which is summed and scattered. The host reads nothing that a device has
    computed. Sent are about 2 T (P - 1) rows a rank and pass, whatever K is; parts of the sums are
    rounded to the tokens' dtype on each rank. Every rank has equally many tokens, or at most
    `max_tokens`. On a CPU other numbers are refused; on a GPU PyTorch does not look
    (`TORCH_DISTRIBUTED_DEBUG=DETAIL` makes it).

    For `MoEMLP`, `MomentumMoE` (its `experts`) and transformers' experts on "molex". The shared
    expert of a `MoEMLP` stays whole on every rank and computes this rank's tokens while others
    travel. In a `MomentumMoE` the state stays with the tokens at home, so that experts and step are
    two ops, f = experts(...) and `momentum_update`, and not the one `moe_mlp_momentum`. A `plan`
    that `MoEMLP` is given is of all E experts, and `all_gather` makes its own.

    Gradients of the experts are those of the sum of all ranks' losses, gradients of what every rank
    has whole (routers, shared experts, attention) those of its own loss. For the gradient of a mean
    over all tokens, divide each rank's loss by the number of tokens of all ranks, and sum
    gradients of the latter over the ranks. What averages them (DDP, FSDP) makes the experts'
    gradients P times as large in relation.

    All ranks of the group call the module equally often, forward and backward, with inputs that
    agree in whether they need a gradient: a rank without tokens, too. One that does not keeps the
    others waiting until the time-out of the process group; one that dies makes them raise.

    `fully_shard` (FSDP2) over another mesh dimension comes after this. State dicts hold DTensors,
    as `torch.distributed.checkpoint` saves and loads them. Load other checkpoints before the
    experts are sharded, or with `set_model_state_dict(..., full_state_dict=True)`.

    Args:
        strategy: "all_to_all" or "all_gather".
        max_tokens: of a rank's call, with "all_gather": each rank fills up with empty tokens. None
            is as many as each rank has.

    Raises:
        TypeError: from `parallelize_module`, a module that it is not for.
        ValueError: another strategy; from `parallelize_module`, a mesh of several dimensions, a
            number of experts that the ranks do not divide, or experts that are sharded, wrapped or
            run by another implementation than "molex".
    """

    def __init__(self, strategy: str = "all_to_all", *, max_tokens: int | None = None) -> None:
        _check.choice("strategy", strategy, STRATEGIES)
        if max_tokens is not None:
            _check.integer("max_tokens", max_tokens, 1)
            if strategy != "all_gather":
                raise ValueError(
                    f"max_tokens: expected None with strategy={strategy!r}, got {max_tokens}"
                )
        self.strategy = strategy
        self.max_tokens = max_tokens

    def __repr__(self) -> str:
        return f"ExpertParallel({self.strategy!r}, max_tokens={self.max_tokens})"

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, MomentumMoE):
            self._apply(module.experts, device_mesh)
            return module
        forward, weight = _forward_of(self, module)
        _check_parameters(module, weight.shape[0], device_mesh)
        for name, parameter in list(module.named_parameters(recurse=False)):
            shard = distribute_tensor(
                parameter.detach(), device_mesh, [Shard(0)], src_data_rank=self.src_data_rank
            )
            module.register_parameter(name, nn.Parameter(shard, parameter.requires_grad))
        # A forward of the instance's own says that this is no plain module any more, and goes along
        # with copies: it takes the mesh from the parameters.
        module.forward = forward
        return module


def _exchange(
    style: ExpertParallel,
    x: Tensor,
    index: Tensor,
    weight: Tensor,
    experts: exchange.Experts,
    plan: RoutePlan | None = None,
) -> exchange.Result:
    """The tokens [T, D] of this rank through the experts of all."""
    if style.strategy == "all_to_all":
        return exchange.all_to_all(x, index, weight, experts, plan)
    return exchange.all_gather(x, index, weight, experts, style.max_tokens)


def _moe_mlp(
    style: ExpertParallel,
    module: MoEMLP,
    x: Tensor,
    routing: Sequence[Tensor],
    *,
    plan: RoutePlan | None = None,
) -> Tensor:
    """The forward of a `MoEMLP` whose experts are sharded."""
    sharded: Any = module._weights()
    tokens = routed_tokens(x, routing, sharded[0])
    local: Any = tuple(None if w is None else w.to_local() for w in sharded)

    def own(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return compute(module, x, index, weight, local)

    shared = None if module.shared is None else functools.partial(module.shared, x)
    group = sharded[0].device_mesh.get_group()
    experts = exchange.Experts(sharded[0].shape[0], group, own, module.impl, shared)
    y, beside = _exchange(style, *tokens, experts, plan)
    y = y.view(x.shape)
    return y if beside is None else y + beside


def _transformers(
    style: ExpertParallel,
    run: Callable[..., Tensor],
    module: Any,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """The forward of a transformers' experts module whose experts are sharded."""
    _check_implementation(module)

    def stacked(name: str) -> Tensor:
        return getattr(module, name).to_local()

    def own(x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        return run(module, x, index, weight, stacked)

    whole = module.down_proj
    dtype = torch.promote_types(top_k_weights.dtype, hidden_states.dtype)
    experts = exchange.Experts(whole.shape[0], whole.device_mesh.get_group(), own)
    return _exchange(style, hidden_states, top_k_index, top_k_weights.to(dtype), experts)[0]


def _forward_of(style: ExpertParallel, module: Any) -> tuple[Callable[..., Tensor], Tensor]:
    """What the module is to compute instead, and a parameter of its experts."""
    if isinstance(module, MoEMLP):
        _check_untouched(module, type(module).forward is MoEMLP.forward)
        return functools.partial(_moe_mlp, style, module), module.w_down
    if not hasattr(getattr(module, "config", None), "_experts_implementation"):
        raise TypeError(
            "module: expected a MoEMLP, a MomentumMoE or experts of transformers, "
            f"got {type(module).__name__}"
        )
    # Only now: whoever has experts of transformers has transformers.
    from molex_kernels.integrations._merged_experts import is_merged
    from molex_kernels.integrations.transformers import _compute

    if is_merged(module):
        raise ValueError(
            f"module: expected experts that run one by one, got {type(module).__name__}, whose "
            "experts are merged (install_merged_experts)"
        )
    _check_implementation(module)
    _check_untouched(module, True)
    return functools.partial(_transformers, style, _compute, module), module.down_proj


def _check_implementation(module: Any) -> None:
    name = module.config._experts_implementation
    if name != "molex":
        raise ValueError(
            f"experts implementation: expected 'molex' (set_experts_implementation), got {name!r}"
        )


def _check_untouched(module: nn.Module, has_own_forward: bool) -> None:
    if is_parametrized(module):
        raise ValueError(
            f"module: expected parameters of its own, got {type(module).__name__}, whose "
            "parametrizations have them: remove those first"
        )
    if not has_own_forward or "forward" in module.__dict__:
        raise ValueError(
            f"module: expected {type(module).__name__} with the forward of its class, got one that "
            "is replaced: sharded already, offloaded or derived"
        )


def _check_parameters(module: nn.Module, num_experts: int, mesh: DeviceMesh) -> None:
    if mesh.ndim != 1:
        raise ValueError(f"mesh: expected one dimension, such as mesh['ep'], got {mesh.ndim}")
    if num_experts % mesh.size():
        name = f" {mesh.mesh_dim_names[0]!r}" if mesh.mesh_dim_names else ""
        raise ValueError(
            f"num_experts: expected a multiple of {mesh.size()}, the ranks of the mesh dimension"
            f"{name}, got {num_experts}"
        )
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name}: expected a plain parameter, got a DTensor: use ExpertParallel before "
                "fully_shard and other styles, and once"
            )
        if parameter.shape[:1] != (num_experts,):
            raise ValueError(
                f"{name}: expected shape [E, ...] with E={num_experts}, got {list(parameter.shape)}"
            )
