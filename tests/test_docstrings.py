"""A parser of Google-style docstrings finds what every public signature has."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from typing import Any

import pytest

import molex_kernels as mk
from molex_kernels import integrations, parallel, published

docstring_parser = pytest.importorskip("docstring_parser", exc_type=ImportError)


def _public() -> Iterator[tuple[str, Any]]:
    """Functions, classes and the public methods of classes, with their names."""
    for name in mk.__all__:
        value = getattr(mk, name)
        if inspect.isclass(value):
            yield name, value
            yield from ((f"{name}.{method}", member) for method, member in _methods(value))
        elif inspect.isfunction(value):
            yield name, value
    for module in (parallel, published):
        for name in module.__all__:
            yield f"{module.__name__.rpartition('.')[2]}.{name}", getattr(module, name)
    for info in pkgutil.iter_modules(integrations.__path__):
        if info.name.startswith("_"):
            continue  # parts of the others
        module = importlib.import_module(f"{integrations.__name__}.{info.name}")
        for name, value in inspect.getmembers(module, inspect.isfunction):
            is_ours = value.__module__.startswith(integrations.__name__)
            if is_ours and not name.startswith("_"):
                yield f"{info.name}.{name}", value


def _methods(cls: type) -> Iterator[tuple[str, Any]]:
    """What this package wrote, here or in a base; an override may inherit its docstring."""
    for name, member in inspect.getmembers(cls, inspect.isroutine):
        # What `extra_repr` is for stands in the docstring of `nn.Module`.
        if not name.startswith("_") and _is_ours(member) and name != "extra_repr":
            yield name, member


def _is_ours(member: Any) -> bool:
    return (getattr(member, "__module__", None) or "").startswith("molex_kernels")


PUBLIC = dict(_public())


def _parsed(name: str) -> Any:
    text = inspect.getdoc(PUBLIC[name])
    assert text, f"{name} has no docstring"
    return docstring_parser.parse(text, style=docstring_parser.DocstringStyle.GOOGLE)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_parameter_is_described(name: str):
    described = [entry.arg_name.lstrip("*") for entry in _parsed(name).params]
    parameters = inspect.signature(PUBLIC[name]).parameters
    assert described == [p for p in parameters if p != "self"]
    assert all(entry.description for entry in _parsed(name).params)


@pytest.mark.parametrize("name", [n for n, value in PUBLIC.items() if not inspect.isclass(value)])
def test_what_is_returned_is_described(name: str):
    returns = _parsed(name).returns
    if inspect.signature(PUBLIC[name]).return_annotation == "None":
        assert returns is None
    else:
        assert returns is not None
        assert returns.description
        # A parser takes what stands before a colon for the type, which is in the signature.
        assert returns.type_name is None


@pytest.mark.parametrize("name", PUBLIC)
def test_every_error_has_an_entry_of_its_own(name: str):
    parsed = _parsed(name)
    for entry in parsed.raises:
        assert re.fullmatch(r"\w+Error", entry.type_name)
        assert entry.description
        assert not re.search(r"\w+Error: ", entry.description)
    mentioned = set(re.findall(r"\b[A-Z]\w+Error\b", inspect.getdoc(PUBLIC[name]) or ""))
    assert mentioned == {entry.type_name for entry in parsed.raises}


@pytest.mark.parametrize("name", [n for n in mk.__all__ if inspect.isfunction(getattr(mk, n))])
def test_every_function_says_what_it_raises(name: str):
    assert _parsed(name).raises
