"""Whole checkpoints under the authors' names: every weight has its place, or its name in an error.

All on the CPU in fp64, where the modules run the reference: what is tested is what goes where, with
which options, against the authors' equations in plain PyTorch.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import HEADS, MODELS, TOKENS, WIDE, D, E
from torch import Tensor, nn

import molex_kernels as mk
from molex_kernels import published

State = dict[str, Tensor]


def _made(name: str, seed: int) -> tuple[str, State, dict[str, object]]:
    kind, shapes, options = MODELS[name]
    return kind, checkpoints.make(shapes(), seed), options


def _tokens(generator: torch.Generator, *sizes: int) -> Tensor:
    return torch.randn(*sizes, generator=generator, dtype=torch.float64)


def _part(state: State, prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


# What the authors' code computes.


def _norm(x: Tensor, part: State, name: str) -> Tensor:
    return F.layer_norm(x, (D,), part[f"{name}.weight"], part[f"{name}.bias"])


def _experts(h: Tensor, part: State, index: Tensor, score: Tensor) -> Tensor:
    up, down = (
        (part[f"smoe.experts.{n}.weight"], part[f"smoe.experts.{n}.bias"])
        for n in ("htoh4", "h4toh")
    )
    every = torch.einsum("td,eid->tei", h, up[0]) + up[1]
    every = torch.einsum("tei,edi->ted", every.relu(), down[0]) + down[1]
    chosen = every.gather(1, index[..., None].expand(*index.shape, D))
    return (score[..., None] * chosen).sum(1)


def _logits(h: Tensor, part: State, kind: str) -> Tensor:
    if kind == "linear":
        return F.linear(h, part["smoe.gate.gate.weight"], part["smoe.gate.gate.bias"])
    if kind == "xmoe":
        h = F.linear(h, part["smoe.gate.inp_reduction.weight"])
    return h @ F.normalize(part["smoe.gate.expert_embeddings"], dim=1, eps=1e-4).T


def _route(logits: Tensor) -> tuple[Tensor, Tensor]:
    value, index = logits.topk(2)
    return index, value.softmax(-1)


def _cluster_weights(h: Tensor, index: Tensor) -> Tensor:
    """ACMoE's, by mean absolute deviations: one row to a token."""
    label, k = index[:, 0], int(index.max()) + 1
    rows = []
    for cluster in range(k):
        own = h[label == cluster]
        rows.append((own - own.mean(0)).abs().mean(0) if len(own) else torch.zeros(D))
    weights = 1 / (torch.stack(rows) + 1e-4)
    weights = weights.clamp(max=10 * weights.mean())
    return (weights / weights.mean(0))[label]


def test_momentum_layers_compute_what_the_authors_do(seed: int, generator: torch.Generator):
    state = checkpoints.make(checkpoints.language_model(["linear", "xmoe", "stable"]), seed)
    layers, _ = published.load("momentum-lm", state, rule=mk.HeavyBall(0.7, 0.9))
    x = expected = _tokens(generator, 7, D)
    carried, momentum = None, torch.zeros_like(x)
    for kind, (prefix, layer) in zip(("linear", "xmoe", "stable"), layers.items(), strict=True):
        x, carried, _ = layer(x, carried)
        part = _part(state, prefix)
        index, score = _route(_logits(expected, part, kind))
        momentum = 0.7 * momentum + 0.9 * _experts(expected, part, index, score)
        inner = _norm(expected - momentum, part, "smoe.layer_norm")
        expected = _norm(expected + inner, part, "norm2")
    torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def test_rules_by_layer(seed: int):
    state = checkpoints.make(checkpoints.language_model(["linear"] * 2), seed)
    rules = [mk.Adam(decay=1.0), mk.HeavyBall(0.7)]
    layers, _ = published.load("momentum-lm", state, rule=rules)
    assert [layer.rule for layer in layers.values()] == rules
    for others in (rules[:1], [*rules, rules[0]]):
        message = f"rule: expected one for each layer, got {len(others)} for 2 layers"
        with pytest.raises(ValueError, match=message):
            published.load("momentum-lm", state, rule=others)


