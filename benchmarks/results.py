"""The results of a run of the ops, and how they are asked for."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.measure import SKIPPED
from benchmarks.rows import BASELINE, BASELINES, OURS, PROXY
from benchmarks.spread import Ratio

COLUMNS = (
    "op", "sweep", "shape", "dtype", "device", "mode", "impl", "kind", "status", "median_s",
    "min_s", "q1_s", "q3_s", "rounds", "graph_s", "launches", "waits", "peak_bytes", "saved_bytes",
    "bytes", "flops", "gb_per_s", "gflop_per_s", "ceiling", "share", "error", "sdpa", "checked",
    "graph", "reason",
)  # fmt: skip

Row = dict[str, Any]
Results = dict[str, Any]


def read(file: Path) -> Results:
    """One dictionary of the rows that a run wrote: environment, preset, ceilings, rows, sweeps."""
    head, every = record.read(file)
    return {
        **head,
        "rows": [row for row in every if not row["sweep"]],
        "sweeps": [row for row in every if row["sweep"]],
    }


def completed(latest: Results, earlier: Results) -> Results:
    """The latest run, with what it had no time for as an earlier run of its day measured it."""
    days = {run["environment"]["date"][:10] for run in (latest, earlier)}
    if len(days) > 1 or latest["preset"] != earlier["preset"]:
        return latest
    found = {**latest}
    added = False
    for kind in ("rows", "sweeps"):
        reached = {_place(row) for row in latest[kind] if row["status"] != SKIPPED}
        more = {_place(row) for row in earlier[kind] if row["status"] != SKIPPED} - reached
        kept = [row for row in latest[kind] if _place(row) not in more]
        found[kind] = kept + [row for row in earlier[kind] if _place(row) in more]
        added = added or bool(more)
    if added:
        other = {k: v for k, v in earlier["ceilings"].items() if k not in latest["ceilings"]}
        found["ceilings"] = {**latest["ceilings"], **other}
        commits = (run["environment"]["commit"] for run in (earlier, latest))
        found["environment"] = {**latest["environment"], "commit": " and ".join(commits)}
    return found


def _place(row: Row) -> tuple[str, ...]:
    """What is measured side by side."""
    return row["op"], row["shape"], row["dtype"], row["mode"], row["sweep"]


def table(results: Results, file: Path) -> None:
    """Writes all rows as CSV."""
    with file.open("w", newline="") as target:
        writer = csv.DictWriter(target, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(results["rows"] + results["sweeps"])


def ops(results: Results) -> list[str]:
    """The ops with rows, in the order in which they were measured."""
    return list(dict.fromkeys(row["op"] for row in results["rows"]))


def shapes(results: Results, op: str, mode: str) -> list[str]:
    """The shapes of an op in one mode, as `shape/dtype`."""
    chosen = (r for r in results["rows"] if r["op"] == op and r["mode"] == mode)
    return list(dict.fromkeys(f"{r['shape']}/{r['dtype']}" for r in chosen))


def members(results: Results, op: str, mode: str, shape: str) -> list[Row]:
    """The rows side by side: ours first, the baselines in their fixed order, the proxies."""
    rows = [
        r
        for r in results["rows"]
        if (r["op"], r["mode"], f"{r['shape']}/{r['dtype']}") == (op, mode, shape)
    ]
    place = {name: index for index, name in enumerate(BASELINES)}
    kinds = (OURS, BASELINE, PROXY)
    return sorted(rows, key=lambda r: (kinds.index(r["kind"]), place.get(r["impl"], len(place))))


def baselines(rows: list[Row]) -> list[str]:
    """Every baseline that has a time, the named four first."""
    found = {r["impl"] for r in rows if r["kind"] == BASELINE and "median_s" in r}
    return [*(b for b in BASELINES if b in found), *sorted(found.difference(BASELINES))]


def speedup(ours: Row, other: str) -> Ratio | None:
    """How many times longer the row named `other` takes than `ours`, measured side by side."""
    found = ours.get("versus", {}).get(other)
    return Ratio(*found) if found else None


def gains(rows: list[Row]) -> dict[str, float]:
    """How many times longer each baseline of a shape takes than the fastest of ours."""
    ours = best(rows)
    found = {r["impl"]: speedup(ours, r["impl"]) for r in rows if r["kind"] == BASELINE and ours}
    return {name: gain.median for name, gain in found.items() if gain}


def attentions(results: Results) -> dict[str, str]:
    """The backends of `F.scaled_dot_product_attention` that were taken, by "<op> (<row>, ...)"."""
    taken: dict[tuple[str, str], dict[str, None]] = {}
    for row in results["rows"]:
        if backend := row.get("sdpa"):
            taken.setdefault((row["op"], backend), {})[row["impl"]] = None
    return {f"{op} ({', '.join(rows)})": backend for (op, backend), rows in taken.items()}


def graph_gains(rows: list[Row]) -> dict[str, float]:
    """The same of what has been timed as a CUDA graph."""
    ours = [r["graph_s"] for r in rows if r["kind"] == OURS and "graph_s" in r]
    others = {r["impl"]: r["graph_s"] for r in rows if r["kind"] == BASELINE and "graph_s" in r}
    return {name: seconds / min(ours) for name, seconds in others.items()} if ours else {}


def measured(results: Results) -> bool:
    """Whether any row has a time."""
    return any("median_s" in row for row in results["rows"] + results["sweeps"])


def skips(results: Results) -> str:
    """ "379 of 458 rows skipped: 300 for time, ...": a line, or nothing if none was skipped."""
    every = results["rows"] + results["sweeps"]
    reasons = Counter(_why(row["reason"]) for row in every if row["status"] == "skipped")
    if not reasons:
        return ""
    shown = ", ".join(f"{count} {why}" for why, count in reasons.most_common())
    return f"{reasons.total()} of {len(every)} rows skipped ({shown}); listed in results.csv"


def _why(reason: str) -> str:
    if " time is spent" in reason or " was reached" in reason or "told to end" in reason:
        return "for time"
    if reason.startswith(("too large", "would take", "out of memory")):
        return "too large"
    return "not possible"


def best(rows: list[Row]) -> Row | None:
    """The fastest of our implementations, if any has a time."""
    timed = [r for r in rows if r["kind"] == OURS and "median_s" in r]
    return min(timed, key=lambda r: r["median_s"]) if timed else None
