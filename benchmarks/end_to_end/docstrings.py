"""Docstrings of the Python standard library, and the package that each comes from."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
SHORTEST = 40  # characters: less says too little


@dataclass(frozen=True)
class Docstrings:
    """Texts with the number of their package, shuffled and split."""

    packages: tuple[str, ...]
    train: list[tuple[str, int]]
    validation: list[tuple[str, int]]
    test: list[tuple[str, int]]


def load(num_packages: int, per_package: int) -> Docstrings:
    """As many of each of the packages that have the most; a fifth validates, a fifth tests."""
    found: dict[str, list[str]] = {}
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if len(parts) < 2 or LEFT_OUT.intersection(parts):
            continue
        found.setdefault(parts[0], []).extend(_of(path))
    counts = Counter({name: len(set(texts)) for name, texts in found.items()})
    packages = tuple(sorted(name for name, _ in counts.most_common(num_packages)))
    train, validation, test = [], [], []
    for label, name in enumerate(packages):
        texts = sorted(set(found[name]))
        random.Random(label).shuffle(texts)
        chosen = [(text, label) for text in texts[:per_package]]
        cut = len(chosen) // 5
        test += chosen[:cut]
        validation += chosen[cut : 2 * cut]
        train += chosen[2 * cut :]
    random.Random(0).shuffle(train)
    return Docstrings(packages, train, validation, test)


def _of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text())
    except (SyntaxError, UnicodeDecodeError):
        return []
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    texts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    return [text for text in texts if text and len(text) >= SHORTEST]
