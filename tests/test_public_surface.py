"""Nothing that users hold on to is lost: no public name, option, implementation or case."""

from __future__ import annotations

import json

import public_surface
import pytest
from conftest import DEVICE

KEPT = json.loads(public_surface.FILE.read_text())


@pytest.mark.parametrize("name", KEPT["names"])
def test_a_public_name_keeps_its_signature(name: str):
    now = public_surface.names()
    assert name in now, f"{name} is no longer public"
    if isinstance(KEPT["names"][name], dict):
        lost = KEPT["names"][name].items() - now[name].items()
        assert not lost, f"{name}: {sorted(lost)}"
    else:
        assert now[name] == KEPT["names"][name]


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the list is of what a CPU collects")
@pytest.mark.parametrize("test", KEPT["contract"])
def test_the_contract_keeps_its_cases(test: str):
    now = public_surface.contract()[test]
    for op, ids in KEPT["contract"][test].items():
        assert not set(ids) - set(now.get(op, ())), op
