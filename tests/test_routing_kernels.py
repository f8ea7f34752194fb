"""The routing kernels: how many launches a call takes, and sums that are cut into parts."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import DEVICE
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import molex_kernels as mk
from molex_kernels._triton import direct

# What PyTorch does on the host alone: allocations, which tests fill, and views.
ON_THE_HOST = {
    "fill_",
    *("empty", "empty_strided", "new_empty", "empty_like", "as_strided", "detach", "alias"),
    *("select", "slice", "squeeze", "unsqueeze", "view", "reshape", "expand", "set_", "lift_fresh"),
}


@pytest.fixture(autouse=True)
def _on_the_device() -> Iterator[None]:
    with DEVICE:
        yield


def _launches(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> list[str]:
    """What a call starts on the device: kernels of the package, and PyTorch's own."""
    found: list[str] = []

    def start(kernel, *given) -> None:
        found.append(kernel.fn.__name__)

    with monkeypatch.context() as patch, profile(activities=[ProfilerActivity.CPU]) as recorded:
        patch.setattr(direct, "start", start)
        call()
    names = [e.name.removeprefix("aten::") for e in recorded.events() if e.name[:6] == "aten::"]
    return found + [name for name in names if name not in ON_THE_HOST]


def _previous(tokens: int, experts: int) -> Tensor:
    return torch.arange(2 * tokens).view(tokens, 2) % experts


@pytest.mark.parametrize(("tokens", "dim", "experts"), [(6144, 352, 16), (200, 40, 5)])
@pytest.mark.parametrize("recipe", ["lm", "swin", "softmoe"])
def test_a_router_by_clusters_takes_four_launches(monkeypatch, tokens, dim, experts, recipe: str):
    x, gate = torch.ones(tokens, dim), torch.ones(experts, dim)
    previous = _previous(tokens, experts)

    def call() -> None:
        mk.ac_route(x, gate, previous, top_k=2, recipe=recipe, impl="triton")

    found = _launches(monkeypatch, call)
    parts = ["_statistics_fwd_part"] * 2
    assert found == [*parts, "_feature_weights_fwd", "_router_fwd"]


def test_many_parts_are_put_together_once(monkeypatch):
    """Rather than by every program of the weights."""
    x, cluster = torch.ones(25216, 192), _previous(25216, 128)[:, 0]
    found = _launches(monkeypatch, lambda: mk.ac_weights(x, cluster, 128, impl="triton"))
    parts = ["_statistics_fwd_part"] * 2
    assert sorted(found) == ["_feature_weights_fwd", *parts, "sum", "sum"]


@pytest.mark.parametrize(("tokens", "most"), [(512, 2), (513, 4), (6144, 4)])
def test_a_router_and_its_plan_take_four_launches(monkeypatch, tokens: int, most: int):
    """And two where one block holds the plan."""
    x, gate = torch.ones(tokens, 40), torch.ones(16, 40)
    previous = _previous(tokens, 16)

    def call() -> None:
        mk.topk_route(x, gate, top_k=2, impl="triton")
        mk.route_plan(previous, 16, impl="triton")

    assert len(_launches(monkeypatch, call)) <= most


@pytest.mark.parametrize("stat", ["mad", "variance", "pairwise"])
def test_sums_in_parts_and_tiles_in_triton(generator, stat: str):
    """More tokens than a part has, more clusters and features than a tile."""
    x = torch.randn(540, 66, generator=generator, device="cpu").to(DEVICE) + 3
    cluster = torch.arange(540) % 68 - 1  # of no cluster are some, and the last one is empty
    options = {"stat": stat, "eps": 0.1, "clip": float("inf"), "norm": "none"}
    got = mk.ac_weights(x, cluster, 68, **options, impl="triton")
    want = mk.ac_weights(x.double(), cluster, 68, **options, impl="reference")
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=0)


@pytest.mark.parametrize("stat", ["mad", "variance"])
def test_what_is_not_finite_stays_where_it_is_in_triton(generator, stat: str):
    x = torch.randn(540, 66, generator=generator, device="cpu").to(DEVICE)
    cluster = torch.arange(540) % 5 - 1
    options = {"stat": stat, "eps": 0.1, "clip": float("inf"), "norm": "none", "impl": "triton"}
    clean = mk.ac_weights(x, cluster, 5, **options)
    x[0] = float("nan")  # of no cluster
    x[530, 3], x[1, 65], x[2, 0] = float("inf"), float("nan"), 1e30  # of clusters -1, 0 and 1
    x[531, 3] = float("-inf")  # of cluster 0
    got = mk.ac_weights(x, cluster, 5, **options)
    assert got[0, [3, 65]].isnan().all()
    assert got[1, 0] == (0 if stat == "variance" else got[1, 0])  # 1e60 is no number of fp32
    assert got[1, 0] < 1e-20
    clean[0, [3, 65]], clean[1, 0], got[0, [3, 65]], got[1, 0] = 0.0, 0.0, 0.0, 0.0
    assert torch.equal(got, clean)


@pytest.mark.parametrize("experts", [16, 63, 130, 256])
@pytest.mark.parametrize("groups", [None, 2])
def test_equal_keys_and_keys_without_a_number_in_triton(
    generator, experts: int, groups: int | None
):
    """Few different logits, both zeros, infinities and NaN: the lower of equal experts comes."""
    if groups is not None and experts % groups:
        experts += 1
    values = torch.tensor([-2.0, -0.0, 0.0, 1.0, 3.0, float("inf"), -float("inf"), float("nan")])
    picked = torch.randint(8, (33, experts), generator=generator, device="cpu").to(DEVICE)
    logits = values[picked]
    options = {"top_k": 11} if groups is None else {"top_k": 5, "num_groups": groups}
    if groups is not None:
        options["top_groups"] = 1
    for score in ("softmax_topk", "sigmoid"):
        got, want = (
            mk.route_from_logits(logits, score=score, **options, impl=impl)
            for impl in ("triton", "reference")
        )
        assert torch.equal(got.expert_index, want.expert_index)
        torch.testing.assert_close(got.expert_weight, want.expert_weight, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 64, 65, 512, 513])
@pytest.mark.parametrize("experts", [3, 62, 63, 200])
def test_plans_of_one_block_and_of_many_in_triton(generator, tokens: int, experts: int):
    index = torch.randint(-1, experts + 2, (tokens, 2), generator=generator, device="cpu")
    index = index.to(DEVICE)
    plans = [mk.route_plan(index, experts, impl=impl) for impl in ("triton", "reference")]
    assert all(map(torch.equal, *plans))
