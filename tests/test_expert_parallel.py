"""Experts over two ranks and over four: outputs and gradients of one process."""

from __future__ import annotations

import copy
import importlib.util
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.utils import parametrize

import molex_kernels as mk
from molex_kernels.parallel import ExpertParallel

D, E, K, T = 8, 4, 2, 12
ALL_GATHER = {"strategy": "all_gather", "max_tokens": T}


class Layer(nn.Module):
    """A router and experts, of which some ids are taken out of the range."""

    def __init__(self, experts: Any, skew: Sequence[int] = (), dropped: bool = False) -> None:
        super().__init__()
        self.router = mk.TopKRouter(D, E, K, bias=True)
        self.experts = experts
        self.dropped = dropped
        with torch.no_grad():
            self.router.bias[list(skew)] += 100

    def forward(self, x: Tensor) -> Tensor:
        index, weight, _ = self.router(x)
        if self.dropped:
            index = index.clone()
            index[:, 0] = torch.tensor([-1, E, E + 9]).repeat(len(x))[: len(x)]
        # What routing of their own gives.
        pair = ((index, weight),) if isinstance(self.experts, mk.MoEMLP) else (index, weight)
        return self.experts(x, *pair)


def _moe_mlp(**options: Any) -> nn.Module:
    return mk.MoEMLP(D, 6, E, activation="swiglu", shared_width=5, shared_gate=True, **options)


def _experts_of(family: str, cls: str, implementation: str = "molex", **config: Any) -> nn.Module:
    """The experts of a model of transformers."""
    from molex_kernels.integrations.transformers import install_experts

    install_experts()
    configuration = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    name = cls.removesuffix("Experts") + "Config"
    options = {"hidden_size": D, "intermediate_size": 6, "num_local_experts": E, **config}
    made = getattr(configuration, name)(**options)
    made._experts_implementation = implementation
    experts = getattr(modeling, cls)(made)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return experts


def _split(mesh: DeviceMesh, sizes: Sequence[int], x: Tensor) -> Tensor:
    """This rank's tokens."""
    return x.split(list(sizes))[mesh.get_local_rank()]


def _run(model: Callable[..., Any], x: Tensor, probe: Tensor) -> list[Tensor]:
    """Output, and the gradient of x, of a loss that is a mean over the tokens of all ranks."""
    x = x.clone().requires_grad_()
    y = model(x)
    (y * probe).sum().div(T).backward()
    return [y.detach(), x.grad]


def _same(got: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6, msg=lambda m: f"{what}: {m}")


def _same_gradients(model: nn.Module, whole: nn.Module, mesh: DeviceMesh, scale: float = 1) -> None:
    named = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if isinstance(grad, DTensor):
            assert grad.placements == parameter.placements
            grad = grad.full_tensor()
        else:
            dist.all_reduce(grad, group=mesh.get_group())
        assert grad.abs().max() > 0, f"{name} has no gradient to compare"
        _same(grad * scale, named[name].grad, name)


