"""`python -m benchmarks.models`: a training step of whole models of transformers, ours and theirs.

"experts" is a mixture-of-experts language model whose experts run by transformers' own
implementations and by ours, and by ours with `install_ac_router` or `install_momentum`; "layers" is
a language model with LoRA: alone, with MoLEx as published (two layers in sequence), and with
`install_layer_experts`. Weights are random and bf16. A step is the forward pass with the loss and
the gradients of all parameters that train, without an optimiser. A GPU gets real sizes, a CPU tiny
ones. The exit status is not 0 if a form of ours failed or computed something else.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks import (
    environment,
    folders,
    memory,
    presets,
    record,
    results,
    spread,
    tables,
    terminal,
    timing,
)
from benchmarks.formats import cells, gain, rate, seconds, size
from benchmarks.measure import FAILED, OK, SKIPPED, WRONG
from benchmarks.model_forms import Batch, Case, Form, Gradients, Step, cases
from benchmarks.tables import Column

MODES = ("step", "forward")
# The loss against the oracle's, relatively: one rounding of bf16. It is a mean over tokens,
# computed in fp32 from logits that were rounded to bf16, in different directions.
CLOSE = 2.0**-8
# The gradients' distance from those in fp32, over the oracle's own in bf16: two roundings of the
# same function are about equally far from it; another function, as far as the gradient is long.
TIMES = 2.0

Row = dict[str, Any]


class Expected(NamedTuple):
    """An oracle's loss in bf16, its gradients in fp32, and how far those in bf16 are from them."""

    loss: float
    exact: Gradients
    error: float


class Oracles:
    """Compares forms with their oracles. One oracle's gradients are held at a time."""

    def __init__(self, case: Case, model: Any, batch: Batch) -> None:
        self._forms = {form.name: form for form in case.forms}
        self._model, self._batch = model, batch
        self._name, self._expected = "", None  # type: tuple[str, Expected | None]

    def check(self, form: Form, step: Step) -> Row:
        """Whether its loss and gradients are the oracle's but for rounding."""
        loss, found = step.gradients()
        row: Row = {"status": OK, "loss": loss}
        if form.oracle is None:
            return row
        if form.oracle != self._name:
            self._name, self._expected = form.oracle, None
            try:
                self._expected = self._expect(self._forms[form.oracle])
            except Exception as error:
                row["reason"] = f"not checked, {form.oracle} fails: {_first_line(error)}"
        if self._expected is None:
            return {"reason": f"not checked, {form.oracle} fails"} | row
        oracle = self._expected
        apart = distance(found, oracle.exact)
        row |= {"oracle": form.oracle, "oracle_loss": oracle.loss}
        row |= {"error": apart, "oracle_error": oracle.error}
        if not abs(loss - oracle.loss) <= CLOSE * abs(oracle.loss):
            why = f"loss {loss:.5f}, that of {form.oracle} is {oracle.loss:.5f}"
            return row | {"status": WRONG, "reason": why}
        if not apart <= TIMES * oracle.error:
            why = f"gradients {apart:.2g} from those in fp32, {form.oracle} {oracle.error:.2g}"
            return row | {"status": WRONG, "reason": why}
        return row

    def _expect(self, form: Form) -> Expected:
        _, exact = Step(form, copy.deepcopy(self._model).float(), self._batch).gradients()
        loss, found = Step(form, self._model, self._batch).gradients()
        return Expected(loss, exact, distance(found, exact))


def distance(found: Gradients, exact: Gradients) -> float:
    """The norm of the difference over that of `exact`, of all gradients together."""
    apart = length = 0.0
    for one, other in zip(found, exact, strict=True):
        if other is None:
            other = torch.zeros(()) if one is None else torch.zeros_like(one)
        difference = other if one is None else one.to(other.dtype) - other
        apart += torch.linalg.vector_norm(difference).item() ** 2
        length += torch.linalg.vector_norm(other).item() ** 2
    return (apart / length) ** 0.5


def measure(case: Case, device: torch.device, budget: float) -> list[Row]:
    """A row for each form and mode, each measured for `budget` seconds."""
    forms = {form.name: form for form in case.forms if form.is_timed}
    steps: dict[str, Step] = {}
    try:
        model, batch = case.build(device, torch.bfloat16), case.draw(device)
    except Exception as error:
        checked = {name: _failure(error, form) for name, form in forms.items()}
    else:
        oracles, checked = Oracles(case, model, batch), {}
        for name, form in forms.items():
            try:
                step = Step(form, model, batch)
                checked[name] = oracles.check(form, step)
            except Exception as error:
                checked[name] = _failure(error, form)
            if checked[name]["status"] == OK:
                steps[name] = step
        del oracles  # and the gradients that it holds
    head = {"case": case.name, "model": case.kind, "shape": case.shape, "dtype": "bf16"}
    rows = []
    for mode in MODES:
        timed = _time(mode, forms, steps, device, budget)
        for name, row in checked.items():
            row = {**head, "form": name, "ours": forms[name].is_ours, "mode": mode, **row}
            row |= timed.get(name, {})
            if "median_s" in row:
                row["tokens_per_s"] = case.batch * case.length / row["median_s"]
            rows.append(row)
    return rows


