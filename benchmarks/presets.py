"""What a run covers and how long it may take."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainingPlan:
    """What every training run has. `seconds` bounds what all of it takes on an idle machine.

    Without `tuning` all is trained with the first value of its knob alone.
    """

    seconds: float
    max_steps: int
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning: bool = True
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class TextPlan(TrainingPlan):
    """The training run on text."""

    batch: int = 16
    context: int = 32
    dim: int = 8
    layers: int = 3
    heads: int = 2
    experts: int = 4
    top_k: int = 2
    hidden: int = 16
    segment: int = 8  # tokens that share a merged expert
    test_characters: int = 16384
    step_seconds: float = 8.0


@dataclass(frozen=True)
class ImagesPlan(TrainingPlan):
    """The training run on images."""

    batch: int = 32
    dim: int = 32
    layers: int = 2
    heads: int = 2
    patch: int = 2


@dataclass(frozen=True)
class FinetunePlan(TrainingPlan):
    """The fine-tune."""

    batch: int = 16
    length: int = 16
    layers: int = 3
    packages: int = 6
    per_package: int = 150
    rank: int = 8


@dataclass(frozen=True)
class Preset:
    """One choice of cases and limits. All limits are in seconds of wall-clock time.

    `mode_seconds`: for timing the implementations of one shape, forward or step. `ops_seconds`:
    after it no further shape is started; likewise `sweep_mode_seconds` and `sweep_seconds`.
    `compile_seconds`: after it nothing more is compiled or tuned, each baseline for itself.
    `case_seconds`: a pass that would take longer at the machine's matmul rate is left out.
    `call_seconds`: a reference that would take longer is left out, and on a CPU any baseline.
    `check_seconds`: where a reference would take longer to check with, the oracle does where the op
    names one. `limit_seconds`: the whole run, its report included, unless the command line says
    otherwise.
    """

    name: str
    cases: str
    sweeps: str
    mode_seconds: float
    min_rounds: int
    ops_seconds: float
    sweep_mode_seconds: float
    sweep_seconds: float
    compile_seconds: float
    case_seconds: float
    call_seconds: float
    check_seconds: float
    text: TextPlan
    images: ImagesPlan
    finetune: FinetunePlan
    needs_cuda: bool = False
    limit_seconds: float = math.inf


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="quick",
            cases="quick",
            sweeps="quick_sweeps",
            mode_seconds=0.7,
            min_rounds=5,
            ops_seconds=230,
            sweep_mode_seconds=0.15,
            sweep_seconds=20,
            compile_seconds=60,
            case_seconds=1.0,
            call_seconds=2.0,
            check_seconds=0.5,
            text=TextPlan(seconds=800, max_steps=640, left_out=("nesterov", "robust", "euclidean")),
            images=ImagesPlan(seconds=300, max_steps=400),
            finetune=FinetunePlan(seconds=500, max_steps=64),
            limit_seconds=300,
        ),
        Preset(
            name="full",
            cases="benchmarks",
            sweeps="sweeps",
            mode_seconds=6.0,
            min_rounds=7,
            ops_seconds=3600,
            sweep_mode_seconds=1.0,
            sweep_seconds=900,
            compile_seconds=1200,
            case_seconds=0.5,
            call_seconds=10.0,
            check_seconds=10.0,
            text=TextPlan(
                seconds=7200,
                max_steps=4000,
                seeds=(0, 1, 2, 3, 4),
                dim=32,
                hidden=32,
                heads=4,
                context=64,
                segment=16,
                test_characters=1 << 17,
                step_seconds=40,
            ),
            images=ImagesPlan(seconds=1800, max_steps=2000, seeds=(0, 1, 2, 3, 4), dim=48, heads=3),
            finetune=FinetunePlan(seconds=3600, max_steps=400, length=32, layers=6),
        ),
        Preset(
            name="gpu",
            cases="benchmarks",
            sweeps="sweeps",
            mode_seconds=0.15,
            min_rounds=5,
            ops_seconds=430,
            sweep_mode_seconds=0.05,
            sweep_seconds=25,
            compile_seconds=45,
            case_seconds=0.5,
            call_seconds=0.2,
            check_seconds=0.5,
            text=TextPlan(
                seconds=45,
                max_steps=1000,
                seeds=(0,),
                tuning=False,
                batch=64,
                context=256,
                dim=256,
                layers=6,
                heads=8,
                experts=16,
                hidden=512,
                segment=32,
                test_characters=1 << 18,
                step_seconds=10,
            ),
            images=ImagesPlan(
                seconds=15, max_steps=400, seeds=(0,), tuning=False, dim=64, layers=4
            ),
            finetune=FinetunePlan(
                seconds=20,
                max_steps=300,
                seeds=(0,),
                tuning=False,
                length=128,
                layers=6,
                per_package=400,
            ),
            needs_cuda=True,
            limit_seconds=500,
        ),
    )
}


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtype of every shape, and the one of an op's first shape alone: fp32, on a GPU bf16."""
    both = torch.float32, torch.bfloat16
    return both[::-1] if device.type == "cuda" else both


NAMED = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SPELLED = NAMED | {str(dtype).removeprefix("torch."): dtype for dtype in NAMED.values()}


def dtype_name(dtype: torch.dtype) -> str:
    """The short name used in ids: "bf16", "fp16", "fp32", "fp64"."""
    return next((name for name, named in NAMED.items() if named == dtype), "fp64")
