"""The Python standard library's own source: real text that every machine has.

It is folded to 30 characters, so that small models learn it in few steps: letters are lowered,
digits are 0, and whatever is no letter, digit, space or line's end is a dot.
"""

from __future__ import annotations

import random
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SWAPPED = 0.2  # share of the words that contamination replaces
EVERY = (
    10  # every tenth file, in the sorted order, is for the test, and the one amid for validation
)
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """Training characters [n], and windows [w, context + 1] held out; uint8 on the CPU."""

    train: Tensor
    validation: Tensor
    test: Tensor
    files: int

    def batch(self, size: int, context: int, generator: torch.Generator) -> Tensor:
        """Random windows [size, context + 1], int64."""
        starts = torch.randint(len(self.train) - context, (size, 1), generator=generator)
        return self.train[starts + torch.arange(context + 1)].long()


def load(context: int, held_out: int) -> Text:
    """The text, split by file. The test has `held_out` characters, validation half of that."""
    root = Path(sysconfig.get_paths()["stdlib"])
    inside = ((p.relative_to(root).as_posix(), p) for p in root.rglob("*.py"))
    files = [p for name, p in sorted(inside) if not LEFT_OUT.intersection(Path(name).parts)]
    if len(files) < 2 * EVERY:
        raise FileNotFoundError(f"{root} holds {len(files)} *.py files: too few to train on")
    train = _join([p for i, p in enumerate(files) if i % (EVERY // 2)])
    test = _windows(files[::EVERY], context, held_out)
    validation = _windows(files[EVERY // 2 :: EVERY], context, held_out // 2)
    return Text(train, validation, test, len(files))


def contaminate(windows: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Replaces words (runs of three or more letters) at random by as many letters a.

    The paper's attack replaces words by a generic one; here the length is kept, so that every other
    byte stays where it was. Returns the windows, and which bytes were left as they are.
    """
    chosen = random.Random(seed)
    swapped = windows.clone()
    for row in swapped:
        text = bytes(row.tolist())
        for word in re.finditer(rb"[a-z]{3,}", text):
            if chosen.random() < SWAPPED:
                row[word.start() : word.end()] = ord("a")
    return swapped, swapped == windows


def _windows(files: list[Path], context: int, size: int) -> Tensor:
    """Windows [w, context + 1] of about so many characters, spread evenly over the files."""
    text = _join(files)
    count = min(max(size // context, 1), (len(text) - 1) // context)
    starts = torch.linspace(0, len(text) - context - 1, count).long()
    return text[starts[:, None] + torch.arange(context + 1)]


def _join(files: list[Path]) -> Tensor:
    text = b"".join(p.read_bytes() for p in files).lower()
    folded = re.sub(rb"[^a-z0 \n]", b".", re.sub(rb"[0-9]", b"0", text))
    return torch.frombuffer(bytearray(folded), dtype=torch.uint8)