def _time(
    mode: str, forms: dict[str, Form], steps: dict[str, Step], device: torch.device, budget: float
) -> dict[str, Row]:
    """Peak memory and time of the forms in turn, and how much longer others take."""
    found: dict[str, Row] = {}
    calls: dict[str, Callable[[], object]] = {}
    for name, step in steps.items():
        call = getattr(step, mode)
        try:
            call()  # what is made once and kept is no peak
            found[name] = {"peak_bytes": memory.peak_bytes(call, device)}
            calls[name] = call
        except Exception as error:
            found[name] = _failure(error, forms[name])
    clock = timing.clock_for(device)
    samples = timing.round_robin(calls, clock, seconds=budget * len(calls), min_rounds=5)
    for name, taken in samples.items():
        others = {other: samples.get(other, {}) for other in forms[name].against}
        versus = {other: r for other, s in others.items() if (r := spread.ratio(s, taken))}
        found[name] |= {**record.times(taken), "versus": versus}
    return found


def _failure(error: Exception, form: Form) -> Row:
    """Status and reason. What the library cannot do here is no failure of ours."""
    cannot = isinstance(error, NotImplementedError | ImportError | torch.OutOfMemoryError)
    status = SKIPPED if cannot or not form.is_ours else FAILED
    return {"status": status, "reason": _first_line(error)}


def _first_line(error: Exception) -> str:
    first = (str(error).strip() or "no message").splitlines()[0][:300]
    return f"{type(error).__name__}: {first}"


def _cells(row: Row) -> list[str]:
    """Pass, form, time, its quartiles, tokens, memory, and times as fast as others."""
    if "median_s" not in row:
        return [row["mode"], row["form"], row["status"]]
    against = ", ".join(f"{gain(results.speedup(row, o))} {o}" for o in row["versus"])
    return [
        row["mode"],
        row["form"],
        seconds(row["median_s"]),
        f"{seconds(row['q1_s'])} to {seconds(row['q3_s'])}",
        rate(row["tokens_per_s"]),
        size(row["peak_bytes"]),
        against or "-",
    ]


HEAD = ("pass", "form", "time", "quartiles", "tokens/s", "peak memory", "times as fast as")


def _notes(rows: Sequence[Row]) -> list[str]:
    """Of each form that has something to say, once."""
    said = (f"{r['form']}: {r['status']}: {r['reason']}" for r in rows if r.get("reason"))
    return list(dict.fromkeys(said))


def show(rows: Sequence[Row], console: Console) -> None:
    """The table of a case, and what did not run."""
    justify, leave = {"pass": "left", "form": "left"}, {"quartiles": 0, "peak memory": 1}
    columns = [Column(name, justify.get(name, "right"), leave.get(name)) for name in HEAD]
    shown = [[escape(cell) for cell in _cells(row)] for row in rows]
    tables.show(_title(rows[0]), columns, shown, console)
    for note in _notes(rows):
        terminal.paragraph(f"[{terminal.ORANGE}]{escape(note)}[/]", console)


def _title(row: Row) -> str:
    return f"{row['case']}: {row['model']} {row['shape']}, {row['dtype']}"


def lines(found: dict[str, Any], name: str) -> Iterator[str]:
    """The part of a machine's page; `name` is the file with the data."""
    facts = found["environment"]
    yield "## Whole models"
    yield ""
    yield (
        f"`python -m benchmarks.models` on {facts['date'][:10]} at commit {facts['commit']}, torch "
        f"{facts['torch']}, transformers {facts['transformers']}: [{name}]({name}). Random "
        "weights; a step is forward, loss and all gradients, without an optimiser."
    )
    for case in dict.fromkeys(row["case"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["case"] == case]
        yield ""
        yield f"{_title(rows[0])}:"
        yield ""
        yield cells(HEAD)
        yield f"|{'---|' * len(HEAD)}"
        for row in rows:
            made = _cells(row)
            yield cells([*made, *"-" * (len(HEAD) - len(made))])
        notes = _notes(rows)
        if notes:
            yield ""
        yield from (f"- {note}" for note in notes)
    yield ""


def _version(package: str) -> str:
    found = importlib.util.find_spec(package) is not None
    return importlib.metadata.version(package) if found else "not installed"


def main() -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    folders.add_device(parser)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each row; default: 2")
    parser.add_argument("--only", choices=("experts", "layers"), help="leave the other model out")
    folders.add_save_results(parser)
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else presets.default_device()
    console = terminal.console()
    if not importlib.util.find_spec("transformers"):
        console.print("models: left out, they need pip install '.\\[hf]'")
        return 0
    versions = {name: _version(name) for name in ("transformers", "peft")}
    found: dict[str, Any] = {
        "environment": {**environment.describe(device), **versions},
        "limits": {"loss": CLOSE, "gradients": TIMES},
        "rows": [],
    }
    for case in cases(device):
        if options.only in (None, case.name):
            rows = measure(case, device, options.seconds)
            show(rows, console)
            found["rows"] += rows
            if options.save_results:  # of each model when it is done: a cut loses only the next
                stored = folders.store(found, options.save_results, "models")
                terminal.place("results", str(stored), console)
    return int(any(row["ours"] and row["status"] in (FAILED, WRONG) for row in found["rows"]))


if __name__ == "__main__":
    sys.exit(main())