def test_layers_that_there_are_not(seed: int):
    """Which would leave every layer as it is without a word."""
    state = checkpoints.make(checkpoints.vision(2), seed)
    for layers, error, message in (
        ((-1,), ValueError, "layers: expected at least 0 and at most 2, got -1"),
        ([0, 3], ValueError, "layers: expected at least 0 and at most 2, got 3"),
        (0, TypeError, "layers: expected the numbers of layers or None, got int"),
        ("0", TypeError, "layers: expected the numbers of layers or None, got str"),
    ):
        with pytest.raises(error, match=message):
            published.load("rpc-vit", state, num_heads=HEADS, layers=layers)


def test_how_many_layers_are_mixed(seed: int):
    kind, state, options = _made("molex-gpt2", seed)
    for layers_to_use, count in ((None, checkpoints.LAYERS), (12, checkpoints.LAYERS), (1, 1)):
        given = {**options, "layers_to_use": layers_to_use}
        ((_, stack),) = published.load(kind, state, **given).layers.items()
        assert stack.limit == count
    with pytest.raises(TypeError, match="layers_to_use: expected an int, got str"):
        published.load(kind, state, **{**options, "layers_to_use": "1"})


def test_a_key_that_is_no_name(seed: int):
    state = checkpoints.make(checkpoints.language_model(["linear"]), seed)
    with pytest.raises(TypeError, match="state_dict: expected tensors by name, got a key 0"):
        published.load("momentum-lm", {0: torch.ones(2), **state})


@pytest.mark.parametrize("cosine", [True, False])
def test_acmoe_layers_compute_what_the_authors_do(
    seed: int, generator: torch.Generator, cosine: bool
):
    state = checkpoints.make(checkpoints.language_model(["linear", "clusters"]), seed)
    layers, unused = published.load("acmoe-lm", state, cosine=cosine)
    x = expected = _tokens(generator, 40, D)
    previous, theirs = None, None
    for prefix, layer in layers.items():
        if isinstance(layer.router, mk.ACRouter):
            previous = layer.router(x, previous)
        x, _, previous = layer(x, routing=previous)
        part = _part(state, prefix)
        weighted, kind = expected, "linear"
        if theirs is not None:
            weighted = expected * _cluster_weights(expected, theirs)
            kind = "stable" if cosine else "linear"
        theirs, score = _route(_logits(weighted, part, kind))
        out = _experts(expected, part, theirs, score)
        expected = _norm(expected + _norm(expected + out, part, "smoe.layer_norm"), part, "norm2")
    # The statistics are fp32.
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)
    idle = "smoe.gate.gate.weight" if cosine else "smoe.gate.expert_embeddings"
    assert f"module.layers.1.{idle}" in unused


def _merged_weight(part: State, gates: Tensor) -> Tensor:
    """[S, E] gates to [S, O, D]: CAMEx with a curvature and the mask of TIES."""
    base, experts = part["res_weight"], part["weight"]
    deltas = experts - base
    mask = deltas.sign() == deltas.sum(0).sign()
    if "curve1_out" in part:
        o1, o2, i1, i2 = (part[f"curve{n}_{side}"] for side in ("out", "in") for n in (1, 2))
        shape = (E, o1.shape[-1], o2.shape[-1], i1.shape[-1], i2.shape[-1])
        deltas = torch.einsum(
            "reai,rebj,reck,redl,eijkl->eabcd", o1, o2, i1, i2, deltas.view(shape)
        ).reshape(experts.shape)
    return base + torch.einsum("se,eod->sod", gates, deltas * mask)


def _merged(
    x: Tensor, part: State, segment: int | None = None, task: Tensor | None = None
) -> Tensor:
    batch, length, width = x.shape
    pieces = x.reshape(-1, segment or length, width)
    seen = pieces
    if task is not None:
        seen = F.linear(task, part["task_proj.weight"], part["task_proj.bias"])
    gates = (seen.mean(1) @ part["w_gate"]).softmax(-1)
    if segment:
        gates = gates.view(batch, -1, E)
        gates = torch.cat((gates[:, :1], gates[:, :-1]), 1).flatten(0, 1)
    y = pieces @ _merged_weight(part, gates).mT
    if "bias" in part:
        delta = part["bias"] - part["res_bias"]
        mask = delta.sign() == delta.sum(0).sign()
        y = y + (part["res_bias"] + gates @ (delta * mask))[:, None]
    return y.view(batch, length, -1)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("camex")])
