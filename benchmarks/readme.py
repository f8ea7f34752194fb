"""`python -m benchmarks.readme`: writes what was measured into README.md, from the stored runs.

Of each machine in benchmarks/results the latest run counts. Its whole report and its images go
beside it, as README.md and SVG; the README of the project gets the tables between two markers.
Nothing of it is written by hand.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import goals, markdown, plots
from benchmarks.end_to_end import finetune, images
from benchmarks.end_to_end.verdict import verdict
from benchmarks.formats import image
from benchmarks.results import Results

ROOT = Path(__file__).parents[1]
STORED = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- measured: written by `python -m benchmarks.readme` -->"
END = "<!-- measured: end -->"
SHOWN = (
    ("overview", "Speed-up against each baseline"),
    ("time-tokens", "Time over tokens"),
    ("memory", "Memory over size"),
)


def latest(stored: Path = STORED) -> list[tuple[Path, Results]]:
    """The latest run of each machine, GPUs first."""
    found = []
    for machine in sorted(p for p in stored.glob("*") if p.is_dir()):
        runs = [(path, json.loads(path.read_text())) for path in machine.glob("*.json")]
        if runs:
            found.append(max(runs, key=lambda run: run[1]["environment"]["date"]))
    return sorted(found, key=lambda run: run[1]["environment"]["device"] == "cpu")


def section(runs: list[tuple[Path, Results]], root: Path = ROOT) -> str:
    """What stands between the markers."""
    lines = [line for path, found in runs for line in _machine(path, found, root)]
    lines = lines or ["No run is stored.", ""]
    if not any(found["environment"]["device"] == "cuda" for _, found in runs):
        count = len({goal.subject for goal in goals.GOALS if goal.device == "cuda"})
        unmeasured = f"No run on a GPU is stored: the goals for {count} things there"
        lines += [f"{unmeasured} ([goals.py](benchmarks/goals.py)) are not measured.", ""]
    return "\n".join(lines)


def report(path: Path, found: Results) -> str:
    """The whole report of a stored run, with the images that lie beside it."""
    return markdown.report(found, _images(path))


def replaced(text: str, part: str) -> str:
    """The text with this between the markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{part}\n{END}{after}"


def _images(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.glob("*.svg"))


def _machine(path: Path, found: Results, root: Path) -> Iterator[str]:
    facts = found["environment"]
    where = path.parent.relative_to(root).as_posix()
    cores = "" if facts["device"] == "cuda" else f", {facts['cores']} cores"
    dtypes = ", ".join(found["ceilings"])
    yield f"### {facts['chip']}{cores}, {dtypes}"
    yield ""
    yield (
        f"`--preset {found['preset']}` on {facts['date'][:10]} at commit {facts['commit']}, torch "
        f"{facts['torch']}, Triton {facts['triton']}: the [whole report]({where}/README.md) and "
        f"its [data]({where}/{path.name}). Above 1x ours is faster: geometric means over the "
        "shapes of the run, measured side by side."
    )
    yield ""
    yield from markdown.summary(found)
    pictures = _images(path)
    for name, title in SHOWN:
        yield from image(title, name, pictures, f"{where}/")
    standings = goals.standings(found)
    if standings:
        met = sum(standing.status == goals.MET for standing in standings)
        yield f"Goals, {met} of {len(standings)} met:"
        yield ""
        yield from markdown.goals_table(found)
    if found["text"]:
        yield "Training on text, one step after the other on the same bytes:"
        yield ""
        yield from (f"- {line}" for line in verdict(found["text"]))
        yield ""
    if found["images"]:
        yield "Training on images:"
        yield ""
        yield from (f"- {line}" for line in images.verdict(found["images"]))
        yield ""
    if found["finetune"]:
        yield "Fine-tuning a pretrained encoder:"
        yield ""
        yield from (f"- {line}" for line in finetune.verdict(found["finetune"]))
        yield ""


def main() -> None:
    """Writes everything."""
    runs = latest()
    for path, found in runs:
        for old in path.parent.glob("*.svg"):
            old.unlink()
        plots.draw_whole(found, path.parent, "svg")
        (path.parent / "README.md").write_text(report(path, found))
    README.write_text(replaced(README.read_text(), section(runs)))


if __name__ == "__main__":
    main()
