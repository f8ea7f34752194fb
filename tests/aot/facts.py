"""The figures in the repository, and what is worse than they say.

`tests/aot_facts.json` has them by Triton release, chip and key (kernel, dtype, tile and launch
options); `make aot-facts` writes it, and its diff is what a change does to the machine code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aot.launches import Launch

FILE = Path(__file__).parents[1] / "aot_facts.json"
_MORE_IS_BETTER = ("blocks",)

Figures = dict[str, Any]


def key_of(launch: Launch) -> str:
    """As it stands in the file."""
    tile = [
        f"{name}={value}" for name, value in (*launch.tile, *launch.options) if value is not True
    ]
    return " ".join([launch.kernel, launch.dtype, *tile])


def read(minor: str) -> dict[str, Any]:
    """What the file has for this release of Triton; empty where that was never recorded."""
    return json.loads(FILE.read_text()).get(minor, {})


def write(minor: str, recorded: dict[str, Any]) -> None:
    """Replaces what the file has for this release: a line for each key."""
    everything = json.loads(FILE.read_text()) if FILE.exists() else {}
    everything[minor] = recorded
    releases = []
    for release, parts in sorted(everything.items()):
        sections = []
        for name, entries in parts.items():
            lines = [f"   {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(entries.items())]
            sections.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n  }")
        releases.append(f" {json.dumps(release)}: {{\n" + ",\n".join(sections) + "\n }")
    FILE.write_text("{\n" + ",\n".join(releases) + "\n}\n")


def worse(recorded: dict[str, Figures], found: dict[str, Figures]) -> list[str]:
    """What is worse than recorded, what has no record, and what is recorded and was not found."""
    problems = [f"{key}: is in the file, and no longer launched" for key in recorded.keys() - found]
    for key, figures in found.items():
        if key not in recorded:
            problems.append(f"{key}: is not in the file")
            continue
        for name in figures.keys() | recorded[key]:
            before, after = recorded[key].get(name, 0), figures.get(name, 0)
            if _is_worse(name, before, after):
                problems.append(f"{key}: {name} was {before}, is {after}")
    return sorted(problems)


def _is_worse(name: str, before: Any, after: Any) -> bool:
    if name == "product":
        return _size(after) < _size(before)
    return after < before if name in _MORE_IS_BETTER else after > before


def _size(product: Any) -> tuple[bool, int]:
    """Orders tensor-core instructions: wgmma above mma, wide above narrow."""
    kind, _, shape = str(product or "").partition(" ")
    return kind == "wgmma", int(shape.split("x")[1]) if "x" in shape else int(shape or 0)
