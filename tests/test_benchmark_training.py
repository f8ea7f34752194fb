"""How the training runs choose and compare, on a made-up part; and a few real steps."""

# ruff: noqa: E402 - the suite needs packages that the tests of the ops do not

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

for needed in ("rich", "matplotlib", "sklearn"):
    pytest.importorskip(needed)

import benchmark_runs as runs
import torch

from benchmarks import presets, terminal
from benchmarks.end_to_end import __main__ as training
from benchmarks.end_to_end import digits, images, markdown, study, text
from benchmarks.end_to_end.study import Measure, Method, Outcome
from benchmarks.end_to_end.verdict import T95, gain, verdict

MEASURE = Measure(("clean",), "bits per character", 3, higher_is_better=False)
METHODS = {
    "plain": Method("plain", lambda _: 0.0, "learning rate", (0.1, 0.2, 0.4)),
    "good": Method("good", lambda v: -v, "mu", (0.7, 0.9)),
    "none": Method("knobless", lambda _: 0.0),
    "other": Method("other", lambda v: v, "mu", (0.5,)),
}


def _study(**more: Any) -> tuple[dict[str, Any], list[tuple[float, float, int, bool]]]:
    """The rate 0.2 is best, 0.4 diverges; test is as validation and 0.01 times the seed worse."""
    calls = []

    def train(variant: float, rate: float, seed: int, is_tested: bool) -> Outcome:
        calls.append((variant, rate, seed, is_tested))
        score = math.nan if rate == 0.4 else 3 + variant + abs(rate - 0.2)
        tested = {"clean": score + 0.01 * seed * (1 + variant)} if is_tested else {}
        return Outcome([(1, 5.0), (2, 4.0), (3, score + 0.25), (4, score)], tested)

    plan = presets.TrainingPlan(seconds=1, max_steps=4, left_out=("other",), **more)
    found = study.study("made up", plan, METHODS, train, MEASURE, terminal.console())
    return json.loads(json.dumps(found | {"steps": 4})), calls


def test_settings_are_chosen_by_validation_of_a_seed_that_is_not_reported():
    found, calls = _study()
    assert found["chosen"] == {"plain": 0.2, "good": 0.9, "none": 0.0}
    tuning, reported = calls[:5], calls[5:]
    assert len(calls) == study.count(presets.TrainingPlan(1, 4, left_out=("other",)), METHODS)
    assert {call[2:] for call in tuning} == {(study.TUNING_SEED, False)}
    assert {call[1:] for call in reported} == {(0.2, seed, True) for seed in (0, 1, 2)}
    assert [call[0] for call in reported[:4]] == [0.0, -0.7, -0.9, 0.0]


def test_published_and_tuned_settings_are_compared_by_seed():
    found, _ = _study()
    base, published, tuned, knobless = verdict(found)[2:6]
    assert base.startswith("| plain | learning rate 0.2, tuned | 3.010 ± 0.010 |")
    # The seeds' 0.01 cancel but for the share of it that the method has.
    assert "| mu 0.7, published | **-0.707 ± 0.007** |" in published
    assert "| mu 0.9, tuned | **-0.909 ± 0.009** |" in tuned
    assert "| knobless minus that | published | +0.000 ± 0.000 |" in knobless
    assert gain(found) == pytest.approx((0.25, 0.0))
    shown = "\n".join(verdict(found))
    assert "3 seeds" in shown
    assert "last quarter of 4 steps the baseline's validation still gained 0.250 ± 0.000" in shown
    assert "Left out here: other." in shown


@pytest.mark.parametrize(("shift", "is_bold"), [(1.01, True), (0.99, False)])
def test_a_difference_is_bold_beyond_the_interval_of_its_mean(shift: float, is_bold: bool):
    found, _ = _study(tuning=False)
    limit = T95[1] / math.sqrt(3)
    for run in found["runs"]:
        gap = shift * limit + (-1, 0, 1)[run["seed"]] if run["variant"] == "good" else 0.0
        run["test"] = {"clean": gap}
    assert ("**" in verdict(found)[3]) == is_bold


def test_one_seed_shows_no_method():
    found, calls = _study(seeds=(0,), tuning=False)
    assert len(calls) == 3
    assert verdict(found) == ["One seed: it says nothing about the methods."]


def test_training_has_a_limit_and_a_report(tmp_path: Path, monkeypatch: Any):
    plan = dataclasses.replace(presets.PRESETS["quick"].images, max_steps=4, seeds=(0, 1))
    made_up = {"plan": dataclasses.asdict(plan), "train": 9, "validation": 8, "test": 7}
    kept = json.loads(json.dumps(_study()[0] | made_up))

    def run(part: str, chosen: list[str], seconds: float) -> Any:
        return (kept | {"environment": runs.FACTS}, "") if seconds > 50 else (None, "late")

    monkeypatch.setattr(training, "run", run)
    argv = ["x", "--only", "images", "--out", str(tmp_path), "--limit"]
    monkeypatch.setattr(sys, "argv", [*argv, "1"])
    assert training.main() == 1
    assert not [*tmp_path.iterdir()]
    monkeypatch.setattr(sys, "argv", [*argv, "100"])
    assert training.main() == 0
    shown = (tmp_path / "training.md").read_text()
    linked = re.findall(r"!\[.*?\]\((.*?)\)", shown)
    assert linked == ["images-curves.png"]
    assert (tmp_path / linked[0]).stat().st_size > 1000
    stored = json.loads((tmp_path / "training.json").read_text())
    assert stored["images"] == kept
    for line in verdict(kept):
        assert line in shown
        assert line in [*markdown.verdicts(stored, "x.json")]


def test_no_digit_is_in_two_splits():
    data = digits.load(torch.device("cpu"))
    parts = data.train, data.validation, data.test
    assert [len(part.labels) for part in parts] == [1122, 225, 450]
    assert len({tuple(x.flatten().tolist()) for part in parts for x in part.images}) == 1797


@pytest.mark.parametrize("part", ["images", "text"])
def test_a_small_run_trains_every_method(part: str):
    plan = getattr(presets.PRESETS["quick"], part)
    small = dataclasses.replace(plan, max_steps=4, seeds=(0,), tuning=False, left_out=())
    if part == "text":
        small = dataclasses.replace(small, test_characters=256, step_seconds=0.01)
    module = {"images": images, "text": text}[part]
    found = module.run(small, torch.device("cpu"), terminal.console())
    assert found["steps"] == 4
    assert [run["variant"] for run in found["runs"]] == list(found["labels"])
    assert all(math.isfinite(value) for run in found["runs"] for value in run["test"].values())
    assert {entry["status"] for entry in found.get("step_times", ())} <= {"ok", "skipped"}
