"""The training runs as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import results
from benchmarks.end_to_end import finetune
from benchmarks.end_to_end.plots import TITLES
from benchmarks.end_to_end.verdict import verdict
from benchmarks.formats import cells, gain, image, seconds


def report(found: dict[str, Any], plots: list[str]) -> str:
    """The whole file; `plots` are the names of the images beside it."""
    facts = found["environment"]
    origin = f"{facts['chip']}, {facts['date']}, commit {facts['commit']}."
    lines = ["# Training runs", "", origin, ""]
    for key, part in _parts(found):
        lines += [f"## {TITLES[key]}", "", _ABOUT[key](part), "", *_verdict(key, part)]
        lines += image("Validation by step", f"{key}-curves", plots)
        if key == "text":
            lines += _steps(part, plots)
    return "\n".join(lines)


def verdicts(found: dict[str, Any], name: str) -> Iterator[str]:
    """What came out; `name` is the file with the data."""
    facts = found["environment"]
    yield "## Training runs"
    yield ""
    yield (
        f"`--preset {found['preset']}` on {facts['date'][:10]} at commit {facts['commit']}: "
        f"[{name}]({name}). Every setting was chosen on validation data by one seed that is not "
        "in the figures, which are of the test: the baseline's learning rate, used for all, and "
        "each method's one knob. Tiny models show how the methods compare here, and say nothing of "
        "large ones."
    )
    for key, part in _parts(found):
        yield from ("", f"### {TITLES[key]}", "", _ABOUT[key](part), "", *_verdict(key, part)[:-1])


def _parts(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((key, found[key]) for key in TITLES if key in found)


def _verdict(key: str, part: dict[str, Any]) -> list[str]:
    lines = verdict(part)
    return [*lines, "", *([finetune.times(part), ""] if key == "finetune" else [])]


def _text(part: dict[str, Any]) -> str:
    plan = part["plan"]
    return (
        "A causal transformer of "
        f"{part['parameters'][part['base']] / 1e3:.1f} thousand parameters (width {plan['dim']}, "
        f"{plan['layers']} layers, {plan['experts']} experts of width {plan['hidden']}, "
        f"top {plan['top_k']}) on the Python standard library's source, folded to 30 characters: "
        f"{part['train'] / 1e6:.1f} million to train on, {part['validation']} of other files to "
        f"validate, {part['test']} of others to test; steps of {plan['batch']} x "
        f"{plan['context']} characters. The first mixture has a plain router in every model. "
        f"Merged experts are {plan['experts'] - 1} and a base, in causal segments of "
        f"{plan['segment']}. Swapped words: a fifth of the words is replaced by as many letters "
        "a, and the characters of the others count."
    )


def _images(part: dict[str, Any]) -> str:
    plan = part["plan"]
    return (
        f"A vision transformer (width {plan['dim']}, {plan['layers']} layers, {plan['heads']} "
        f"heads) on scikit-learn's 8 x 8 digits: {part['train']} to train on, "
        f"{part['validation']} to validate, {part['test']} to test; steps of {plan['batch']}. "
        "Clean, with Gaussian noise of 0.3 of the range, with a 4 x 4 square blanked, and after "
        "one FGSM step of 0.1 against the model itself; validation is the mean of the four. None "
        "was trained on corrupted images."
    )


def _finetune(part: dict[str, Any]) -> str:
    plan = part["plan"]
    trained = (f"{part['parameters'][name] / 1e3:.1f}" for name in part["labels"])
    return (
        f"The first {plan['layers']} layers of all-MiniLM-L6-v2, a BERT of width 384, learn which "
        f"of {len(part['packages'])} packages of the Python standard library a docstring comes "
        f"from: {part['train']} to train on, {part['validation']} to validate, {part['test']} to "
        f"test; steps of {plan['batch']} x {plan['length']} tokens. Trained are adapters of rank "
        f"{plan['rank']} on queries and values, the head and, with MoLEx, the gate: "
        f"{' and '.join(trained)} thousand parameters."
    )


_ABOUT = {"text": _text, "images": _images, "finetune": _finetune}


def _steps(text: dict[str, Any], plots: list[str]) -> Iterator[str]:
    yield "One training step (forward, backward, optimiser), the implementations measured in turn:"
    yield ""
    yield "| variant | implementation of the mixtures | time | speed-up against published |"
    yield "|---|---|---|---|"
    for entry in text["step_times"]:
        took = seconds(entry["median_s"]) if "median_s" in entry else entry["reason"]
        against = gain(results.speedup(entry, "published"))
        yield cells([text["labels"][entry["variant"]], entry["impl"], took, against])
    yield ""
    yield from image("Step times", "text-steps", plots)