def test_merged_layers_compute_what_the_authors_do(
    name: str, seed: int, generator: torch.Generator
):
    kind, state, _ = _made(name, seed)
    segment = 3 if kind == "camex-gpt2" else None
    layers, _ = published.load(kind, state, **({"segment": segment} if segment else {}))
    one, two = ("c_fc.", "c_proj.") if segment else ("wi.", "wo.")
    x = _tokens(generator, 2, 6, D)
    options = {}
    if name.endswith("task"):
        segment, options = None, {"task": _tokens(generator, 2, 5, checkpoints.TASK)}
    for prefix, layer in layers.items():
        hidden = _merged(x, _part(state, prefix + one), segment, **options)
        hidden = F.gelu(hidden, approximate="tanh") if one == "c_fc." else hidden.relu()
        expected = _merged(hidden, _part(state, prefix + two), segment, **options)
        torch.testing.assert_close(layer.eval()(x, **options)[0], expected, rtol=1e-9, atol=1e-9)


def _heads(x: Tensor, part: State) -> Tensor:
    y = F.linear(x, part["qkv.weight"], part["qkv.bias"])
    return y.view(*x.shape[:2], -1, HEADS, D // HEADS).permute(2, 0, 3, 1, 4)


def _joined(heads: Tensor, part: State) -> Tensor:
    return F.linear(heads.transpose(1, 2).flatten(2), part["proj.weight"], part["proj.bias"])


def _softmax(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT / (D // HEADS) ** 0.5).softmax(-1)


@pytest.mark.parametrize("robust", [(0,), (1, 2), None])
def test_robust_attention_computes_what_the_authors_do(
    robust: tuple[int, ...] | None, seed: int, generator: torch.Generator
):
    state = checkpoints.make(checkpoints.vision(2), seed)
    options = {"num_heads": HEADS, "num_iters": 3, "lam": 0.3, "layers": robust}
    layers, _ = published.load("rpc-vit", state, **options)
    x = _tokens(generator, 2, TOKENS, D)
    for number, (prefix, layer) in enumerate(layers.items()):
        part = _part(state, prefix)
        k, v = _heads(x, part)
        if robust is None or number in robust:
            mu = TOKENS * D / (4 * k.abs().sum((-1, -2), keepdim=True))
            low, dual = torch.zeros_like(k), torch.zeros_like(k)
            for _ in range(3):
                sparse = F.softshrink(k - low + dual / mu, 0.0)
                sparse = sparse.sign() * (sparse.abs() - 0.3 * mu).clamp_min(0)
                clean = k - sparse - dual / mu
                low = _softmax(clean, clean) @ v
                dual = dual + mu * (k - low - sparse)
        else:
            low = _softmax(k, k) @ v
        torch.testing.assert_close(layer(x), _joined(low, part), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("scaled")])
def test_scaled_attention_computes_what_the_authors_do(
    name: str, seed: int, generator: torch.Generator
):
    kind, state, options = _made(name, seed)
    x = _tokens(generator, 2, TOKENS, D)
    for prefix, layer in published.load(kind, state, **options).layers.items():
        part = _part(state, prefix)
        q, k, v = _heads(x, part)
        s = part["s"] if part["s"].dim() == 3 else part["s"] * _softmax(k, k)
        expected = _joined(_softmax(q, k) @ (v - s @ v), part)
        torch.testing.assert_close(layer(x), expected, rtol=1e-9, atol=1e-9)


def _gpt2_norm(x: Tensor, part: State, name: str) -> Tensor:
    return F.layer_norm(x, (D,), part[f"{name}.weight"], part[f"{name}.bias"])


def _gpt2_block(x: Tensor, part: State) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        return x @ part[f"{name}.weight"] + part[f"{name}.bias"]

    inner = _gpt2_norm(x, part, "ln_1")
    q, k, v = linear(inner, "attn.c_attn").split(D, -1)
    if "attn.c_attn.lora_A" in part:
        a, b = part["attn.c_attn.lora_A"], part["attn.c_attn.lora_B"]
        rank = len(a) // 2
        q = q + 32 / rank * inner @ a[:rank].T @ b[:D].T
        v = v + 32 / rank * inner @ a[rank:].T @ b[D:].T
    heads = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v)]
    out = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
    x = x + linear(out, "attn.c_proj")
    hidden = F.gelu(linear(_gpt2_norm(x, part, "ln_2"), "mlp.c_fc"), approximate="tanh")
    return x + linear(hidden, "mlp.c_proj")


