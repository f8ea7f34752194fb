"""Configurations are pinned; a sweep happens on request, once per shape class."""

from __future__ import annotations

import sys
import types

import pytest

from molex_kernels._triton import tuning
from molex_kernels._triton.tuning import Config

PINNED = Config({"BLOCK_T": 64})
OTHER = Config({"BLOCK_T": 128}, num_warps=8)


def _never(config: Config) -> None:
    pytest.fail("nothing is timed unless it is asked for")


def test_pinned_unless_asked(monkeypatch):
    assert tuning.choose("k", (1,), PINNED, [OTHER], _never, on_gpu=True) is PINNED
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    assert tuning.choose("k", (1,), PINNED, [OTHER], _never, on_gpu=False) is PINNED


def test_a_sweep_keeps_the_fastest_and_is_not_repeated(monkeypatch):
    times = {64: 2.0, 128: 1.0}
    launched = []

    def do_bench(call, return_mode):
        assert return_mode == "median"
        call()
        return times[launched[-1]]

    testing = types.ModuleType("triton.testing")
    testing.do_bench = do_bench
    monkeypatch.setitem(sys.modules, "triton.testing", testing)
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    monkeypatch.setattr(tuning, "_chosen", {})

    def launch(config: Config) -> None:
        launched.append(config.blocks["BLOCK_T"])

    for _ in range(2):
        assert tuning.choose("k", (1,), PINNED, [OTHER, PINNED], launch, on_gpu=True) is OTHER
    assert launched == [64, 128]
    assert tuning.choose("k", (2,), PINNED, [], launch, on_gpu=True) is PINNED


def test_launch_options():
    options = {"BLOCK_T": 128, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert OTHER.launch_options() == options
