"""Fast, differentiable PyTorch ops for sparse mixture-of-experts models.

Each function runs the fastest implementation that supports its inputs (`impl=None`), or the one it
is told to. `python -m molex_kernels.env` prints what will run here, and why not where not.
"""

import inspect as _inspect

from torch import fx as _fx

from molex_kernels import _flops as _flops_of_operators
from molex_kernels import _sharding as _sharding_of_operators
from molex_kernels.ops.dispatch.api import grouped_gemm, moe_mlp
from molex_kernels.ops.dispatch.module import MoEMLP
from molex_kernels.ops.dispatch.permute import permute, unpermute
from molex_kernels.ops.dispatch.types import ClampedSwiGLU
from molex_kernels.ops.layer_mixing.api import (
    layer_linear,
    layer_mix,
    layer_vote,
)
from molex_kernels.ops.layer_mixing.module import LayerExpertOutput, LayerExpertStack
from molex_kernels.ops.layer_mixing.types import LoRA
from molex_kernels.ops.merging.api import camex_deltas, camex_linear, camex_merge
from molex_kernels.ops.merging.experts import camex_experts, camex_experts_deltas
from molex_kernels.ops.merging.gates import (
    cv_squared_loss,
    noisy_topk_gates,
    propagate_base,
    segment_gates,
)
from molex_kernels.ops.merging.module import CAMExLinear, CAMExMLP
from molex_kernels.ops.merging.types import CamexDeltas, KroneckerCurvature
from molex_kernels.ops.momentum.api import moe_mlp_momentum, momentum_update
from molex_kernels.ops.momentum.module import MomentumMoE, MomentumOutput
from molex_kernels.ops.momentum.types import (
    Adam,
    AdEMAMix,
    HeavyBall,
    Mars,
    Nesterov,
    RobustMomentum,
    Rule,
    Signum,
)
from molex_kernels.ops.routing.api import ac_route, ac_weights, route_plan, topk_route
from molex_kernels.ops.routing.balance import update_expert_bias
from molex_kernels.ops.routing.choice import route_from_index, route_from_logits
from molex_kernels.ops.routing.losses import load_balance_loss, router_z_loss
from molex_kernels.ops.routing.module import ACRouter, CosineRouter, TopKRouter
from molex_kernels.ops.routing.types import RoutePlan, Routing
from molex_kernels.ops.rpc_attention.api import rpc_attention, scaled_attention
from molex_kernels.ops.rpc_attention.module import RPCAttention, ScaledAttention
from molex_kernels.ops.soft_moe.module import SoftMoE, SoftMoEOutput

_flops_of_operators.install()
_sharding_of_operators.install()

__version__ = "0.1.0"

__all__ = [
    "ACRouter",
    "AdEMAMix",
    "Adam",
    "CAMExLinear",
    "CAMExMLP",
    "CamexDeltas",
    "ClampedSwiGLU",
    "CosineRouter",
    "HeavyBall",
    "KroneckerCurvature",
    "LayerExpertOutput",
    "LayerExpertStack",
    "LoRA",
    "Mars",
    "MoEMLP",
    "MomentumMoE",
    "MomentumOutput",
    "Nesterov",
    "RPCAttention",
    "RobustMomentum",
    "RoutePlan",
    "Routing",
    "Rule",
    "ScaledAttention",
    "Signum",
    "SoftMoE",
    "SoftMoEOutput",
    "TopKRouter",
    "__version__",
    "ac_route",
    "ac_weights",
    "camex_deltas",
    "camex_experts",
    "camex_experts_deltas",
    "camex_linear",
    "camex_merge",
    "cv_squared_loss",
    "grouped_gemm",
    "layer_linear",
    "layer_mix",
    "layer_vote",
    "load_balance_loss",
    "moe_mlp",
    "moe_mlp_momentum",
    "momentum_update",
    "noisy_topk_gates",
    "permute",
    "propagate_base",
    "route_from_index",
    "route_from_logits",
    "route_plan",
    "router_z_loss",
    "rpc_attention",
    "scaled_attention",
    "segment_gates",
    "topk_route",
    "unpermute",
    "update_expert_bias",
]

# `torch.fx.symbolic_trace` records the calls of `molex_kernels.moe_mlp(...)` in a model. (A name
# that was imported from here is the importing module's: `torch.fx.wrap("moe_mlp")` stands there.)
for _name in __all__:
    if _inspect.isfunction(globals()[_name]):
        _fx.wrap(_name)