def _roberta_block(x: Tensor, part: State) -> Tensor:
    def linear(x: Tensor, name: str) -> Tensor:
        y = F.linear(x, part[f"{name}.weight"], part[f"{name}.bias"])
        if f"{name}.lora_A" not in part:
            return y
        a, b = part[f"{name}.lora_A"], part[f"{name}.lora_B"]
        return y + 16 / len(a) * x @ a.T @ b.T

    names = ("query", "key", "value")
    projected = (linear(x, f"attention.self.{name}") for name in names)
    heads = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in projected]
    out = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    x = _norm(x + linear(out, "attention.output.dense"), part, "attention.output.LayerNorm")
    inner = F.gelu(linear(x, "intermediate.dense"))
    return _norm(x + linear(inner, "output.dense"), part, "output.LayerNorm")


def _choice(x: Tensor, part: State) -> int:
    if "gate.sim_matrix" in part:
        z = F.linear(x, part["gate.cosine_projector.weight"], part["gate.cosine_projector.bias"])
        logits = F.normalize(z, dim=1) @ F.normalize(part["gate.sim_matrix"], dim=0)
    else:
        logits = F.linear(x, part["gate.weight"], part["gate.bias"])
    return int(logits.argmax(-1).flatten().mode().values)


@pytest.mark.parametrize("name", [n for n in MODELS if n.startswith("molex")])
def test_mixed_layers_compute_what_the_authors_do(name: str, seed: int, generator: torch.Generator):
    kind, state, options = _made(name, seed)
    ((prefix, stack),) = published.load(kind, state, **options).layers.items()
    x = _tokens(generator, 2, TOKENS, D)
    result = stack(x)
    shared = _part(state, prefix)
    layers, block = ("h", _gpt2_block) if kind == "molex-gpt2" else ("layer", _roberta_block)
    parts = [_part(shared, f"{layers}.{t}.") for t in range(checkpoints.LAYERS)]
    last = checkpoints.LAYERS - 1
    for t, part in enumerate(parts):
        main, chosen = block(x, part), t
        if t < options.get("layers_to_use", 12) and not (name.endswith("forward") and t == last):
            is_next = name.endswith("forward") and t == last - 1
            chosen = last if is_next else _choice(x, {**shared, **part})
            weights = torch.tensor([0.95, 0.05], dtype=torch.float64)
            if "weight_main" in part:
                weights = torch.cat((part["weight_main"], part["weight_other"])).softmax(0)
            elif "weight_main" in shared:
                weights = torch.cat((shared["weight_main"], shared["weight_other"]))
                weights = weights if layers == "h" else weights.softmax(0)  # raw there, see docs
            main = weights[0] * main + weights[1] * block(x, parts[chosen])
        x = main
        assert int(result.chosen[t]) == chosen
    torch.testing.assert_close(result.hidden, x, rtol=1e-9, atol=1e-9)


