"""The report as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from benchmarks import results
from benchmarks.end_to_end import finetune, images
from benchmarks.end_to_end.verdict import verdict
from benchmarks.formats import percent, rate, ratio, seconds
from benchmarks.results import Results, Row
from benchmarks.rows import MODES, OURS

RATES = ("GB/s", "GFLOP/s", "share of ceiling")
TITLES = {"forward": "forward", "step": "step (forward and backward)"}


def report(found: Results, plots: list[str]) -> str:
    """The whole file; `plots` are the names of the images beside it."""
    lines = [
        "# Benchmarks",
        "",
        *_environment(found),
        *_summary(found),
        *(line for op in results.ops(found) for line in _op(found, op, plots)),
    ]
    if found["text"]:
        lines += _text(found["text"], plots)
    if found["images"]:
        lines += _images(found["images"], plots)
    if found["finetune"]:
        lines += _finetune(found["finetune"])
    return "\n".join(lines) + "\n"


def _environment(found: Results) -> Iterator[str]:
    facts = found["environment"]
    yield "| | |"
    yield "|---|---|"
    for name, value in facts.items():
        yield f"| {name.replace('_', ' ')} | {value} |"
    yield f"| preset | {found['preset']} |"
    for dtype, ceiling in found["ceilings"].items():
        yield f"| copy ceiling | {rate(ceiling['copy'] * 1e-9)} GB/s |"
        yield f"| matmul ceiling, {dtype} | {rate(ceiling['matmul'] * 1e-9)} GFLOP/s |"
    yield ""
    yield (
        "Read the ratios: all rows of one shape were measured in turn, round after round, in one "
        "process. The absolute times are this machine's. A speed-up is the baseline's median time "
        "divided by ours. Every result was checked against fp64 within the tests' error budget "
        "before it was timed; a wrong one is shown as wrong and has no time. The share of the "
        "ceiling can exceed 100% where the data sits in a cache."
    )
    yield ""


def _summary(found: Results) -> Iterator[str]:
    names = results.baselines(found)
    if not results.ops(found):
        yield "No op was measured."
        yield ""
        return
    yield "## Speed-up of the fastest implementation, geometric mean over shapes"
    yield ""
    yield f"| op | mode | shapes | {' | '.join(names)} |"
    yield f"|---|---|---|{'---|' * len(names)}"
    for op in results.ops(found):
        for mode in MODES:
            groups = [results.members(found, op, mode, s) for s in results.shapes(found, op, mode)]
            chosen = [(ours, g) for g in groups if (ours := results.best(g))]
            if groups:
                means = [ratio(_mean(chosen, name)) for name in names]
                yield f"| `{op}` | {mode} | {len(chosen)} | {' | '.join(means)} |"
    yield ""


def _mean(chosen: list[tuple[Row, list[Row]]], name: str) -> float | None:
    found = [results.speedup(ours, r) for ours, g in chosen for r in g if r["impl"] == name]
    logs = [math.log(value) for value in found if value]
    return math.exp(sum(logs) / len(logs)) if logs else None


def _op(found: Results, op: str, plots: list[str]) -> Iterator[str]:
    names = results.baselines(found)
    yield f"## {op}"
    yield ""
    for mode in MODES:
        shapes = results.shapes(found, op, mode)
        if not shapes:
            continue
        rows = [r for shape in shapes for r in results.members(found, op, mode, shape)]
        extra = [
            *(["graph"] if any("graph_s" in r for r in rows) else []),
            *(["peak memory"] if any("peak_bytes" in r for r in rows) else []),
        ]
        against = [f"vs {name}" for name in names]
        yield f"### {op}, {TITLES[mode]}"
        yield ""
        yield _cells(["shape", "implementation", "time", *extra, *against, *RATES])
        yield f"|{'---|' * (6 + len(extra) + len(names))}"
        for shape in shapes:
            group = results.members(found, op, mode, shape)
            for index, row in enumerate(group):
                yield _cells([shape if index == 0 else "", *_row(row, group, names, extra)])
        yield ""
        yield from _notes(rows)
    if (image := f"speedup-{op}.png") in plots:
        yield f"![Speed-up of {op}]({image})"
        yield ""


def _row(row: Row, group: list[Row], names: list[str], extra: list[str]) -> list[str]:
    label = f"**{row['impl']}**" if row["kind"] == OURS else row["impl"]
    if "median_s" not in row:
        return [label, row["status"], *["-"] * (len(extra) + len(names) + 3)]
    by_name = {r["impl"]: r for r in group}
    ratios = [
        ratio(results.speedup(row, by_name[n])) if row["kind"] == OURS and n in by_name else "-"
        for n in names
    ]
    more = {
        "graph": seconds(row["graph_s"]) if "graph_s" in row else "-",
        "peak memory": f"{row.get('peak_bytes', 0) / 2**20:.1f} MiB",
    }
    rates = [rate(row["gb_per_s"]), rate(row["gflop_per_s"])]
    share = f"{percent(row['share'])} of {row['ceiling']}"
    return [label, seconds(row["median_s"]), *(more[e] for e in extra), *ratios, *rates, share]


def _notes(rows: list[Row]) -> Iterator[str]:
    """Why rows have no time, and what was checked at another size; each reason once."""
    reasons: dict[str, list[str]] = {}
    for row in rows:
        where = f"{row['impl']} at {row['shape']}"
        if row["status"] != "ok":
            reasons.setdefault(f"{row['status']}: {row['reason']}", []).append(where)
        elif "checked_at" in row:
            reasons.setdefault(f"checked at {row['checked_at']}", []).append(where)
        if "graph" in row:
            reasons.setdefault(row["graph"], []).append(where)
    for reason, places in reasons.items():
        yield f"- {', '.join(places)}: {reason}"
    if reasons:
        yield ""


def _text(text: dict[str, Any], plots: list[str]) -> Iterator[str]:
    plan = text["plan"]
    yield "## Training on real text"
    yield ""
    yield (
        f"A byte-level causal transformer (width {plan['dim']}, {plan['layers']} layers, "
        f"{plan['experts']} experts of width {plan['hidden']}, top {plan['top_k']}) trained on the "
        "Python standard library's source: "
        f"{text['files']} files, {text['train_bytes'] / 1e6:.1f} MB to train on, every tenth file "
        f"held out, {text['validation_bytes']} of its bytes validated. {text['steps']} steps of "
        f"{plan['batch']} x {plan['context']} bytes; all variants see the same bytes in the same "
        "order from the same seed. The first mixture has a plain router in every one, since "
        "adaptive clustering needs the routing of a previous one. Where experts are merged, they "
        f"are {plan['experts'] - 1} and a base, in causal segments of {plan['segment']} tokens of "
        "which the first has uniform gates. Swapped words: a fifth of the "
        "words in the validation text is replaced by as many letters A, and the bytes of the "
        "others are counted."
    )
    yield ""
    yield (
        "| variant | parameters | seed | validation bits per byte | standard error "
        "| swapped words | error |"
    )
    yield "|---|---|---|---|---|---|---|"
    for run in text["runs"]:
        bits = (run[key] for key in ("final", "final_error", "swapped", "swapped_error"))
        label = text["labels"][run["variant"]]
        size = f"{text['parameters'][run['variant']] / 1e6:.2f} M"
        yield _cells([label, size, str(run["seed"]), *(f"{value:.4f}" for value in bits)])
    yield ""
    for line in verdict(text):
        yield f"- {line}"
    yield ""
    if "text-curves.png" in plots:
        yield "![Validation bits per byte by step](text-curves.png)"
        yield ""
    yield "One training step (forward, backward, optimiser), the implementations measured in turn:"
    yield ""
    yield "| variant | implementation of the mixtures | time | speed-up against published |"
    yield "|---|---|---|---|"
    published = {t["variant"]: t for t in text["step_times"] if t["impl"] == "published"}
    for entry in text["step_times"]:
        base = published.get(entry["variant"], {})
        took = seconds(entry["median_s"]) if "median_s" in entry else entry["reason"]
        gain = results.speedup(entry, base) if entry["impl"] != "published" else None
        yield _cells([text["labels"][entry["variant"]], entry["impl"], took, ratio(gain)])
    yield ""
    if "text-steps.png" in plots:
        yield "![Step times](text-steps.png)"
        yield ""


def _images(found: dict[str, Any], plots: list[str]) -> Iterator[str]:
    plan = found["plan"]
    yield "## Training on real images"
    yield ""
    yield (
        f"A vision transformer (width {plan['dim']}, {plan['layers']} layers, {plan['heads']} "
        f"heads, patches of {plan['patch']} x {plan['patch']}) on scikit-learn's 8 x 8 digits: "
        f"{found['train']} to train on, {found['test']} held out, {found['steps']} steps of "
        f"{plan['batch']}; all variants see the same batches from the same seeds. Accuracy in "
        "percent with its standard error between seeds: clean, with Gaussian noise of 0.3 of the "
        "range, with a 4 x 4 square blanked, and after one FGSM step of 0.1 against the model "
        "itself. None was trained on corrupted images."
    )
    yield ""
    yield _cells(["attention", *images.TESTS])
    yield f"|{'---|' * (1 + len(images.TESTS))}"
    for label, accuracies in images.summary(found):
        shown = (f"{100 * mean:.1f} +- {100 * error:.1f}" for mean, error in accuracies.values())
        yield _cells([label, *shown])
    yield ""
    for line in images.verdict(found):
        yield f"- {line}"
    yield ""
    if "images.png" in plots:
        yield "![Accuracy by attention](images.png)"
        yield ""


def _finetune(found: dict[str, Any]) -> Iterator[str]:
    plan = found["plan"]
    yield "## Fine-tuning a pretrained encoder"
    yield ""
    yield (
        "all-MiniLM-L6-v2, a six-layer BERT of width 384, learns which package of the Python "
        f"standard library a docstring comes from ({', '.join(found['packages'])}): "
        f"{found['train']} to train on, {found['test']} held out, {found['steps']} steps of "
        f"{plan['batch']} x {plan['length']} tokens. Trained are adapters of rank "
        f"{plan['rank']} on queries and values, the head and, with MoLEx, the gate; the mixture "
        f"is fixed at {plan['mixing'][0]} and {plan['mixing'][1]}."
    )
    yield ""
    for line in finetune.verdict(found):
        yield f"- {line}"
    yield ""


def _cells(values: list[str]) -> str:
    return f"| {' | '.join(values)} |"
