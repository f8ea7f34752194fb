"""What tools do to modules works on every module of the package, and on every child of one."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator

import modules
import pytest
import torch
import torch.distributed as dist
from conftest import DEVICE
from modules import MODULES, agree, changed, floats, inputs, make
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

import molex_kernels as mk
from molex_kernels.ops.momentum import module as momentum


def _child(module: nn.Module, path: str) -> nn.Module:
    return module.get_submodule(path)


PLACES = [(name, path) for name in MODULES for path in ("", *modules.children(name))]
CHILDREN = [place for place in PLACES if place[1]]
PARAMETERS = [(name, own) for name in MODULES for own, _ in make(name, 0).named_parameters()]
SHARDED = [(name, path) for name, path in PLACES if list(_child(make(name, 0), path).parameters())]
# In evaluation noise has no share.
UNFELT = {"w_noise", "up.w_noise", "down.w_noise"}


def _id(place: tuple[str, str]) -> str:
    return "-".join(part or "itself" for part in place)


def test_every_module_is_swept():
    public = {name for name in mk.__all__ if _is_module(getattr(mk, name))}
    assert public == {name.partition("-")[0] for name in MODULES}


def _is_module(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


@pytest.mark.parametrize("place", PLACES, ids=_id)
def test_hooks_of_every_child_run(place, seed):
    name, path = place
    module, given = make(name, seed), inputs(name, seed)
    plain = module(*given)
    calls = []
    child = _child(module, path)
    child.register_forward_pre_hook(lambda *_: calls.append("before"))
    child.register_forward_hook(lambda *_: calls.append("after"))
    child.register_full_backward_hook(lambda *_: calls.append("backward"))
    out = module(*given)
    assert agree(out, plain)
    assert calls[:1] == ["before"]
    assert calls[-1:] == ["after"]
    if path:
        _loss(out).backward()
        assert calls[-1:] == ["backward"]


@pytest.mark.parametrize("name", MODULES)
def test_hooks_of_all_modules_see_every_child(name, seed):
    module, given = make(name, seed), inputs(name, seed)
    seen = set()
    handle = nn.modules.module.register_module_forward_hook(lambda child, *_: seen.add(child))
    module(*given)
    handle.remove()
    assert seen >= {_child(module, path) for path in ("", *modules.children(name))}


@pytest.mark.parametrize("child", ["experts", "norm", "norm_out"])
def test_a_hook_that_changes_an_output_changes_the_layer(child, seed):
    """Of each child it is the output itself that a hook gets, fused or not."""
    module, given = make("MomentumMoE", seed), inputs("MomentumMoE", seed)
    plain = module(*given)
    shapes = []

    def doubled(_module, _given, out):
        shapes.append(out.shape)
        return 2 * out

    module.get_submodule(child).register_forward_hook(doubled)
    changed = module(*given)
    assert shapes == [given[0].shape]
    assert not agree(changed.y, plain.y)
    assert agree(changed.state, plain.state) == (child != "experts")


def test_a_plain_layer_is_fused(seed, monkeypatch):
    calls = []
    fused = momentum.moe_mlp_momentum

    def counted(*args, **kwargs):
        calls.append(kwargs["norm"] is not None)
        return fused(*args, **kwargs)

    monkeypatch.setattr(momentum, "moe_mlp_momentum", counted)
    module, given = make("MomentumMoE", seed), inputs("MomentumMoE", seed)
    module(*given)
    module.norm.register_forward_hook(lambda *_: None)
    module(*given)
    module.experts.register_forward_hook(lambda *_: None)
    module(*given)
    assert calls == [True, False]


def test_other_experts_keep_what_they_are(seed):
    """In the place of those that the layer made."""
    module, given = make("MomentumMoE", seed), inputs("MomentumMoE", seed)
    options = {"activation": "swiglu", "gate_layout": "interleaved"}
    module.experts = mk.MoEMLP(modules.D, 5, modules.E, **options).to(DEVICE)
    fused = module(*given)
    module.experts.register_forward_hook(lambda *_: None)
    assert agree(fused, module(*given))


def test_a_hook_changes_no_dropout(seed):
    """Who looks at a layer in training does not change what it draws."""
    module, given = make("MomentumMoE", seed).train(), inputs("MomentumMoE", seed)
    torch.manual_seed(seed)
    plain = module(*given)
    module.experts.register_forward_hook(lambda *_: None)
    torch.manual_seed(seed)
    assert agree(module(*given), plain)


class _Changed(nn.Module):
    """A parametrization."""

    def forward(self, value):
        return changed(value)


def _with_a_changed(module: nn.Module, own: str) -> nn.Module:
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.get_parameter(own).copy_(changed(other.get_parameter(own)))
    return other


@pytest.mark.parametrize("place", PARAMETERS, ids=_id)
def test_a_parametrized_parameter_is_what_the_module_computes_with(place, seed):
    name, own = place
    module, given = make(name, seed), inputs(name, seed)
    plain, want = module(*given), _with_a_changed(module, own)(*given)
    path, _, short = own.rpartition(".")
    parametrize.register_parametrization(_child(module, path), short, _Changed())
    got = module(*given)
    assert agree(got, want)
    assert (own in UNFELT) == agree(got, plain)
    if own not in UNFELT:
        sum(out.square().sum() for out in floats(got) if out.requires_grad).backward()
        gradient = _child(module, path).parametrizations[short].original.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("place", PARAMETERS, ids=_id)
def test_functional_call_replaces_every_parameter(place, seed):
    name, own = place
    module, given = make(name, seed), inputs(name, seed)
    new = {own: changed(module.get_parameter(own)).detach().requires_grad_()}
    got = functional_call(module, new, given)
    assert agree(got, _with_a_changed(module, own)(*given))
    assert (own in UNFELT) == agree(got, module(*given))


class _Net(nn.Module):
    """A model around one module: tools that wrap children need a parent."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *given):
        return self.layer(*given)