def test_a_stack_takes_what_it_has_a_place_for(seed: int):
    kind, state, options = _made("molex-gpt2", seed)
    ((prefix, stack),) = published.load(kind, state, **options).layers.items()
    before = {key: value.clone() for key, value in stack.state_dict().items()}
    other = checkpoints.make(checkpoints.mixed(weights=""), seed + 1)
    with pytest.raises(ValueError, match=rf"no place for '{re.escape(prefix)}weight_main'"):
        stack.load_published(other)
    assert all(torch.equal(before[key], value) for key, value in stack.state_dict().items())
    other = checkpoints.make(checkpoints.mixed(), seed + 1)
    both = {**state, **{key.replace("module.", "other."): one for key, one in other.items()}}
    with pytest.raises(ValueError, match=r"one of 'module\.transformer\.', 'other\."):
        stack.load_published(both)
    stack.load_published(both, prefix="other")
    after = stack.state_dict()["weights.up"]
    assert torch.equal(after[1], other[f"{prefix}h.1.mlp.c_fc.weight"])


# Every name is taken, returned, or in an error.


@pytest.mark.parametrize("name", MODELS)
def test_every_name_is_used_or_returned(name: str, seed: int):
    kind, state, options = _made(name, seed)
    layers, unused = published.load(kind, state, **options)
    model = published._KINDS[kind]
    owned = tuple(prefix + start for prefix in layers for start in model.owned)
    assert [key for key in state if key in set(unused)] == unused
    left = [key for key in unused if key.startswith(owned)]
    # The linear gate beside a cosine one, and the other way round; masks; gates that do not choose.
    idle = r"smoe\.gate\.(gate\.\w+|expert_embeddings)$|attn\.bias$|(h|layer)\.[12]\.gate\."
    assert all(re.search(idle, key) for key in left)
    some = kind in ("molex-gpt2", "acmoe-lm") or "xmoe" in name or name == "molex-roberta-each"
    assert bool(left) == some
    taken = sum(state[key].numel() for key in state if key not in set(unused))
    constants = sum(key.endswith((".mean", ".std")) for key in state)
    held = sum(p.numel() for layer in layers.values() for p in layer.parameters())
    if name == "molex-gpt2-forward":
        held -= 2  # the last layer's mixing weights
    assert held == taken - constants


def _missing(name: str, seed: int) -> tuple[str, State, dict[str, object], list[str]]:
    kind, state, options = _made(name, seed)
    layers, unused = published.load(kind, state, **options)
    last = list(layers)[-1]
    return kind, state, options, [k for k in state if k.startswith(last) and k not in set(unused)]


@pytest.mark.parametrize("name", MODELS)
def test_a_missing_name_is_named(name: str, seed: int):
    kind, state, options, own = _missing(name, seed)
    # Without them a layer is another one; the rest of it has no place there then.
    others = (
        "mean",
        "std",
        "qkv.bias",
        "c_fc.bias",
        "c_fc.curve1_out",
        "wi.curve1_out",
        "mlp.scale",
        "c_fc.task_proj.weight",
    )
    for key in own:
        if key.endswith((*others, "lora_A")) or (kind == "acmoe-lm" and "embeddings" in key):
            continue
        if "sim_matrix" in key or "weight_main" in key:
            continue
        with pytest.raises(ValueError, match=re.escape(_tail(key))):
            published.load(kind, {k: v for k, v in state.items() if k != key}, **options)


def _tail(key: str) -> str:
    return key.partition("smoe.gate.")[2] or ".".join(key.split(".")[-2:])


@pytest.mark.parametrize("name", MODELS)
def test_a_misshapen_tensor_is_named(name: str, seed: int):
    kind, state, options, own = _missing(name, seed)
    for key in own:
        if key.endswith((".mean", ".std")):
            continue
        for bad in (state[key][..., None], state[key].to(torch.int32)):
            with pytest.raises((ValueError, TypeError), match=rf"^{re.escape(key)}: expected"):
                published.load(kind, {**state, key: bad}, **options)


@pytest.mark.parametrize("name", MODELS)
def test_a_surplus_name_is_named(name: str, seed: int):
    kind, state, options = _made(name, seed)
    prefix = next(iter(published.load(kind, state, **options).layers))
    start = prefix + published._KINDS[kind].owned[0]
    more = {**state, f"{start}more": torch.ones(2)}
    with pytest.raises(ValueError, match=re.escape(f"'{start}more'; strict=False leaves")):
        published.load(kind, more, **options)
    assert f"{start}more" in published.load(kind, more, strict=False, **options).unused


