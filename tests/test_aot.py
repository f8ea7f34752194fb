"""Triton kernels compiled for chips that are not here: every path, every tile, and what it costs.

Compiling anything at all is half of the test: what the interpreter runs, a compiler may refuse.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from aot import facts
from aot.machine_code import blocks
from conftest import once

from molex_kernels._triton.chips import CHIPS

ROOT = Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")


def _run(module: str) -> str:
    """What the module prints, in a process whose kernels are not interpreted."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-m", module]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-4000:]
    return run.stdout


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What `python -m aot` found."""
    result = once(tmp_path_factory, "aot.json", lambda path: path.write_text(_run("aot")))
    return json.loads(result.read_text())


@pytest.fixture(scope="session")
def recorded(compiled: dict[str, Any]) -> dict[str, Any]:
    """What the repository has for this release of Triton, of what was compiled here."""
    release = facts.read(compiled["triton"])
    # A release may have been recorded for one chip.
    if missing := compiled["figures"].keys() - release.keys():
        reason = f"{facts.FILE.name} has not {', '.join(missing)} for Triton {compiled['triton']}"
        assert not os.environ.get("CI"), reason
        pytest.skip(reason)
    return release


def test_every_launch_compiles(compiled: dict[str, Any]):
    """Every path for one chip and every tile for four; strides are multiplied in int64."""
    assert not compiled["errors"], "\n".join(compiled["errors"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_block_has_room(compiled: dict[str, Any], target: str):
    """In shared memory, whatever the chip."""
    found = compiled["figures"].get(target)
    if found is None:
        pytest.skip("left out by MOLEX_AOT_TARGETS")
    assert found
    limit = CHIPS[target].shared
    assert not {k: f["shared"] for k, f in found.items() if f["shared"] > limit}


@pytest.mark.parametrize("target", TARGETS)
def test_no_figure_is_worse(compiled: dict[str, Any], recorded: dict[str, Any], target: str):
    if target not in compiled["figures"]:
        pytest.skip("left out by MOLEX_AOT_TARGETS")
    problems = facts.worse(recorded[target], compiled["figures"][target])
    advice = "`make aot-facts` keeps what was found; read its diff"
    assert not problems, "\n".join([advice, *problems])


def test_the_wide_grouped_product_is_bound_by_its_tensor_cores(compiled: dict[str, Any]):
    """One wgmma as wide as there is, fed by copies alone and rarely waiting to be issued."""
    wide = {
        key: found
        for key, found in compiled["figures"].get("sm_90", {}).items()
        if key.startswith("_dispatch_fwd_gemm bf16 ") and "BLOCK_N=256" in key
    }
    assert wide
    for key, found in wide.items():
        assert found["product"] == "wgmma 64x256x16", key
        assert (found["spilled"], found["loads"], found.get("serialized", 0)) == (0, 0, 0), key
        assert found["issue"] <= 0.3, key


@pytest.mark.parametrize(("kernel", "least"), [("fwd_merge", 3), ("bwd_segments", 4)])
def test_merging_in_pieces_hides_its_loads(compiled: dict[str, Any], kernel: str, least: int):
    """Bound by memory: nothing spills, and several blocks share a multiprocessor."""
    found = {
        key: figures
        for key, figures in compiled["figures"].get("sm_90", {}).items()
        if key.startswith(f"_merging_{kernel} bf16 ")
    }
    assert found
    for key, figures in found.items():
        assert figures["spilled"] == 0, key
        assert figures["blocks"] >= least, key


def test_no_launch_is_lost(compiled: dict[str, Any], recorded: dict[str, Any]):
    """How many paths and tiles each op's cases reach."""
    assert compiled["counts"] == recorded["counts"]


@pytest.fixture(scope="session")
def toys() -> dict[str, Any]:
    return json.loads(_run("aot.toys"))


def test_a_return_in_a_compile_time_if_is_seen(toys: dict[str, Any]):
    assert "'NoneType' object has no attribute 'type'" in toys["returns_early"]
    assert toys["returns_once"] == []


def test_an_int32_product_with_a_stride_is_seen(toys: dict[str, Any]):
    assert len(toys["narrow_stride"]) == 1
    assert len(toys["narrow_step"]) == 1
    assert toys["wide_stride"] == []


def test_figures_of_a_main_loop(toys: dict[str, Any]):
    """A pipelined product; the same with what a main loop should not have."""
    good, bad = toys["product"], toys["product_with_division"]
    assert good["product"] == bad["product"] == "wgmma 64x64x16"
    assert good["spilled"] == 0
    assert (good["loads"], good["divisions"]) == (0, 0)
    assert bad["divisions"] > 0
    assert bad["issue"] > good["issue"]


def test_registers_bound_the_blocks_of_a_multiprocessor():
    assert [blocks(n, 8, 0, "sm_90") for n in (64, 65, 128, 129, 255)] == [4, 3, 2, 1, 1]
    assert blocks(32, 4, 100 * 1024, "sm_90") == 2
    assert blocks(16, 1, 0, "sm_90") == 32


def test_what_counts_as_worse():
    before = {"registers": 100, "blocks": 2, "product": "wgmma 64x128x16", "issue": 0.5}
    assert facts.worse({"k": before}, {"k": before}) == []
    worse = {
        "registers": 101,
        "blocks": 1,
        "product": "wgmma 64x64x16",
        "issue": 0.51,
        "serialized": 1,
        "spilled": 4,
    }
    for name, value in worse.items():
        assert len(facts.worse({"k": before}, {"k": {**before, name: value}})) == 1, name
    better = {"registers": 99, "blocks": 3, "product": "wgmma 64x256x16", "issue": 0.49}
    assert facts.worse({"k": before}, {"k": better}) == []
    assert facts.worse({"k": before}, {"k": {**before, "product": "mma 16816"}})
    assert facts.worse({"k": before}, {"k": {n: v for n, v in before.items() if n != "product"}})
    assert facts.worse({}, {"k": before}) == ["k: is not in the file"]
    assert facts.worse({"k": before}, {}) == ["k: is in the file, and no longer launched"]
