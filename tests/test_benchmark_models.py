"""The benchmark of whole models, on tiny ones: what it holds forms to, and what it writes down."""

# ruff: noqa: E402 - the benchmarks need packages that the tests of the ops do not

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

for needed in ("rich", "matplotlib", "sklearn", "transformers"):
    pytest.importorskip(needed, exc_type=ImportError)

import benchmark_runs as runs

from benchmarks import model_forms, models, readme, timing
from benchmarks.measure import FAILED, OK, SKIPPED, WRONG
from benchmarks.model_forms import Form

CPU = torch.device("cpu")
EXPERTS, LAYERS = model_forms.cases(CPU)
EAGER = next(form for form in EXPERTS.forms if form.name == "eager")


@pytest.fixture(autouse=True)
def brief(monkeypatch: Any) -> None:
    """Each call is timed once: what a round takes is no matter here."""

    def one_round(calls: Any, clock: Any, **options: Any) -> dict[str, dict[int, float]]:
        return {name: {1: clock.sample(call, 1)} for name, call in calls.items()}

    monkeypatch.setattr(timing, "round_robin", one_round)


def test_every_form_runs_agrees_and_is_stored(tmp_path: Path, monkeypatch: Any, capsys: Any):
    pytest.importorskip("peft", exc_type=ImportError)
    arguments = ["--device", "cpu", "--save-results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["models", *arguments])
    assert models.main() == 0
    printed = capsys.readouterr().out
    (stored,) = tmp_path.glob("*/models-*.json")
    found = json.loads(stored.read_text())
    rows = {(r["form"], r["mode"]): r for r in found["rows"]}
    both = (EXPERTS, LAYERS)
    timed = {form: case for case in both for form in case.forms if form.is_timed}
    assert set(rows) == {(form.name, mode) for form in timed for mode in models.MODES}
    for form, case in timed.items():
        for mode in models.MODES:
            row = rows[form.name, mode]
            assert row["status"] == OK, row
            assert "reason" not in row
            assert row["peak_bytes"] > 0
            assert row["tokens_per_s"] == pytest.approx(case.batch * case.length / row["median_s"])
            assert set(row["versus"]) == set(form.against)
            # Each of ours has an oracle, near enough to fp32 for twice its error to mean much.
            assert form.is_ours <= ("error" in row)
            assert 0 < row.get("oracle_error", 0.1) < 0.3
    for form in ("molex", "ac_router", "momentum", "layer_experts"):
        assert form in printed
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    text = readme.page(stored.parent / "ops-x.json", runs.run(*runs.pair(2.0)))
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert f"({stored.name})" in text
    assert text.count("| step | momentum |") == 1


def test_what_is_installed_changes_the_model():
    """Else a form would be compared with itself under another name."""
    case = dataclasses.replace(EXPERTS, batch=1, length=16)
    model, batch = case.build(CPU, torch.bfloat16), case.draw(CPU)
    losses = {
        form.name: models.Step(form, model, batch).gradients()[0]
        for form in EXPERTS.forms
        if form.name in ("molex", "ac_router", "momentum")
    }
    assert len(set(losses.values())) == 3, losses


def _with(*forms: Form) -> dict[str, dict[str, Any]]:
    case = dataclasses.replace(EXPERTS, batch=1, length=16, forms=(EAGER, *forms))
    rows = models.measure(case, CPU, 0.0)
    return {row["form"]: row for row in rows if row["mode"] == "step"}


def _changed(change: Any) -> Any:
    def install(model: Any) -> Any:
        loss = EAGER.install(model)
        return lambda batch: change(loss(batch))

    return install


def test_another_loss_or_other_gradients_are_wrong():
    rows = _with(
        Form("same", EAGER.install, oracle="eager", against=("eager",)),
        Form("loss", _changed(lambda loss: 1.01 * loss), oracle="eager"),
        Form("gradients", _changed(lambda loss: 3 * loss - 2 * loss.detach()), oracle="eager"),
    )
    assert rows["same"]["status"] == OK
    assert rows["same"]["error"] == pytest.approx(rows["same"]["oracle_error"])
    assert rows["same"]["versus"]["eager"].median > 0
    for name in ("loss", "gradients"):
        assert rows[name]["status"] == WRONG
        assert rows[name]["reason"].startswith(name)
        assert "median_s" not in rows[name]


def _refuses(error: Exception) -> Any:
    def install(model: Any) -> Any:
        raise error

    return install


def test_what_cannot_run_says_so(capsys: Any):
    fails = RuntimeError("no such kernel\nand more")
    rows = _with(
        Form("cannot", _refuses(NotImplementedError("bf16 here")), oracle="eager"),
        Form("theirs", _refuses(fails), is_ours=False),
        Form("ours", _refuses(fails)),
        Form("unchecked", EAGER.install, oracle="theirs"),
    )
    assert (rows["cannot"]["status"], rows["theirs"]["status"]) == (SKIPPED, SKIPPED)
    assert rows["ours"]["status"] == FAILED
    assert rows["ours"]["reason"] == "RuntimeError: no such kernel"
    assert rows["unchecked"]["status"] == OK
    assert rows["unchecked"]["reason"].startswith("not checked, theirs fails: RuntimeError")
    models.show(list(rows.values()), models.terminal.console())
    assert "cannot: skipped: NotImplementedError: bf16 here" in capsys.readouterr().out


def test_a_model_that_cannot_be_built_has_rows(monkeypatch: Any):
    monkeypatch.setattr(model_forms, "_adapted", _refuses(ImportError("No module named 'peft'")))
    rows = models.measure(LAYERS, CPU, 0.0)
    assert len(rows) == 2 * len(LAYERS.forms)
    assert {row["status"] for row in rows} == {SKIPPED}
    assert all("No module named 'peft'" in row["reason"] for row in rows)