@pytest.mark.parametrize(
    "place", [p for p in PARAMETERS if make(p[0], 0).get_parameter(p[1]).dim() in (2, 3)], ids=_id
)
def test_adapters_of_peft_on_a_parameter(place, seed):
    """What runs with adapters is what runs with adapters merged."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    name, own = place
    module, given = make(name, seed), inputs(name, seed)
    plain = module(*given)
    config = peft.LoraConfig(r=2, target_parameters=[f"layer.{own}"], init_lora_weights=False)
    model = peft.get_peft_model(_Net(module), config).eval()
    got = model(*given)
    assert (own in UNFELT) == agree(got, plain)
    adapters = [p for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    adapters = [p for p in adapters if p.requires_grad]
    assert adapters
    if own not in UNFELT:
        loss = sum(out.square().sum() for out in floats(got) if out.requires_grad)
        for gradient in torch.autograd.grad(loss, adapters):
            assert torch.isfinite(gradient).all()
    assert agree(model.merge_and_unload()(*given), got)


@pytest.mark.parametrize(
    "place",
    [p for p in CHILDREN if isinstance(_child(make(p[0], 0), p[1]), nn.Linear | nn.LayerNorm)],
    ids=_id,
)
def test_adapters_of_peft_on_a_child(place, seed):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    name, path = place
    module, given = make(name, seed), inputs(name, seed)
    plain = module(*given)
    names = [f"layer.{path}"]
    config = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    if isinstance(_child(module, path), nn.LayerNorm):
        config = peft.LNTuningConfig(target_modules=names)
    model = peft.get_peft_model(_Net(module), config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    got = model(*given)
    assert not agree(got, plain)
    assert agree(model.merge_and_unload()(*given), got)


def test_modules_that_peft_saves_whole(seed):
    peft = pytest.importorskip("peft", exc_type=ImportError)
    module, given = make("MomentumMoE", seed), inputs("MomentumMoE", seed)
    plain = module(*given)
    saved = ["layer.experts", "layer.norm", "layer.norm_out", "layer.router"]
    config = peft.LoraConfig(target_parameters=["layer.router.bias"], modules_to_save=saved)
    config.target_parameters, config.target_modules = None, ["other"]
    model = peft.get_peft_model(_Other(module), config).eval()
    assert agree(model(*given), plain)


class _Other(_Net):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__(layer)
        self.other = nn.Linear(2, 2)


@pytest.fixture(scope="module")
def _group(tmp_path_factory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    backend = "nccl" if DEVICE.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _loss(out: object) -> torch.Tensor:
    return sum(t.square().sum() for t in floats(out) if t.requires_grad)


@pytest.mark.parametrize("place", SHARDED, ids=_id)
@pytest.mark.usefixtures("_group")
def test_every_child_is_sharded_alone(place, seed):
    """FSDP2: the parameters are there during the child's call alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    name, path = place
    module, given = make(name, seed), inputs(name, seed)
    plain = module(*given)
    _loss(plain).backward()
    want = {own: p.grad for own, p in module.named_parameters()}
    sharded = make(name, seed)
    fully_shard(_child(sharded, path), mesh=init_device_mesh(DEVICE.type, (1,)))
    got = sharded(*given)
    assert agree(got, plain)
    _loss(got).backward()
    for own, parameter in sharded.named_parameters():
        gradient = parameter.grad
        if want[own] is None:
            assert gradient is None or not gradient.full_tensor().any(), own
            continue
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(whole, want[own], rtol=1e-4, atol=1e-5, msg=own)


