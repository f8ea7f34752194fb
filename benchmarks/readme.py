"""`python -m benchmarks.readme`: writes what was measured into the pages, from the stored runs.

Of each machine in benchmarks/results the latest run counts, and those of the same day for what it
had no time for. One table and the overview go beside its data; docs/benchmarks.md gets a short
table of each machine between two markers, the project's README one picture. Nothing of it is
written by hand, and every other image is drawn from the data by `python -m benchmarks.report`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from benchmarks import folders, markdown, models, plots, results
from benchmarks.end_to_end import markdown as training
from benchmarks.results import Results

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs" / "benchmarks.md"
BEGIN = "<!-- measured: written by `python -m benchmarks.readme` -->"
END = "<!-- measured: end -->"
OVERVIEW = "overview.svg"


def latest(stored: Path = folders.STORED) -> list[tuple[Path, Results]]:
    """The latest run of the ops on each machine, completed by those of its day.

    GPUs first, the one with most ops before the others.
    """
    found = []
    for machine in folders.machines(stored):
        if paths := folders.by_date(machine):
            run, *earlier = (json.loads(path.read_text()) for path in paths)
            found.append((paths[0], functools.reduce(results.completed, earlier, run)))
    return sorted(found, key=lambda run: (run[1]["environment"]["device"] == "cpu", -_ops(run[1])))


def _ops(found: Results) -> int:
    """How many ops the run has times of."""
    return len({row["op"] for row in found["rows"] if row["status"] == "ok"})


def picture(runs: list[tuple[Path, Results]], folder: Path = ROOT) -> str:
    """What stands between README's markers: the first machine's picture, and where all are."""
    lines = []
    for path, found in runs[:1]:
        facts = found["environment"]
        image = _relative(path.parent / OVERVIEW, folder)
        lines += [
            f"![{facts['chip']}: speed-up against each baseline]({image})",
            "",
            f"{facts['chip']}, {_origin(found)}",
        ]
    page = _relative(DOCS, ROOT)
    links = [f"[{name}]({page}#{_anchor(name)})" for name in (_name(found) for _, found in runs)]
    lines += [f"Every op on every machine, slower cases included: {', '.join(links)}.", ""]
    return "\n".join(lines) if runs else "No run is stored.\n"


def section(runs: list[tuple[Path, Results]], folder: Path = DOCS.parent) -> str:
    """What stands between the markers of a page in this folder."""
    lines = [line for path, found in runs for line in _machine(path, found, folder)]
    lines = lines or ["No run is stored.", ""]
    if not any(found["environment"]["device"] == "cuda" for _, found in runs):
        lines += ["No run on a GPU is stored.", ""]
    return "\n".join(lines)


def page(path: Path, found: Results) -> str:
    """The page of a machine: its run's summary, what its models learned, and whole models."""
    facts = found["environment"]
    lines = [
        f"# {facts['chip']}",
        "",
        f"{_origin(found)} The data: [{path.name}]({path.name}). "
        f"`python -m benchmarks.report {path.relative_to(ROOT).as_posix()}` draws the whole report "
        "with times, memory, growth and images. Times as fast as each baseline, geometric means "
        "over the shapes, which were measured side by side.",
        "",
        *markdown.summary(found),
    ]
    if trained := folders.latest_in(path.parent, "training"):
        lines += [*training.verdicts(json.loads(trained.read_text()), trained.name), ""]
    if whole := folders.latest_in(path.parent, "models"):
        lines += models.lines(json.loads(whole.read_text()), whole.name)
    return "\n".join(lines).rstrip("\n") + "\n"


def replaced(text: str, part: str) -> str:
    """The text with this between the markers."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{part}\n{END}{after}"


def _origin(found: Results) -> str:
    facts = found["environment"]
    word = "commits" if " and " in facts["commit"] else "commit"
    return (
        f"`--preset {found['preset']}` on {facts['date'][:10]} at {word} {facts['commit']}, torch "
        f"{facts['torch']}, Triton {facts['triton']}."
    )


def _name(found: Results) -> str:
    facts = found["environment"]
    cores = "" if facts["device"] == "cuda" else f", {facts['cores']} cores"
    return f"{facts['chip']}{cores}"


def _anchor(heading: str) -> str:
    """As both a forge and mkdocs name a heading of letters, digits, spaces and commas."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path, folder)).as_posix()


def _machine(path: Path, found: Results, folder: Path) -> Iterator[str]:
    where = _relative(path.parent, folder)
    trained = ", and the training runs" if folders.latest_in(path.parent, "training") else ""
    yield f"### {_name(found)}"
    yield ""
    yield (
        f"{_origin(found)} Times as fast as `published` / as the fastest baseline of each shape: "
        "geometric means over the shapes of the run, measured side by side. Each baseline by "
        f"itself{trained}: "
        f"[benchmarks/results/{path.parent.name}]({where}/README.md)."
    )
    yield ""
    yield from markdown.brief(found)
    if any("graph_s" in row for row in found["rows"]):
        yield (
            "The same of calls replayed as CUDA graphs, which is the kernels' own time: a short "
            "plain call waits for Python on the host. What cannot be captured, as most `published` "
            "code that reads sizes from the device, is left out."
        )
        yield ""
        yield from markdown.brief(found, graphs=True)
    if (path.parent / OVERVIEW).exists():
        yield f"![Speed-up against each baseline]({where}/{OVERVIEW})"
        yield ""


def main() -> None:
    """Writes everything."""
    runs = latest()
    for path, found in runs:
        plots.overview(found, path.parent / OVERVIEW)
        (path.parent / "README.md").write_text(page(path, found))
    for written, part in ((README, picture(runs)), (DOCS, section(runs))):
        written.write_text(replaced(written.read_text(), part))


if __name__ == "__main__":
    main()
