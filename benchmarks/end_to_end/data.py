"""Bytes of the Python standard library's own source: real text that every machine has."""

from __future__ import annotations

import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SWAPPED = 0.2  # share of the words that contamination replaces
VALIDATION_EVERY = 10  # every tenth file, in the sorted order, is held out
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Training bytes [n] and validation windows [w, context + 1], both uint8 on the CPU."""

    train: Tensor
    validation: Tensor
    files: int
    held_out_files: int
    held_out_bytes: int

    def batch(self, size: int, context: int, generator: torch.Generator) -> Tensor:
        """Random windows [size, context + 1], int64."""
        starts = torch.randint(len(self.train) - context, (size, 1), generator=generator)
        return self.train[starts + torch.arange(context + 1)].long()


def load(context: int, validation_bytes: int) -> Text:
    """The text, split by file; the windows are spread evenly over all held-out files."""
    root = Path(sysconfig.get_paths()["stdlib"])
    inside = ((p.relative_to(root).as_posix(), p) for p in root.rglob("*.py"))
    files = [p for name, p in sorted(inside) if not LEFT_OUT.intersection(Path(name).parts)]
    if len(files) < 2 * VALIDATION_EVERY:
        raise FileNotFoundError(f"{root} holds {len(files)} *.py files: too few to train on")
    held_out = files[::VALIDATION_EVERY]
    train = _join([p for i, p in enumerate(files) if i % VALIDATION_EVERY])
    validation = _join(held_out)
    count = min(max(validation_bytes // context, 1), (len(validation) - 1) // context)
    starts = torch.linspace(0, len(validation) - context - 1, count).long()
    windows = validation[starts[:, None] + torch.arange(context + 1)]
    return Text(train, windows, len(files), len(held_out), len(validation))


def contaminate(windows: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Replaces words (runs of three or more letters) at random by as many letters A.

    The paper's attack replaces words by a generic one; here the length is kept, so that every other
    byte stays where it was. Returns the windows, and which bytes were left as they are.
    """
    chosen = random.Random(seed)
    swapped = windows.clone()
    for row in swapped:
        text = bytes(row.tolist())
        for word in re.finditer(rb"[A-Za-z]{3,}", text):
            if chosen.random() < SWAPPED:
                row[word.start() : word.end()] = ord("A")
    return swapped, swapped == windows


def _join(files: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(p.read_bytes() for p in files)), dtype=torch.uint8)