def test_constants_that_are_none(seed: int):
    state = checkpoints.make(checkpoints.t5(), seed)
    key = next(k for k in state if k.endswith("wi.std"))
    with pytest.raises(ValueError, match=rf"{re.escape(key)}' to be 1\.0"):
        published.load("camex-t5", {**state, key: torch.zeros(1)})


def test_layers_in_the_order_of_their_numbers(seed: int):
    state = checkpoints.make(checkpoints.language_model(["linear"] * 11, ""), seed)
    layers, _ = published.load("momentum-lm", dict(sorted(state.items())))
    assert list(layers) == [f"layers.{number}." for number in range(11)]


@pytest.mark.parametrize("name", MODELS)
def test_dtypes(name: str, seed: int):
    kind, shapes, options = MODELS[name]
    state = checkpoints.make(shapes(), seed, torch.bfloat16)
    for dtype in (None, torch.float32):
        layers, _ = published.load(kind, state, **options, dtype=dtype)
        # Mixing weights are fp32 at least.
        held = [entry for layer in layers.values() for entry in layer.named_parameters()]
        kinds = {p.dtype for own, p in held if own != "mixing"}
        assert kinds == {dtype or torch.bfloat16}


def test_what_load_refuses(seed: int):
    state = checkpoints.make(checkpoints.vision(2), seed)
    with pytest.raises(ValueError, match="kind: expected one of"):
        published.load("rpc", state)
    with pytest.raises(TypeError, match=r"mu: expected an option of 'rpc-vit'"):
        published.load("rpc-vit", state, mu=1.0)
    with pytest.raises(ValueError, match=f"num_heads: .* a width of {D}"):
        published.load("rpc-vit", state)
    with pytest.raises(ValueError, match="expected names of 'camex-t5'"):
        published.load("camex-t5", state)
    with pytest.raises(TypeError, match="state_dict: expected tensors by name"):
        published.load("rpc-vit", [state])
    with pytest.raises(TypeError, match="strict"):
        published.load("rpc-vit", state, strict=1)


def test_kinds_have_their_defaults():
    assert set(published.kinds()) == {kind for kind, _, _ in MODELS.values()}
    assert published.kinds()["rpc-vit"]["layers"] == (0,)


# One layer out of a whole model.

ONE: dict[str, tuple[str, str, nn.Module]] = {
    "TopKRouter": ("momentum-lm", "module.layers.1.smoe", mk.TopKRouter(D, E, 2, bias=True)),
    "MoEMLP": ("momentum-lm", "module.layers.1.", mk.MoEMLP(D, WIDE, E)),
    "MomentumMoE": (
        "momentum-lm",
        "module.layers.1",
        mk.MomentumMoE(D, WIDE, E, 2, mk.HeavyBall(0.7)),
    ),
    "CosineRouter": ("momentum-lm-xmoe", "module.layers.0.", mk.CosineRouter(D, E, 2)),
    "ACRouter": ("acmoe-lm", "module.layers.2.", mk.ACRouter(D, E, 2, cosine=True)),
    "CAMExMLP": (
        "camex-t5",
        "decoder.block.1.layer.2.DenseReluDense",
        mk.CAMExMLP(D, WIDE, E, rank=checkpoints.RANK),
    ),
    "CAMExLinear": (
        "camex-t5",
        "encoder.block.0.layer.1.DenseReluDense.wi.",
        mk.CAMExLinear(D, WIDE, E, rank=checkpoints.RANK),
    ),
    "RPCAttention": ("rpc-vit", "blocks.1.attn", mk.RPCAttention(D, HEADS, qkv_bias=True)),
    "ScaledAttention": ("scaled-vit", "blocks.2", mk.ScaledAttention(D, HEADS, qkv_bias=True)),
}