def _check(
    mesh: DeviceMesh, make: Callable[[], nn.Module], sizes: Sequence[int], style: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    whole = make()
    x, probe = torch.randn(T, D), torch.randn(T, D)
    model = copy.deepcopy(whole)
    parallelize_module(model, mesh, {"experts": ExpertParallel(**style)})
    own = model.experts.experts if isinstance(model.experts, mk.MomentumMoE) else model.experts
    assert all(p.placements == (Shard(0),) for p in own.parameters(recurse=False))
    assert all(p.to_local().shape[0] == E // mesh.size() for p in own.parameters(recurse=False))
    want = _run(whole, x, probe)
    got = _run(model, *(_split(mesh, sizes, t) for t in (x, probe)))
    for name, a, b in zip(("y", "dx"), got, want, strict=True):
        _same(a, _split(mesh, sizes, b), name)
    _same_gradients(model, whole, mesh)


class Momentum(nn.Module):
    """Two layers that hand on their state, of the same experts."""

    def __init__(self, rule: Any, **options: Any) -> None:
        super().__init__()
        self.experts = mk.MomentumMoE(D, 6, E, K, rule, **options)

    def forward(self, x: Tensor) -> Tensor:
        y, state, _ = self.experts(x)
        return self.experts(y, state)[0]


def _saved(mesh: DeviceMesh, folder: str) -> None:
    """What is saved from experts over ranks is loaded there, and into one process."""
    torch.manual_seed(1)
    whole = Layer(_moe_mlp())
    torch.manual_seed(2)
    models = []
    for source in (copy.deepcopy(whole), Layer(_moe_mlp())):
        style = ExpertParallel("all_gather")
        models.append(parallelize_module(source, mesh, {"experts": style}))
    where = {"checkpoint_id": f"{folder}/saved", "process_group": mesh.get_group()}
    dcp.save(models[0].state_dict(), **where)
    for target in (models[1], Layer(_moe_mlp())):
        state = target.state_dict()
        assert not torch.equal(*(_full(m["experts.w_up"]) for m in (state, whole.state_dict())))
        dcp.load(state, **where)
        target.load_state_dict(state)
        for name, value in whole.state_dict().items():
            assert torch.equal(_full(target.state_dict()[name]), value), name
    x = torch.randn(T // 2, D)
    _same(models[1](x), models[0](x), "y")


def _full(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def _reads(mesh: DeviceMesh, style: str, expected: int) -> None:
    """How often the host asks for what a device has computed."""
    model = parallelize_module(Layer(_moe_mlp()), mesh, {"experts": ExpertParallel(style)})
    x = torch.randn(T // 2, D, requires_grad=True)
    reads = []
    names = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__index__", "nonzero")
    methods = {name: getattr(Tensor, name) for name in names}
    for name, method in methods.items():
        # The number of tokens, which gloo is asked for on a CPU, is no result of a device.
        def counted(self: Tensor, *args: Any, _name: str = name, _method: Any = method) -> Any:
            reads.append((_name, self.shape))
            return _method(self, *args)

        setattr(Tensor, name, counted)
    try:
        model(x).sum().backward()
    finally:
        for name, method in methods.items():
            setattr(Tensor, name, method)
    counts = [read for read in reads if read[1] != (mesh.size(),)]
    assert len(counts) == expected, counts


def _copies(mesh: DeviceMesh) -> None:
    """A copy computes with its own parameters; what is made on meta is drawn where it lies."""
    model = parallelize_module(_moe_mlp(), mesh, ExpertParallel())
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.w_down.mul_(2), other.b_down.mul_(2)
    x, index = torch.randn(5, D), torch.arange(10).view(5, 2) % E
    shared = model.shared(x)
    routing = (index, torch.rand(5, 2))
    _same(other(x, routing) - shared, 2 * (model(x, routing) - shared), "y of a copy")
    drawn = parallelize_module(_moe_mlp(device="meta"), mesh, ExpertParallel())
    drawn.to_empty(device="cpu").reset_parameters()
    assert drawn(x, routing).isfinite().all()
    assert not torch.equal(*drawn.w_up.full_tensor()[:: E - 1])
    plan = mk.route_plan(index, E)
    assert torch.equal(model(x, routing, plan=plan), model(x, routing))


def _autocast(mesh: DeviceMesh, style: str) -> None:
    torch.manual_seed(3)
    whole = Layer(_moe_mlp())
    model = parallelize_module(
        copy.deepcopy(whole), mesh, {"experts": ExpertParallel(strategy=style)}
    )
    x = torch.randn(T, D)
    with torch.autocast("cpu", torch.bfloat16):
        got, want = model(_split(mesh, [6, 6], x)), _split(mesh, [6, 6], whole(x))
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def _refused(mesh: DeviceMesh) -> None:
    one = mk.MoEMLP(D, 6, 3)
    with pytest.raises(ValueError, match=r"num_experts: expected a multiple of 2.*'ep', got 3"):
        parallelize_module(one, mesh, ExpertParallel())
    assert not isinstance(one.w_up, DTensor)
    with pytest.raises(TypeError, match=r"expected a MoEMLP.*got Linear"):
        parallelize_module(nn.Linear(2, 2), mesh, ExpertParallel())
    model = parallelize_module(_moe_mlp(), mesh, ExpertParallel("all_gather"))
    with pytest.raises(ValueError, match="module: expected MoEMLP with the forward of its class"):
        parallelize_module(model, mesh, ExpertParallel())
    with pytest.raises(ValueError, match="w_up: expected a plain parameter, got a DTensor"):
        parallelize_module(fully_shard(_moe_mlp(), mesh=mesh), mesh, ExpertParallel())
    derived = parametrize.register_parametrization(mk.MoEMLP(D, 6, E), "b_up", nn.Identity())
    with pytest.raises(ValueError, match="expected parameters of its own, got ParametrizedMoEMLP"):
        parallelize_module(derived, mesh, ExpertParallel())
    wide = mk.MoEMLP(D, 6, E)
    wide.more = nn.Parameter(torch.ones(D))
    with pytest.raises(ValueError, match=r"more: expected shape \[E, ...\] with E=4, got \[8\]"):
        parallelize_module(wide, mesh, ExpertParallel())
    x = torch.randn(3 + mesh.get_local_rank(), D)
    routing = (torch.zeros(len(x), K, dtype=torch.int64), torch.ones(len(x), K))
    with pytest.raises(ValueError, match=r"equally many tokens on all ranks.*got \[3, 4\]"):
        model(x, routing)
    with pytest.raises(ValueError, match=r"routing.expert_weight|expert_weight: expected"):
        model(x, (routing[0], routing[1][1:]))
    few = parallelize_module(_moe_mlp(), mesh, ExpertParallel("all_gather", max_tokens=2))
    with pytest.raises(ValueError, match="x: expected at most max_tokens=2 tokens, got"):
        few(x, routing)


def _refused_implementation(mesh: DeviceMesh) -> None:
    experts = _experts_of("mixtral", "MixtralExperts", "eager")
    with pytest.raises(ValueError, match=EAGER):
        parallelize_module(experts, mesh, ExpertParallel())
    experts.config._experts_implementation = "molex"
    parallelize_module(experts, mesh, ExpertParallel())
    experts.config._experts_implementation = "eager"
    with pytest.raises(ValueError, match=EAGER):
        experts(torch.randn(2, D), torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1))


EAGER = r"experts implementation: expected 'molex'.*got 'eager'"
MIXTRAL = ("mixtral", "MixtralExperts")
GPT_OSS = ("gpt_oss", "GptOssExperts")
EVEN, UNEVEN, EMPTY = [6, 6], [9, 3], [12, 0]
CHECKS: dict[str, Callable[..., None]] = {
    f"{name}, {style['strategy']}": lambda mesh, _, make=make, sizes=sizes, style=style: _check(
        mesh, make, sizes, style
    )
    for style in ({"strategy": "all_to_all"}, ALL_GATHER)
    for name, make, sizes in (
        ("even", lambda: Layer(_moe_mlp()), EVEN),
        ("uneven", lambda: Layer(_moe_mlp(bias=False)), UNEVEN),
        ("a rank without tokens", lambda: Layer(_moe_mlp()), EMPTY),
        ("skewed", lambda: Layer(mk.MoEMLP(D, 6, E), skew=(2, 3)), UNEVEN),
        ("ids of no expert", lambda: Layer(_moe_mlp(), dropped=True), UNEVEN),
        ("momentum", lambda: Momentum(mk.HeavyBall(0.7)), UNEVEN),
        (
            "momentum, robust",
            lambda: Momentum(
                mk.RobustMomentum(10.0, 1.0, 0.9), wiring="pre_ln", shared_width=5, sign=-1
            ),
            UNEVEN,
        ),
        ("transformers", lambda: Layer(_experts_of(*MIXTRAL)), UNEVEN),
        ("transformers, transposed", lambda: Layer(_experts_of(*GPT_OSS)), EMPTY),
        (
            "transformers, own code",
            lambda: Layer(_experts_of(*MIXTRAL, hidden_act="tanh")),
            UNEVEN,
        ),
    )
}
CHECKS["all_gather as it is"] = lambda mesh, _: _check(
    mesh, lambda: Layer(_moe_mlp()), EVEN, {"strategy": "all_gather"}
)
CHECKS["saved and loaded"] = _saved
CHECKS["one read of the host"] = lambda mesh, _: _reads(mesh, "all_to_all", 1)
CHECKS["no read of the host"] = lambda mesh, _: _reads(mesh, "all_gather", 0)
CHECKS["copies"] = lambda mesh, _: _copies(mesh)
CHECKS["autocast, all_to_all"] = lambda mesh, _: _autocast(mesh, "all_to_all")
CHECKS["autocast, all_gather"] = lambda mesh, _: _autocast(mesh, "all_gather")
CHECKS["refused"] = lambda mesh, _: _refused(mesh)
CHECKS["transformers, refused"] = lambda mesh, _: _refused_implementation(mesh)


def _with_fsdp(mesh: DeviceMesh) -> None:
    """Experts over one dimension, parts of each over the other, as of a mean over all ranks."""
    torch.manual_seed(3)
    whole = Layer(_moe_mlp())
    x, probe = torch.randn(T, D), torch.randn(T, D)
    model = copy.deepcopy(whole)
    parallelize_module(model, mesh["ep"], {"experts": ExpertParallel()})
    fully_shard(model, mesh=mesh["dp"])
    rank = dist.get_rank()
    want = _run(whole, x, probe)
    got = _run(model, *(t.split([5, 0, 4, 3])[rank] for t in (x, probe)))
    for name, a, b in zip(("y", "dx"), got, want, strict=True):
        _same(a, b.split([5, 0, 4, 3])[rank], name)
    named = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad.full_tensor()
        if not name.startswith("experts.") or "shared" in name:
            dist.all_reduce(grad, group=mesh["ep"].get_group())
        # FSDP averages over its ranks.
        _same(grad * mesh["dp"].size(), named[name].grad, name)


class Block(nn.Module):
    """Two layers, as attention has, that are split by columns and by rows; and a mixture."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)
        self.mixture = Layer(_moe_mlp())

    def forward(self, x: Tensor) -> Tensor:
        return self.mixture(x + self.down(self.up(x).relu()))


def _with_tensor_parallel(mesh: DeviceMesh) -> None:
    """Experts over one dimension, the layers before them over the other, which has its tokens."""
    torch.manual_seed(4)
    whole = Block()
    x, probe = torch.randn(T, D), torch.randn(T, D)
    model = copy.deepcopy(whole)
    parallelize_module(model, mesh["dp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    parallelize_module(model, mesh["ep"], {"mixture.experts": ExpertParallel()})
    want = _run(whole, x, probe)
    got = _run(model, *(_split(mesh["ep"], [5, 7], t) for t in (x, probe)))
    for name, a, b in zip(("y", "dx"), got, want, strict=True):
        _same(a, _split(mesh["ep"], [5, 7], b), name)
    named = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
        if "experts." not in name or "shared" in name:
            dist.all_reduce(grad, group=mesh["ep"].get_group())
        _same(grad, named[name].grad, name)


def _over_four(style: dict[str, Any], sizes: Sequence[int]) -> None:
    flat = init_device_mesh("cpu", (4,), mesh_dim_names=("all",))
    _check(flat, lambda: Layer(_moe_mlp()), sizes, style)


CHECKS_OF_FOUR: dict[str, Callable[[DeviceMesh], None]] = {
    "four ranks, all_to_all": lambda _: _over_four({}, [0, 7, 1, 4]),
    "four ranks, all_gather": lambda _: _over_four(ALL_GATHER, [3, 0, 5, 4]),
    "four ranks, with FSDP": _with_fsdp,
    "four ranks, with tensor parallel layers": _with_tensor_parallel,
}


def _tried(name: str, rank: int, folder: str, job: Callable[..., None], *args: Any) -> None:
    try:
        job(*args)
    except BaseException as error:  # pytest's own failures, too
        Path(folder, f"{name}-{rank}").write_text(f"{type(error).__name__}: {error}")


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=4,
        timeout=timedelta(seconds=60),  # where a check fails, other ranks wait
    )
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    impatient = dist.new_group([0, 1], timeout=timedelta(seconds=2))
    for name, check in CHECKS_OF_FOUR.items():
        _tried(name, rank, folder, check, mesh)
    if rank > 1:
        return
    for name, check in CHECKS.items():
        if "transformers" not in name or importlib.util.find_spec("transformers"):
            _tried(name, rank, folder, check, mesh["ep"], folder)
    _absence(rank, folder, impatient, mesh["ep"].get_group())


def _absence(rank: int, folder: str, *groups: dist.ProcessGroup) -> None:
    """Rank 1 does not come in time, and then dies; what rank 0 sees is written down."""
    meshes = [DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ep",)) for group in groups]
    layers = [
        parallelize_module(Layer(_moe_mlp()), mesh, {"experts": ExpertParallel(strategy)})
        for mesh, strategy in zip(meshes, ("all_to_all", "all_gather"), strict=True)
    ]
    if rank == 1:
        time.sleep(4)
        os._exit(0)
    for layer, name in zip(layers, ("late", "dead"), strict=True):
        start = time.monotonic()
        try:
            layer(torch.randn(6, D))
        except RuntimeError:
            Path(folder, name).write_text(f"{time.monotonic() - start}")


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text for each rank and check that failed."""
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=4)
    return folder


@pytest.mark.parametrize("name", [*CHECKS, *CHECKS_OF_FOUR])
def test_ranks_compute_what_one_process_does(failures: Path, name: str):
    if "transformers" in name:
        pytest.importorskip("transformers.integrations.moe", exc_type=ImportError)
    assert not [p.read_text() for p in sorted(failures.glob(f"{name}-[0-9]"))]


def test_an_absent_rank_is_an_error(failures: Path):
    """After the time-out of the group where it is late, at once where it has died."""
    late, dead = (float((failures / name).read_text()) for name in ("late", "dead"))
    assert late > 1
    assert dead < 40


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"strategy": "ring"}, "strategy: expected one of 'all_to_all', 'all_gather', got 'ring'"),
        ({"max_tokens": 3}, "max_tokens: expected None with strategy='all_to_all', got 3"),
        ({"strategy": "all_gather", "max_tokens": 0}, "max_tokens: expected at least 1, got 0"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: str):
    with pytest.raises(ValueError, match=error):
        ExpertParallel(**options)
