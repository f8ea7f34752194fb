"""`python -m benchmarks.end_to_end.text`: the methods on real text.

Trains a byte-level transformer on the Python standard library's source, once with plain mixtures
and once with each variant of them, from the same seeds on the same bytes for the same number of
steps; validates on clean text and on text with swapped words; then measures the step time of each
implementation. Whatever comes out is reported.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import environment, presets, terminal
from benchmarks.end_to_end import data
from benchmarks.end_to_end.steps import step_times
from benchmarks.end_to_end.train import Run, affordable_steps, train
from benchmarks.end_to_end.variants import BASE, VARIANTS
from benchmarks.end_to_end.verdict import mean_and_error, verdict
from benchmarks.formats import seconds
from benchmarks.measure import FAILED, WRONG
from benchmarks.presets import TextPlan


def run(plan: TextPlan, device: torch.device, console: Console) -> dict[str, Any]:
    """The whole run, as the report's data."""
    text = data.load(plan.context, plan.validation_bytes)
    console.print(
        f"text: {text.files} files, {len(text.train) / 1e6:.1f} MB to train on, "
        f"{text.validation[:, 1:].numel()} of {text.held_out_bytes} held-out bytes to validate"
    )
    steps = affordable_steps(plan, text, device)
    runs: list[Run] = []
    with terminal.training_bar("text", console) as bar:
        task = bar.add_task("", total=steps * len(plan.seeds))
        for number, seed in enumerate(plan.seeds):

            def report(step: int, bits: dict[str, float], done: int = number * steps) -> None:
                losses = ", ".join(f"{name} {value:.3f}" for name, value in bits.items())
                bar.update(task, completed=done + step, description=f"train bits/byte: {losses}")
                if step % max(steps // 4, 1) == 0 and not console.is_terminal:
                    console.print(f"step {step}/{steps}: train bits/byte: {losses}")

            finished, trainers = train(plan, text, steps, seed, device, report)
            runs += finished
    times = step_times(plan, text, trainers, device)
    parameters = {
        name: sum(p.numel() for p in trainer.model.parameters())
        for name, trainer in trainers.items()
    }
    return {
        "plan": dataclasses.asdict(plan),
        "base": BASE,
        "labels": {name: variant.label for name, variant in VARIANTS.items()},
        "steps": steps,
        "parameters": parameters,
        "files": text.files,
        "train_bytes": len(text.train),
        "validation_bytes": text.validation[:, 1:].numel(),
        "runs": [one.summary() for one in runs],
        "differences": _differences(runs),
        "step_times": times,
        "environment": environment.describe(device),
    }


def _differences(runs: list[Run]) -> list[dict[str, Any]]:
    """Each variant minus the plain model in bits per byte, paired over the validation windows."""
    by_name = {(one.variant, one.seed): one for one in runs}
    found = []
    for (name, seed), one in by_name.items():
        if name == BASE:
            continue
        entry: dict[str, Any] = {"variant": name, "seed": seed}
        for key in ("final", "swapped"):
            pairs = zip(getattr(one, key), getattr(by_name[BASE, seed], key), strict=True)
            entry[key], entry[f"{key}_error"] = mean_and_error([a - b for a, b in pairs])
        found.append(entry)
    return found


def main() -> int:
    """Command line; not 0 if a step of ours was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else presets.default_device()
    console = terminal.console()
    results = run(presets.PRESETS[options.preset].text, device, console)
    for one in results["runs"]:
        console.print(
            f"{one['variant']:<10} seed {one['seed']}: {one['final']:.4f} validation bits per byte "
            f"after {results['steps']} steps (+- {one['final_error']:.4f}), {one['swapped']:.4f} "
            "with swapped words"
        )
    for line in verdict(results):
        console.print(line)
    for entry in results["step_times"]:
        took = seconds(entry["median_s"]) if "median_s" in entry else entry["reason"]
        console.print(f"step {entry['variant']:<10} {entry['impl']:<10} {took}")
    if options.json:
        options.json.write_text(json.dumps(results))
    return int(any(entry["status"] in (FAILED, WRONG) for entry in results["step_times"]))


if __name__ == "__main__":
    sys.exit(main())
