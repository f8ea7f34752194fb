"""What users hold on to: public names with their signatures, and the cases of the contract.

`python tests/public_surface.py` writes `public_surface.json`; only what is added on purpose may
change it, which the diff shows.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import molex_kernels

INTEGRATIONS = ("transformers", "timm")
FILE = Path(__file__).with_suffix(".json")


def names() -> dict[str, Any]:
    """The signature of each public name; of a class also its public methods' and properties."""
    found = {name: _signatures(getattr(molex_kernels, name)) for name in molex_kernels.__all__}
    for place in (
        "parallel",
        "published",
        *(f"integrations.{library}" for library in INTEGRATIONS),
    ):
        module = importlib.import_module(f"molex_kernels.{place}")
        for name in module.__all__:
            found[f"{place}.{name}"] = _signatures(getattr(module, name))
    return found


def contract() -> dict[str, dict[str, list[str]]]:
    """The ids of the contract's cases by test and op, as they are collected without a GPU."""
    import test_contract

    found: dict[str, dict[str, list[str]]] = {}
    for name, test in vars(test_contract).items():
        for mark in getattr(test, "pytestmark", ()):
            if not name.startswith("test_") or mark.name != "parametrize":
                continue
            by_op: dict[str, list[str]] = defaultdict(list)
            for parameters in mark.args[1]:
                op = parameters.values[0].name
                by_op[op].append(parameters.id.removeprefix(f"{op}-"))
            found[name] = dict(by_op)
    return found


def _signatures(value: Any) -> Any:
    if inspect.isfunction(value):
        return str(inspect.signature(value))
    if not inspect.isclass(value):
        return type(value).__name__
    members = {"()": str(inspect.signature(value))}
    for name in dir(value):
        member = inspect.getattr_static(value, name)
        if name.startswith("_") or not getattr(member, "__module__", "molex").startswith("molex"):
            continue
        if isinstance(member, property):
            members[name] = "property"
        elif isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            members[name] = str(inspect.signature(getattr(value, name)))
    return members


if __name__ == "__main__":
    lists = [
        f'"{test}": {{\n'
        + ",\n".join(f'"{op}": {json.dumps(ids)}' for op, ids in by_op.items())
        + "}"
        for test, by_op in contract().items()
    ]
    public = json.dumps(names(), indent=1)
    FILE.write_text('{"names": ' + public + ',\n"contract": {\n' + ",\n".join(lists) + "}}\n")
