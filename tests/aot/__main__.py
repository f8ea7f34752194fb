"""`python -m aot`: compiles everything and prints what was found, as JSON; `--write` keeps it.

The repository and its tests are on PYTHONPATH (see `make aot-facts`). A process for each core
compiles. MOLEX_AOT_TARGETS and MOLEX_AOT_DTYPES, lists with commas, leave the others out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Sequence
from typing import Any

import torch
from triton import knobs

from aot import addresses, compiler, facts, launches, machine_code

DTYPES = ("bfloat16", "float16", "float32")
# For this chip all dtypes are compiled, and tables of all lengths; for the others bfloat16 alone.
FIRST = "sm_90"

Task = tuple[str, launches.Launch]
_tasks: list[Task] = []  # a forked worker finds its task here: launches hold what cannot be sent


def _chosen(variable: str, all_: tuple[str, ...]) -> list[str]:
    names = [name for name in os.environ.get(variable, "").split(",") if name] or list(all_)
    if unknown := set(names) - set(all_):
        sys.exit(f"{variable}: expected some of {', '.join(all_)}, got {', '.join(unknown)}")
    return names


def _do(place: int) -> tuple[int, Any, str]:
    """A task's figures, or what went wrong with it."""
    what, launch = _tasks[place]
    try:
        if what == "code":
            compiler.front_end(launch, compiler.TARGETS[FIRST])
            return place, None, ""
        if what == "addresses":
            ir = compiler.front_end(launch, compiler.TARGETS[FIRST])
            found = addresses.narrow_products(ir, launch)
            return place, None, f"int32 products with a stride: {found}" if found else ""
        binary = compiler.compile_launch(launch, compiler.TARGETS[what])
        warps = dict(launch.options)["num_warps"]
        return place, machine_code.figures(binary, what, warps), ""
    except Exception:
        return place, None, traceback.format_exc(limit=-3)


def run(
    targets: list[str], dtypes: list[str], jobs: int, only: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything that is found: counts by op, figures by chip and key, errors."""
    counts, errors = _gather(targets, tuple(getattr(torch, name) for name in dtypes), only)
    found: dict[str, Any] = {target: {} for target in targets}
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        for place, figures, error in pool.imap_unordered(_do, range(len(_tasks))):
            what, launch = _tasks[place]
            if error:
                errors.add(f"{facts.key_of(launch)}, {what}, without {launch.nones}: {error}")
            elif figures is not None:
                found[what][facts.key_of(launch)] = figures
    return {"counts": counts, "figures": found, "errors": sorted(errors)}


def _gather(
    targets: list[str], dtypes: tuple[torch.dtype, ...], only: Sequence[str]
) -> tuple[Any, set[str]]:
    """Makes the tasks; the numbers of keys by op, and what is wrong with the launches already."""
    ops = {name: op for name, op in launches.load_ops().items() if not only or name in only}
    recordings: dict[str, launches.Recording] = {}
    for name in targets:
        some = dtypes if name == FIRST else (torch.bfloat16,)
        recordings[name] = launches.record(ops, name, compiler.TARGETS[name], some)
        chosen = recordings[name].by_tile(all_lengths=name == FIRST)
        _tasks.extend((name, launch) for launch in chosen)
    errors = {
        f"{launch.kernel} {launch.dtype}: enable_fp_fusion is not stated"
        for recording in recordings.values()
        for launch in recording.ops
        if not dict(launch.options).get("enable_fp_fusion")
    }
    if FIRST not in targets:
        return {}, errors
    first = recordings[FIRST]
    done = {launch.code_key for launch in first.by_tile()}
    _tasks.extend(("code", launch) for launch in first.by_code() if launch.code_key not in done)
    strided = launches.record(
        ops, FIRST, compiler.TARGETS[FIRST], (torch.bfloat16,), is_strided=True
    )
    _tasks.extend(("addresses", launch) for launch in strided.by_code())
    return first.counts(), errors


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m aot", description=__doc__)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--ops", nargs="*", default=(), help="these alone; all without it")
    parser.add_argument("--write", action="store_true", help=f"to {facts.FILE.name}")
    arguments = parser.parse_args()
    knobs.compilation.disable_line_info = True  # faster, and no change in the code
    start = time.monotonic()
    targets = _chosen("MOLEX_AOT_TARGETS", tuple(compiler.TARGETS))
    result = run(targets, _chosen("MOLEX_AOT_DTYPES", DTYPES), arguments.jobs, arguments.ops)
    seconds = time.monotonic() - start
    print(f"{len(_tasks)} compilations in {seconds:.0f} s", file=sys.stderr)
    if arguments.write:
        if arguments.ops:
            sys.exit("--write keeps the figures of all ops, not of some")
        if result["errors"]:
            sys.exit("\n".join(["nothing is written:", *result["errors"]]))
        facts.write(compiler.TRITON_MINOR, {"counts": result["counts"], **result["figures"]})
    print(json.dumps({"triton": compiler.TRITON_MINOR, **result}))


if __name__ == "__main__":
    main()
