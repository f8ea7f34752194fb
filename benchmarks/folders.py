"""Where runs are written and kept, and the options that say so.

A report goes to benchmarks/reports, which git ignores; the data of a run that is to be kept to
benchmarks/results/<machine>/<kind>-<date>-<commit>.json, whose kinds are "ops",
"training" and "models".
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from benchmarks import environment, presets

REPORTS = Path(__file__).parent / "reports"
STORED = Path(__file__).parent / "results"
LATEST = REPORTS / "latest"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of every run."""
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="quick")
    add_device(parser)
    parser.add_argument("--out", type=Path, help="report folder; default: benchmarks/reports/...")
    add_save_results(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    """`--device`."""
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")


def add_save_results(parser: argparse.ArgumentParser) -> None:
    """`--save-results`."""
    parser.add_argument(
        "--save-results",
        nargs="?",
        type=Path,
        const=STORED,
        metavar="FOLDER",
        help="keep the data in FOLDER/<machine>/; default: benchmarks/results",
    )


def for_report(found: dict[str, Any], out: Path | None) -> Path:
    """The folder; without `out` it is reports/<date>-<commit>, with `latest` pointing to it."""
    folder = out or REPORTS / environment.run_slug(found["environment"])
    folder.mkdir(parents=True, exist_ok=True)
    if out is None:
        _point_latest(folder)
    return folder


def dump(found: dict[str, Any]) -> str:
    """JSON with a line for each entry of a list, so that a diff shows what changed."""
    parts = []
    for name, value in found.items():
        if isinstance(value, list):
            lines = ",\n".join(f"  {json.dumps(entry)}" for entry in value)
            parts.append(f" {json.dumps(name)}: [\n{lines}\n ]" if value else f' "{name}": []')
        else:
            parts.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def store(found: dict[str, Any], into: Path = STORED, kind: str = "ops") -> Path:
    """Writes the data of a run that is to be kept."""
    facts = found["environment"]
    folder = into / environment.machine_slug(facts)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{kind}-{environment.run_slug(facts)}.json"
    target.write_text(dump(found))
    return target


def machines(stored: Path = STORED) -> list[Path]:
    """The folder of each machine."""
    return sorted(path for path in stored.glob("*") if path.is_dir())


def latest(
    facts: dict[str, Any], *, stored: Path | None = None, but: Path | None = None
) -> Path | None:
    """The latest stored run of the ops on this machine."""
    folder = (stored or STORED) / environment.machine_slug(facts)
    return latest_in(folder, but=but)


def latest_in(folder: Path, kind: str = "ops", but: Path | None = None) -> Path | None:
    """The latest stored run of a kind in a machine's folder."""
    runs = [p for p in by_date(folder, kind) if but is None or p.resolve() != but.resolve()]
    return runs[0] if runs else None


def by_date(folder: Path, kind: str = "ops") -> list[Path]:
    """The stored runs of a kind in a machine's folder, the latest first."""
    runs = {
        p: json.loads(p.read_text())["environment"]["date"] for p in folder.glob(f"{kind}-*.json")
    }
    return sorted(runs, key=lambda p: runs[p], reverse=True)


def _point_latest(folder: Path) -> None:
    if LATEST.is_symlink() or LATEST.is_file():
        LATEST.unlink()
    elif LATEST.is_dir():
        shutil.rmtree(LATEST)
    try:
        LATEST.symlink_to(folder.name, target_is_directory=True)
    except OSError:
        shutil.copytree(folder, LATEST)
