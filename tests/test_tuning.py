"""Configurations are pinned; a sweep happens on request, once per shape class, and is kept."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

from molex_kernels._triton import chips, launch, tuning, winners
from molex_kernels._triton.arguments import Heads, Mat, Stack, Vec, strided
from molex_kernels._triton.tuning import Config

GPU, CPU = torch.device("cuda"), torch.device("cpu")
PINNED = Config({"BLOCK_T": 64})
OTHER = Config({"BLOCK_T": 128}, num_warps=8)
TOO_LARGE = Config({"BLOCK_T": 256})
TIMES = {64: 2.0, 128: 1.0}


class _OutOfResources(Exception):
    pass


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path: Path) -> Path:
    """An empty cache of this test's own."""
    monkeypatch.setenv("MOLEX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(winners, "platform", lambda device: "a chip | a driver | a Triton")
    winners._warn.cache_clear()
    return tmp_path / "cache" / "launches.json"


@pytest.fixture
def timed(monkeypatch) -> list[int]:
    """Sweeping is on, by a stopwatch that is not; the block sizes in the order of their starts."""
    starts: list[int] = []

    def do_bench(call, return_mode):
        assert return_mode == "median"
        call()
        return TIMES[starts[-1]]

    for name, contents in (
        ("triton.testing", {"do_bench": do_bench}),
        ("triton.runtime.errors", {"OutOfResources": _OutOfResources}),
    ):
        module = types.ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    return starts


def _start_into(starts: list[int]):
    def start(config: Config) -> None:
        if config is TOO_LARGE:
            raise _OutOfResources
        starts.append(config.blocks["BLOCK_T"])

    return start


def _never(config: Config) -> None:
    pytest.fail("nothing is timed unless it is asked for")


def test_pinned_unless_asked(monkeypatch):
    assert tuning.choose("k", (PINNED, (OTHER,)), _never, GPU) is PINNED
    monkeypatch.setattr(tuning, "AUTOTUNE", True)
    assert tuning.choose("k", (PINNED, (OTHER,)), _never, CPU) is PINNED
    assert tuning.choose("k", (PINNED, ()), _never, GPU) is PINNED


def test_a_sweep_keeps_the_fastest_and_is_not_repeated(timed):
    options = (PINNED, (OTHER, PINNED))
    for _ in range(2):
        assert tuning.choose("k", options, _start_into(timed), GPU) is OTHER
    assert timed == [64, 128]
    assert tuning.choose("l", options, _start_into(timed), GPU) is OTHER
    assert len(timed) == 4


def test_a_sweep_is_kept_for_the_next_process(timed, monkeypatch, cache):
    assert tuning.choose("k", (PINNED, (OTHER,)), _start_into(timed), GPU) is OTHER
    [(key, entry)] = json.loads(cache.read_text()).items()
    assert key == "a chip | a driver | a Triton | k"
    assert entry == {"BLOCK_T": 128, "num_warps": 8, "num_stages": 3}
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.choose("k", (PINNED, (OTHER,)), _never, GPU) is OTHER
    assert [path.name for path in cache.parent.iterdir()] == ["launches.json"]


def test_a_winner_that_is_no_candidate_any_more_is_ignored(timed, cache):
    cache.parent.mkdir()
    key = "a chip | a driver | a Triton | k"
    cache.write_text(json.dumps({key: {"BLOCK_T": 1, "num_warps": 1, "num_stages": 1}}))
    assert tuning.choose("k", (PINNED, (OTHER,)), _start_into(timed), GPU) is OTHER
    assert json.loads(cache.read_text())[key]["BLOCK_T"] == 128


@pytest.mark.parametrize("contents", ["{", "[]", "\x00"])
def test_a_broken_file_warns_once_and_is_replaced(timed, cache, caplog, contents):
    cache.parent.mkdir()
    cache.write_text(contents)
    with caplog.at_level(logging.WARNING, "molex_kernels"):
        assert tuning.choose("k", (PINNED, (OTHER,)), _start_into(timed), GPU) is OTHER
    assert len(caplog.records) == 1
    assert "cannot be read and are ignored" in caplog.text
    assert len(json.loads(cache.read_text())) == 1


def test_a_place_that_cannot_be_written_warns_once(timed, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOLEX_CACHE", str(tmp_path / "file" / "folder"))
    with caplog.at_level(logging.WARNING, "molex_kernels"):
        for key in ("k", "l"):
            assert tuning.choose(key, (PINNED, (OTHER,)), _start_into(timed), GPU) is OTHER
    assert sum("cannot be kept" in record.message for record in caplog.records) == 1


def test_where_the_file_is(monkeypatch):
    monkeypatch.delenv("MOLEX_CACHE")
    assert winners.file() == Path.home() / ".cache" / "molex_kernels" / "launches.json"


def test_a_candidate_without_room_is_passed_over(timed):
    assert tuning.choose("k", (PINNED, (TOO_LARGE, OTHER)), _start_into(timed), GPU) is OTHER


def test_at_most_eight_candidates(timed, monkeypatch):
    many = tuple(Config({"BLOCK_T": 64}, num_stages=n) for n in range(10, 20))
    tuning.choose("k", (PINNED, many), _start_into(timed), GPU)
    assert len(timed) == tuning.MAX_CANDIDATES == 8


def test_a_sweep_leaves_what_the_kernel_updates_as_it_was(timed):
    total = torch.zeros(3)

    def start(config: Config) -> None:
        timed.append(config.blocks["BLOCK_T"])
        total.add_(1)

    tuning.choose("k", (PINNED, (OTHER,)), start, GPU, (total, None))
    assert total.tolist() == [0, 0, 0]


def test_launch_options():
    options = {"BLOCK_T": 128, "num_warps": 8, "num_stages": 3, "enable_fp_fusion": True}
    assert OTHER.launch_options() == options


def test_a_tile_with_other_warps_and_stages():
    pinned, candidates = tuning.around(PINNED, warps=(8,), stages=(2, 4))
    assert pinned is PINNED
    assert [(c.num_warps, c.num_stages) for c in candidates] == [(8, 3), (4, 2), (4, 4)]
    assert all(c.blocks == PINNED.blocks for c in candidates)


class _Kernel:
    """Stands in for a jitted function."""

    __name__ = "_kernel"
    cache_key = "0123456789abcdef0123"

    def __init__(self) -> None:
        self.started: list[tuple] = []

    def __getitem__(self, grid):
        return lambda *args, **constants: self.started.append((grid, args, constants))


def test_a_launch():
    kernel = _Kernel()
    x = torch.empty(100, 4)
    chosen = launch.launch(
        kernel,
        lambda b: (100 // b["BLOCK_T"], 2),
        lambda b: (strided(x), b["BLOCK_T"]),
        {"IS_LAST": True},
        (PINNED, (OTHER,)),
    )
    assert chosen is PINNED
    constants = {"IS_LAST": True, **PINNED.launch_options()}
    assert kernel.started == [((1, 2), (Mat(x, 4, 1), 64), constants)]


def test_what_a_sweep_is_kept_under():
    """Sizes up to a power of two, dtypes, constants and source; neither strides nor floats."""
    x, h = torch.empty(100, 4), torch.empty(3, 100, dtype=torch.bfloat16).T
    args = (strided(x), strided(h), None, 7, 0.5)
    key = launch._shape_class([_Kernel()], args, {"IS_LAST": True}, PINNED)
    assert key.startswith(
        "_kernel 0123456789abcdef float32[128, 4] bfloat16[128, 4] 8 IS_LAST=True"
    )
    same = (strided(x[:65]), strided(h.contiguous()), None, 8, 0.25)
    assert launch._shape_class([_Kernel()], same, {"IS_LAST": True}, PINNED) == key
    assert launch._shape_class([_Kernel()], args, {"IS_LAST": False}, PINNED) != key
    assert launch._shape_class([_Kernel()], args, {"IS_LAST": True}, OTHER) != key


def test_tensors_as_arguments():
    x = torch.empty(2, 3, 4, 5)
    kinds = [(strided(t), kind) for t, kind in ((x, Heads), (x[0].mT, Stack), (x[0, 0, 0], Vec))]
    assert [type(found) for found, _ in kinds] == [kind for _, kind in kinds]
    assert [found[1:] for found, _ in kinds] == [(60, 20, 5, 1), (20, 1, 5), (1,)]
    assert strided(None) is None


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("sm_90", "sm_90"),
        ("sm_87", "sm_86"),
        ("sm_103", "sm_100"),
        ("sm_121", "sm_120"),
        ("sm_75", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx940", "gfx90a"),
        ("gfx1100", "gfx950"),
    ],
)
def test_a_chip_that_is_not_known_counts_as_the_nearest(name, nearest):
    assert chips.nearest(name) is chips.CHIPS[nearest]


def test_interpreted_kernels_have_a_chip():
    assert chips.of(CPU).name == "sm_90"


def test_programs_share_tiles_evenly_and_run_at_once():
    chip = chips.CHIPS["sm_90"]
    assert chip.programs(1, 6) == 1
    assert chip.programs(6 * 132, 6) == 6 * 132
    assert chip.programs(6 * 132 + 1, 6) == 397  # two tiles to each but one
    assert chip.programs(8192, 6) == 745  # 11 tiles to each but one
    assert chips.replace(chip, multiprocessors=1).programs(8192, 2) == 2


BF16 = torch.bfloat16
# Arguments behind the chip of every function that makes options, by op.
OPTIONS = {
    "dispatch": {
        "gemm": (BF16, 128, 768, True),
        "hidden": (BF16, 128, True),
        "wgrad": (BF16, 64, 512, True),
        "combine": (768,),
        "bias": (),
        "pieces": (),
        "weight": (),
    },
    "layer_mixing": {
        "bias": (),
        "sums": (),
        "linear": (BF16, 1024, 768, True, 8),
        "wgrad": (BF16, True),
        "mix": (768, True),
        "vote": (12,),
        "winner": (12,),
    },
    "merging": {
        "mask": (),
        "linear": (BF16, 1024, True, True),
        "weights": (BF16, True),
        "merge": (),
        "segments": (),
        "mode": (32, 24, "tf32"),
        "contraction": (32, "tf32"),
    },
    "momentum": {"update": (768, 1)},
    "routing": {
        "router": (64, "16-bit"),
        "logits": (64,),
        "dx": (64, True),
        "dgate": (64, True),
        "plan": (65536,),
        "statistics": (16, False, True),
        "keys": (),
        "ranks": (),
        "reduce": (),
        "weights": (16,),
    },
    "rpc_attention": {
        "forward": (BF16, 64, True, False, "long"),
        "backward": (BF16, 64, True, False),
        "rows": (64,),
    },
}
KEYWORDS = {
    ("layer_mixing", "mix"): {"backward": True},
    ("momentum", "update"): {"has_norm": True, "backward": True},
}


@pytest.mark.parametrize("op", OPTIONS)
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_every_kernel_has_candidates(op, chip):
    """Of every chip, and no more of them than are tried."""
    pytest.importorskip("triton")
    config = importlib.import_module(f"molex_kernels.ops.{op}.kernels.config")
    made = {
        name
        for name, value in vars(config).items()
        if callable(value)
        and value.__module__ == config.__name__
        and value.__annotations__.get("return") == "Options"
        and not name.startswith("_")
    }
    assert made == OPTIONS[op].keys()
    for name, arguments in OPTIONS[op].items():
        keywords = KEYWORDS.get((op, name), {})
        pinned, candidates = getattr(config, name)(chips.CHIPS[chip], *arguments, **keywords)
        others = {repr(c) for c in candidates} - {repr(pinned)}
        assert 1 <= len(others) < tuning.MAX_CANDIDATES, name