@pytest.mark.parametrize("name", MODULES)
def test_parameters_that_wait_in_host_memory(name, seed):
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    module, given = make(name, seed), inputs(name, seed)
    with torch.no_grad():
        plain = module(*given)
        accelerate.cpu_offload(module, execution_device=DEVICE)
        assert {p.device.type for p in module.parameters()} == {"meta"}
        assert agree(module(*given), plain)


def _deltas(module: nn.Module) -> tuple[object, ...]:
    return *module.deltas(), *module.next_bases(0.1)


@pytest.mark.parametrize("tool", ["adapters", "sharded", "offloaded"])
@pytest.mark.usefixtures("_group")
def test_the_merged_mlp_prepares_its_weights_in_its_layers_calls(tool, seed):
    """`deltas` and `next_bases` come from the layers' parameters, outside of any forward."""
    module, given = make("CAMExMLP", seed), inputs("CAMExMLP", seed)
    plain = _deltas(module)
    if tool == "adapters":
        peft = pytest.importorskip("peft", exc_type=ImportError)
        names = ["layer.up.experts", "layer.down.experts"]
        config = peft.LoraConfig(r=2, target_parameters=names, init_lora_weights=False)
        model = peft.get_peft_model(_Net(module), config).eval()
        got, out = _deltas(module), model(*given)
        assert agree(module(*given, deltas=module.deltas()), out)
        assert not agree(got, plain)
        assert agree(_deltas(model.merge_and_unload().layer), got)
        return
    with torch.no_grad():
        if tool == "sharded":
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            for layer in (module.up, module.down):
                fully_shard(layer, mesh=init_device_mesh(DEVICE.type, (1,)))
        else:
            pytest.importorskip("accelerate", exc_type=ImportError).cpu_offload(module, DEVICE)
        assert agree(_deltas(module), plain)


@pytest.mark.parametrize("name", MODULES)
def test_copies_are_modules_of_their_own(name, seed):
    module, given = make(name, seed), inputs(name, seed)
    plain = module(*given)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for other in (copy.deepcopy(module), torch.load(file, weights_only=False)):
        assert agree(other(*given), plain)
        shared = {p.data_ptr() for p in module.parameters()}
        assert not shared & {p.data_ptr() for p in other.parameters()}
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.copy_(changed(parameter))
        assert not agree(other(*given), plain)
        assert agree(module(*given), plain)


@pytest.mark.parametrize("name", MODULES)
def test_emptied_and_loaded(name, seed):
    """As a large model is made: without memory first, then with its state dict's values."""
    module, given = make(name, seed), inputs(name, seed)
    plain, state = module(*given), copy.deepcopy(module.state_dict())
    for away in ("meta", DEVICE):
        module.to_empty(device=away)
    module.load_state_dict(state)
    assert agree(module(*given), plain)


@pytest.mark.parametrize("hooked", [False, True], ids=["plain", "hooked"])
@pytest.mark.parametrize("name", MODULES)
def test_compiled_whole(name, hooked, seed):
    module, given = make(name, seed), inputs(name, seed)
    if hooked:
        for path in modules.children(name):
            _child(module, path).register_forward_hook(lambda _module, _given, out: out)
    torch._dynamo.reset()
    assert agree(torch.compile(module, fullgraph=True, backend="eager")(*given), module(*given))


def test_a_parametrized_gate_is_renormalized(seed):
    router = make("ACRouter-cosine", seed)
    nn.utils.parametrizations.weight_norm(router, "weight")
    router.renormalize_()
    torch.testing.assert_close(router.weight.norm(dim=1), torch.full((4,), 1.5).to(DEVICE))


@pytest.mark.parametrize("name", ["MoEMLP", "MomentumMoE", "CAMExLinear"])
def test_published_weights_are_not_loaded_into_half_of_a_module(name, seed):
    module = make(name, seed)
    own, _ = next(p for p in module.named_parameters() if "router" not in p[0])
    path, _, short = own.rpartition(".")
    parametrize.register_parametrization(_child(module, path), short, _Changed())
    with pytest.raises(ValueError, match=r"load_published: expected .* without wrappers"):
        module.load_published({})


def test_a_rule_is_held_once(seed):
    """Learned numbers are the module's parameters, and its rule is made of them."""
    mu = nn.Parameter(torch.tensor(0.6))
    module = mk.MomentumMoE(8, 6, 4, 2, mk.HeavyBall(mu))
    assert dict(module.named_parameters())["mu"] is mu
    assert module.rule.mu is mu
    module.mu = nn.Parameter(torch.tensor(0.3))
    assert module.rule.mu is module.mu
    module.rule = mk.HeavyBall(0.5)
    assert module.rule == mk.HeavyBall(0.5)
    assert "mu" not in dict(module.named_parameters())
