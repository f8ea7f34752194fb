"""Loads merged layers from the names of CAMEx' code."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from molex_kernels import _published

# The names in the published checkpoints.
NAMES = {
    "w_gate": "w_gate",
    "w_noise": "w_noise",
    "experts": "weight",
    "base": "res_weight",
    "bias": "bias",
    "base_bias": "res_bias",
    "out1": "curve1_out",
    "out2": "curve2_out",
    "in1": "curve1_in",
    "in2": "curve2_in",
    "bias_out1": "curve1_bias",
    "bias_out2": "curve2_bias",
    "task_weight": "task_proj.weight",
    "task_bias": "task_proj.bias",
}
# Which they have besides, never trained: of the noise's distribution.
CONSTANTS = {"mean": 0.0, "std": 1.0}


def load(
    module: nn.Module, state_dict: Mapping[str, Tensor], parts: Mapping[str, str], prefix: str
) -> None:
    """Into the layers of a module, by what their parameters and published names start with."""
    names = {
        f"{own}{parameter}": f"{published}{name}"
        for own, published in parts.items()
        for parameter, name in NAMES.items()
    }
    _published.load(
        module,
        state_dict,
        names,
        prefix=prefix,
        rows=[f"{own}base_bias" for own in parts],
        constants={
            f"{published}{name}": value
            for published in parts.values()
            for name, value in CONSTANTS.items()
        },
    )
