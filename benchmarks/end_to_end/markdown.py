"""The training runs as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks import results
from benchmarks.end_to_end import finetune, images
from benchmarks.end_to_end.verdict import verdict
from benchmarks.formats import cells, gain, image, seconds


def report(found: dict[str, Any], plots: list[str]) -> str:
    """The whole file; `plots` are the names of the images beside it."""
    facts = found["environment"]
    lines = [
        "# Training runs",
        "",
        f"{facts['chip']}, {facts['date']}, commit {facts['commit']}.",
        "",
    ]
    if text := found.get("text"):
        lines += _text(text, plots)
    if digits := found.get("images"):
        lines += _images(digits, plots)
    if tuned := found.get("finetune"):
        lines += _finetune(tuned)
    return "\n".join(lines)


def verdicts(found: dict[str, Any], name: str) -> Iterator[str]:
    """What came out, a line each; `name` is the file with the data."""
    facts = found["environment"]
    yield "## Training runs"
    yield ""
    yield f"On {facts['date'][:10]} at commit {facts['commit']}: [{name}]({name})."
    for title, key, lines in (
        ("Text, one step after the other on the same bytes", "text", verdict),
        ("Images", "images", images.verdict),
        ("Fine-tuning a pretrained encoder", "finetune", finetune.verdict),
    ):
        if part := found.get(key):
            yield ""
            yield f"{title}:"
            yield ""
            yield from (f"- {line}" for line in lines(part))


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
        yield cells([label, size, str(run["seed"]), *(f"{value:.4f}" for value in bits)])
    yield ""
    for line in verdict(text):
        yield f"- {line}"
    yield ""
    yield from image("Validation bits per byte by step", "text-curves", plots)
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
    yield cells(["attention", *images.TESTS])
    yield f"|{'---|' * (1 + len(images.TESTS))}"
    for label, accuracies in images.summary(found):
        shown = (f"{100 * mean:.1f} +- {100 * error:.1f}" for mean, error in accuracies.values())
        yield cells([label, *shown])
    yield ""
    for line in images.verdict(found):
        yield f"- {line}"
    yield ""
    yield from image("Accuracy by attention", "images", plots)


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
