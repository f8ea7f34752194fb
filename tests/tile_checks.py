"""Runs the checks of one op on matrix tiles and prints what came out, for test_cpu_tiles.py."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Mapping

import torch

from molex_kernels import _extension


def main(checks: Mapping[str, Callable[[], None]], digest: Callable[[], str]) -> None:
    """Prints a JSON object: which tiles ran, a digest of results, and what failed, by check."""
    assert _extension.why_not() is None  # loads it: an operator called by itself does not
    torch.set_num_threads(1)
    failed: dict[str, str | None] = {}
    for name, check in checks.items():
        try:
            check()
            failed[name] = None
        except Exception:
            failed[name] = traceback.format_exc()
    tiles = _extension.build_facts()["tiles"]
    print(json.dumps({"tiles": tiles, "digest": digest(), "failed": failed}))