@pytest.mark.parametrize("name", ONE)
def test_a_prefix_takes_one_layer(name: str, seed: int):
    model, prefix, module = ONE[name]
    _, state, _ = _made(model, seed)
    state = {key: value.bfloat16() for key, value in state.items()}
    start = prefix.rstrip(".") + "."
    alone = copy.deepcopy(module)
    module.load_published(state, prefix=prefix)
    alone.load_published(_part(state, start))
    for key, value in module.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, alone.state_dict()[key])
        whole = [v for k, v in state.items() if k.startswith(start) and v.shape == value.shape]
        assert any(torch.equal(value, one.float()) for one in whole), key


@pytest.mark.parametrize("name", ONE)
def test_a_whole_model_without_a_prefix_names_the_prefixes(name: str, seed: int):
    model, prefix, module = ONE[name]
    _, state, _ = _made(model, seed)
    if name in ("CosineRouter", "ACRouter"):  # the only layer of its kind there
        state |= {k.replace("layers.", "layers.1"): v for k, v in state.items()}
    before = {key: value.clone() for key, value in module.state_dict().items()}
    with pytest.raises(ValueError, match="state_dict: expected one name ending in") as error:
        module.load_published(state)
    assert "prefix= takes one layer out" in str(error.value)
    assert "'" + prefix.rstrip(".").rpartition(".")[0] in str(error.value)
    with pytest.raises(ValueError, match=r"prefix: expected what names .*'nowhere\.'"):
        module.load_published(state, prefix="nowhere")
    with pytest.raises(TypeError, match="prefix: expected a str"):
        module.load_published(state, prefix=1)
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize(
    ("module", "key", "more"),
    [
        (mk.TopKRouter(D, E, 2), "gate.weight", "gate.bias"),
        (mk.TopKRouter(D, E, 2), "gate.weight", "expert_embeddings"),
        (mk.ACRouter(D, E, 2, cosine=True), "expert_embeddings", "inp_reduction.weight"),
        (mk.MoEMLP(D, WIDE, E, bias=False), "htoh4.weight", "htoh4.bias"),
        (mk.RPCAttention(D, HEADS), "qkv.weight", "qkv.bias"),
        (mk.RPCAttention(D, HEADS), "qkv.weight", "s"),
        (mk.CAMExLinear(D, WIDE, E, rank=0), "weight", "curve1_in"),
        (mk.CAMExLinear(D, WIDE, E, rank=0), "weight", "task_proj.weight"),
        (mk.MomentumMoE(D, WIDE, E, 2, mk.HeavyBall(0.7)), "", "smoe.gate.expert_embeddings"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_weights_without_a_place_are_not_dropped(module: nn.Module, key: str, more: str):
    names = {
        "weight": "gate.weight",
        "w_up": "htoh4.weight",
        "w_down": "h4toh.weight",
        "w_gate": "w_gate",
        "w_noise": "w_noise",
        "experts": "weight",
        "base": "res_weight",
    }
    if isinstance(module, mk.MomentumMoE):
        shapes = checkpoints.language_model(["linear"], "")
        state = _part(checkpoints.make(shapes, 0), "layers.0.")
    elif key == "expert_embeddings":
        state = {key: torch.ones(E, D)}
    else:
        state = {names.get(n, n): p.detach().clone() for n, p in module.named_parameters()}
    module.load_published(state)
    with pytest.raises(ValueError, match=rf"has no place for '{re.escape(more)}'"):
        module.load_published({**state, more: torch.ones(2)})


def test_the_table_has_every_name():
    text = (Path(__file__).parents[1] / "docs" / "published.md").read_text()
    for kind in published.kinds():
        assert f"| `{kind}` |" in text
    for name, (kind, shapes, options) in MODELS.items():
        for prefix in published.load(kind, checkpoints.make(shapes(), 0), **options).layers:
            owned = tuple(prefix + start for start in published._KINDS[kind].owned)
            for key in shapes():
                if not key.startswith(owned):
                    continue
                row = re.sub(r"^(h|layer)\.\d+\.", "", key.removeprefix(prefix))
                row = re.sub(r"^(smoe\.gate|wi|wo|c_fc|c_proj)\.", "", row)
                row = re.sub(r"^experts\.\d+\.", "experts.N.", row)
                assert f"`{row}`" in text, (name, key)
