"""Bad input to every public function: the error names the argument, before anything is computed."""

from __future__ import annotations

import math

import pytest
import torch

import molex_kernels as mk

X = torch.zeros(6, 4)
GATE = torch.zeros(3, 4)
INDEX = torch.zeros(6, 2, dtype=torch.int64)
WEIGHT = torch.zeros(6, 2)
CLUSTER = torch.zeros(6, dtype=torch.int64)
UP, DOWN = torch.zeros(3, 5, 4), torch.zeros(3, 4, 5)
ENDS = torch.tensor([2, 4, 6], dtype=torch.int32)
PLAN = mk.route_plan(INDEX, 3)


def _topk(x=X, gate=GATE, **options):
    return mk.topk_route(x, gate, **{"top_k": 2, **options})


def _weights(x=X, cluster=CLUSTER, num_clusters=3, **options):
    return mk.ac_weights(x, cluster, num_clusters, **options)


def _ac(x=X, gate=GATE, index=INDEX, weight=None, **options):
    return mk.ac_route(x, gate, index, weight, **{"top_k": 2, **options})


def _bias(bias=X[0, :3], counts=CLUSTER[:3], **options):
    return mk.update_expert_bias(bias, counts, **{"rate": 0.1, **options})


def _mlp(x=X, index=INDEX, weight=WEIGHT, up=UP, down=DOWN, **options):
    return mk.moe_mlp(x, index, weight, up, down, **options)


def _gemm(x=X, weight=UP, offsets=ENDS, **options):
    return mk.grouped_gemm(x, weight, offsets, **options)


BALL = mk.HeavyBall(0.7)


def _momentum(x=X, f=X, state=None, rule=BALL, **options):
    return mk.momentum_update(x, f, state, rule, **options)


def _moe_momentum(x=X, index=INDEX, weight=WEIGHT, state=None, rule=BALL, **options):
    return mk.moe_mlp_momentum(x, index, weight, UP, DOWN, state, rule, **options)


BASE, EXPERTS = torch.zeros(6, 4), torch.zeros(3, 6, 4)
SEGMENTS, GATES = torch.zeros(2, 5, 4), torch.zeros(2, 3)
CURVATURE = mk.KroneckerCurvature.identity(3, 6, 4, 2)
WIDE = CURVATURE._replace(in1=torch.zeros(2, 3, 3, 3))


def _camex(x=SEGMENTS, base=BASE, experts=EXPERTS, gates=GATES, **options):
    return mk.camex_linear(x, base, experts, gates, **options)


BASES, MIXTURE = (BASE, BASE.mT), (EXPERTS, EXPERTS.mT)
CURVATURES = (CURVATURE, mk.KroneckerCurvature.identity(3, 4, 6, 2))


def _whole(x=SEGMENTS, base=BASES, experts=MIXTURE, gates=GATES, **options):
    return mk.camex_experts(x, base, experts, gates, **options)


def _kept(base=BASES, experts=MIXTURE, **options):
    return mk.camex_experts_deltas(base, experts, **options)


def _deltas(base=BASE, experts=EXPERTS, **options):
    return mk.camex_deltas(base, experts, **options)


def _merge(gates=GATES, **options):
    return mk.camex_merge(BASE, EXPERTS, gates, **options)


def _gates(**options):
    return mk.noisy_topk_gates(X, GATE.T, top_k=2, training=False, **options)


HEADS = torch.zeros(2, 3, 5, 4)
BOUND = torch.zeros(2, 3)


def _rpc(k=HEADS, v=HEADS, **options):
    return mk.rpc_attention(k, v, **{"num_iters": 2, "lam": 1.0, **options})


def _scaled(q=HEADS, k=HEADS, v=HEADS, s=BOUND[0, 0], **options):
    return mk.scaled_attention(q, k, v, s, **options)


TYPE = [
    (lambda: mk.route_from_logits(INDEX, top_k=1), "logits: expected dtype"),
    (lambda: mk.route_from_logits(X, top_k=1, expert_bias=INDEX[0]), "expert_bias: expected dtype"),
    (lambda: mk.route_from_index(X, X), "expert_index: expected dtype"),
    (lambda: _topk(num_groups=3), "top_groups: expected an int, got NoneType"),
    (lambda: _topk(renormalize=1), "renormalize: expected a bool, got int"),
    (lambda: _topk(scaling="x"), "scaling: expected a number, got str"),
    (lambda: _topk(x=X.long()), "x: expected dtype"),
    (lambda: _topk(x=[1.0]), "x: expected a tensor"),
    (lambda: _topk(gate=GATE.half()), "gate_weight: expected dtype"),
    (lambda: _topk(top_k=1.5), "top_k: expected an int"),
    (lambda: _topk(gate_bias=torch.zeros(3).half()), "gate_bias: expected dtype"),
    (lambda: _weights(cluster=CLUSTER.float()), "cluster: expected dtype"),
    (lambda: _weights(num_clusters="3"), "num_clusters: expected an int"),
    (lambda: _ac(index=INDEX.float()), "prev_index: expected dtype"),
    (lambda: _ac(weight=INDEX), "prev_weight: expected dtype"),
    (lambda: _ac(stats_from=X.half()), "stats_from: expected dtype"),
    (lambda: mk.route_plan(INDEX.float(), 3), "expert_index: expected dtype"),
    (lambda: mk.router_z_loss(INDEX), "logits: expected dtype"),
    (lambda: mk.ACRouter(4, 3, 2)(X, token_mask=CLUSTER), "token_mask: expected dtype bool"),
    (lambda: mk.router_z_loss(X, mask=INDEX[:, 0]), "mask: expected dtype bool, got int64"),
    (lambda: mk.router_z_loss(X, mask=[True] * 6), r"mask: expected a tensor \[T\], got list"),
    (lambda: mk.load_balance_loss(_topk(), mask=X[:, 0]), "mask: expected dtype bool, got float32"),
    (
        lambda: mk.load_balance_loss(_topk(), sequence=X[:, 0]),
        "sequence: expected dtype int64 or int32, got float32",
    ),
    (lambda: mk.load_balance_loss(_topk(), process_group=0), "process_group: expected a torch"),
    (lambda: mk.router_z_loss(X, process_group="gloo"), "process_group: expected a torch"),
    (lambda: _bias(bias=CLUSTER[:3]), "expert_bias: expected dtype"),
    (lambda: _bias(counts=[1, 2, 3]), r"counts: expected a tensor \[E\], got list"),
    (lambda: _bias(rate="x"), "rate: expected a number, got str"),
    (lambda: _bias(process_group=3), "process_group: expected a torch.distributed.ProcessGroup"),
    (lambda: _mlp(index=INDEX.float()), "expert_index: expected dtype"),
    (lambda: _mlp(weight=WEIGHT.half()), "expert_weight: expected dtype"),
    (lambda: _mlp(up=UP.half()), "w_up: expected dtype"),
    (lambda: _mlp(b_up=torch.zeros(3, 5).half()), "b_up: expected dtype"),
    (lambda: _gemm(offsets=ENDS.long()), "offsets: expected dtype int32"),
    (lambda: _momentum(x=X.long()), "x: expected dtype"),
    (lambda: _momentum(x=1.0), "x: expected a tensor"),
    (lambda: _momentum(f=X.double()), "f: expected dtype"),
    (lambda: _momentum(f=None), "f: expected a tensor of the shape of x"),
    (lambda: _momentum(rule=0.7), "rule: expected a rule"),
    (lambda: _momentum(state=X), "state: expected a tuple"),
    (lambda: _momentum(state=(X.half(),)), r"state\.m: expected dtype float32, got float16"),
    (lambda: _momentum(state=(None,)), r"state\.m: expected a tensor"),
    (lambda: _momentum(state=(X, X.half()), rule=mk.Adam(), x=X.half()), r"state\.v: expected dty"),
    (lambda: _momentum(state=(X, X, X, X), rule=mk.AdEMAMix()), r"state\.step: expected an int"),
    (lambda: _momentum(norm=X[0]), "norm: expected"),
    (lambda: _momentum(norm=(X[0].half(), None, 1e-5)), r"norm\.weight: expected dtype"),
    (lambda: _momentum(norm=(None, None, None)), r"norm\.eps: expected a number"),
    (lambda: mk.HeavyBall("0.7"), "mu: expected a number"),
    (lambda: mk.HeavyBall(INDEX[0, 0]), "mu: expected dtype float16 or .* got int64"),
    (lambda: mk.AdEMAMix(alpha_warmup=2.5), "alpha_warmup: expected an int"),
    (lambda: _moe_momentum(index=INDEX.float()), "expert_index: expected dtype"),
    (lambda: _moe_momentum(weight=None), "expert_weight: expected a tensor"),
    (lambda: _moe_momentum(dropout_p=0.1, dropout_seed=X[0, 0]), "dropout_seed: expected dtype"),
    (lambda: _moe_momentum(expert_input=X.double()), "expert_input: expected dtype"),
    (lambda: mk.MomentumMoE(4, 4, 3, 2, 0.7), "rule: expected a rule"),
    (lambda: _camex(x=SEGMENTS.long()), "x: expected dtype"),
    (lambda: _camex(base=BASE.half()), "base: expected dtype"),
    (lambda: _camex(gates=GATES.long()), "gates: expected dtype"),
    (lambda: _merge(normalize=1), "normalize: expected a bool, got int"),
    (lambda: _merge(density="half"), "density: expected a number, got str"),
    (lambda: _gates(mask=CLUSTER), "mask: expected dtype bool, got int64"),
    (
        lambda: mk.CAMExMLP(4, 6, 3)(SEGMENTS, token_mask=SEGMENTS[..., 0]),
        "token_mask: expected dtype bool, got float32",
    ),
    (lambda: _camex(experts=None), "experts: expected a tensor"),
    (lambda: _camex(bias=torch.zeros(3, 6)), r"base_bias: expected a tensor \[O\]"),
    (lambda: _camex(bias_curvature=CURVATURE[:2]), r"bias: expected a tensor \[E, O\]"),
    (lambda: _camex(curvature=list(CURVATURE)), "curvature: expected a KroneckerCurvature"),
    (lambda: _camex(curvature=CURVATURE[:2]), "curvature: expected a KroneckerCurvature"),
    (lambda: _camex(alpha="1"), "alpha: expected a number"),
    (lambda: _deltas(curvature=CURVATURE._replace(in2=None)), "curvature.in2: expected a tensor"),
    (lambda: _whole(base=BASE), r"base: expected a pair \(up, down\), got Tensor"),
    (lambda: _whole(base=BASES[:1]), r"base: expected a pair \(up, down\), got tuple of 1"),
    (lambda: _whole(base=(BASE, None)), r"base\.down: expected a tensor"),
    (
        lambda: _whole(base=(BASE, BASE.mT.half())),
        r"base\.down: expected dtype float32, got float16",
    ),
    (lambda: _whole(experts=None), r"experts: expected a pair \(up, down\), got NoneType"),
    (lambda: _whole(experts=(EXPERTS, None)), r"experts\.down: expected a tensor"),
    (lambda: _whole(experts=3 * MIXTURE), r"experts: expected a pair .*, got tuple of 6"),
    (
        lambda: _whole(curvature=CURVATURE),
        r"curvature: expected a pair .* got KroneckerCurv.* of 4",
    ),
    (
        lambda: _whole(curvature=(None, 3)),
        r"curvature\.down: expected a KroneckerCurvature, got int",
    ),
    (lambda: _whole(gates=(GATES, None)), r"gates\.down: expected a tensor"),
    (lambda: _whole(gates=None), r"gates: expected a tensor \[S, E\]"),
    (lambda: _whole(gates=3 * (GATES,)), r"gates: expected a pair .*, got tuple of 3"),
    (lambda: _whole(bias=GATES), r"bias: expected a pair \(up, down\), got Tensor"),
    (lambda: _whole(bias=(torch.zeros(3, 6), None)), r"base_bias\.up: expected a tensor \[O\]"),
    (lambda: _whole(base_bias=(None, 1.0)), r"base_bias\.down: expected a tensor"),
    (
        lambda: _whole(bias_curvature=(None, CURVATURE[:2])),
        r"bias\.down: expected a tensor \[E, O\] where a bias_curvature",
    ),
    (lambda: _whole(deltas=EXPERTS), r"deltas: expected a pair \(up, down\), got Tensor"),
    (lambda: _whole(experts=None, deltas=(EXPERTS, BASE.long())), r"deltas\.down: expected dtype"),
    (lambda: _whole(deltas=_kept(), curvature=(None, 3)), r"curvature\.down: expected a Kronecker"),
    (lambda: _whole(x=SEGMENTS.half(), deltas=_kept()), r"base\.up: expected dtype float16"),
    (lambda: _whole(alpha="1"), "alpha: expected a number"),
    (lambda: _kept(experts=EXPERTS), r"experts: expected a pair \(up, down\), got Tensor"),
    (lambda: _kept(base=(BASE, BASE.mT.half())), r"experts\.down: expected dtype float16"),
    (
        lambda: _kept(base=(BASE, BASE.mT.half()), experts=(EXPERTS, EXPERTS.mT.half())),
        r"base\.down: expected dtype float32, got float16",
    ),
    (lambda: _kept(curvature=(None, CURVATURE[:2])), r"curvature\.down: expected a Kronecker"),
    (lambda: _deltas(experts=EXPERTS.half()), "experts: expected dtype"),
    (lambda: mk.noisy_topk_gates(X, GATE.T, top_k=1.0, training=False), "top_k: expected an int"),
    (lambda: mk.segment_gates(GATES[None].long()), "gates: expected dtype"),
    (lambda: mk.cv_squared_loss([1.0]), "gates: expected a tensor"),
    (lambda: mk.propagate_base(BASE, EXPERTS, "1"), "gamma: expected a number"),
    (lambda: _rpc(k=HEADS.long()), "k: expected dtype"),
    (lambda: _rpc(k=None), r"k: expected a tensor \[B, H, N, d\]"),
    (lambda: _rpc(v=HEADS.half()), "v: expected dtype float32, got float16"),
    (lambda: _rpc(q=HEADS.half()), "q: expected dtype float32"),
    (lambda: _rpc(num_iters=2.0), "num_iters: expected an int"),
    (lambda: _rpc(lam=None), "lam: expected a number, got NoneType"),
    (lambda: _rpc(threshold=BOUND.half()), "threshold: expected dtype float32"),
    (lambda: _rpc(threshold=None), "threshold: expected a number"),
    (lambda: _rpc(mu_width=2.0), "mu_width: expected an int"),
    (lambda: _rpc(key_mask=HEADS[:, 0, :, 0]), "key_mask: expected dtype bool"),
    (lambda: _rpc(scale="1"), "scale: expected a number"),
    (lambda: _rpc(dropout_p=0.1, dropout_seed=X[0, 0]), "dropout_seed: expected dtype"),
    (lambda: _scaled(k=HEADS.half()), "k: expected dtype"),
    (lambda: _scaled(s=0.5), r"s: expected a tensor \[H, N, N\]"),
    (lambda: _scaled(s=INDEX[0, 0]), "s: expected dtype"),
]
VALUE = [
    (lambda: mk.route_from_logits(X, top_k=5), "top_k: expected at least 1 and at most 4 experts"),
    (lambda: mk.route_from_logits(X[:, :0], top_k=1), "logits: expected shape .* at least 1"),
    (lambda: mk.route_from_index(X, INDEX[:5]), "expert_index: expected shape"),
    (lambda: mk.route_from_index(X, INDEX, score="tanh"), "score: expected one of"),
    (lambda: _topk(num_groups=2, top_groups=1), "num_groups: expected a divisor of the 3 .* got 2"),
    (lambda: _topk(top_groups=1), "top_groups: expected None without num_groups, got 1"),
    (lambda: _topk(num_groups=3, top_groups=4), "top_groups: expected at least 1 and at most 3"),
    (lambda: _topk(num_groups=3, top_groups=1), "top_k: expected at most the 1 experts .* got 2"),
    (lambda: _topk(scaling=math.inf), "scaling: expected a finite number, got inf"),
    (lambda: _topk(x=X[None]), r"x: expected shape \[T, D\], got \[1, 6, 4\]"),
    (lambda: _topk(gate=GATE[:, :3]), "gate_weight: expected shape .* with D=4"),
    (lambda: _topk(gate=GATE[:0]), "gate_weight: expected at least one expert"),
    (lambda: _topk(gate=GATE.to("meta")), "gate_weight: expected device cpu, got meta"),
    (lambda: _topk(top_k=4), "top_k: expected at least 1 and at most 3"),
    (lambda: _topk(top_k=0), "top_k: expected at least 1"),
    (lambda: _topk(score="relu"), "score: expected one of"),
    (lambda: _topk(expert_bias=torch.zeros(4)), "expert_bias: expected shape"),
    (lambda: _topk(impl="fast"), "impl: expected one of"),
    (lambda: _weights(cluster=CLUSTER[:5]), "cluster: expected shape"),
    (lambda: _weights(num_clusters=0), "num_clusters: expected at least 1"),
    (lambda: _weights(recipe="vit"), "recipe: expected one of"),
    (lambda: _weights(stat="std"), "stat: expected one of"),
    (lambda: _weights(norm="l2"), "norm: expected one of"),
    (lambda: _weights(empty="drop"), "empty: expected one of"),
    (lambda: _weights(eps=0.0), "eps: expected .* above 0"),
    (lambda: _weights(eps=math.nan), "eps: expected a finite number"),
    (lambda: _weights(clip=-1.0), "clip: expected"),
    (lambda: _weights(clip=math.nan), "clip: expected"),
    (lambda: _ac(index=INDEX[:5]), "prev_index: expected shape"),
    (lambda: _ac(mix=True), "prev_weight: expected a tensor"),
    (lambda: _ac(cosine=True, gate_bias=torch.zeros(3)), "gate_bias: expected None"),
    (lambda: _ac(stats_from=X[:5]), "stats_from: expected shape"),
    (lambda: mk.route_plan(INDEX[0], 3), "expert_index: expected shape"),
    (lambda: mk.route_plan(INDEX, 0), "num_experts: expected at least 1"),
    (lambda: mk.load_balance_loss(_topk(), temperature=0.0), "temperature: expected"),
    (lambda: mk.load_balance_loss(_topk(), kind="gshard"), "kind: expected one of"),
    (
        lambda: mk.ACRouter(4, 3, 2)(X, token_mask=X == 0),
        r"token_mask: expected shape \[...\] with ...=6, got \[6, 4\]",
    ),
    (lambda: _merge(mask="ties", elect="count"), "elect: expected one of 'unweighted', 'weighted'"),
    (lambda: _merge(elect="weighted"), "mask: expected 'ties' with elect='weighted', got None"),
    (lambda: _merge(density=0.0), "density: expected a finite number above 0"),
    (lambda: _merge(density=1.5), "density: expected above 0 and at most 1, got 1.5"),
    (lambda: _merge(density=math.nan), "density: expected a finite number above 0"),
    (lambda: _gates(mask=X[:5, 0] == 0), r"mask: expected shape \[S\] with S=6, got \[5\]"),
    (
        lambda: mk.CAMExLinear(4, 6, 3)(SEGMENTS, token_mask=X == 0),
        r"token_mask: expected shape \[B, L\] with B=2, L=5, got \[6, 4\]",
    ),
    (
        lambda: mk.load_balance_loss(_topk(), mask=X[:5, 0] == 0),
        r"mask: expected shape \[T\] with T=6, got \[5\]",
    ),
    (lambda: mk.router_z_loss(X, mask=X == 0), r"mask: expected shape \[T\] with T=6, got \[6, 4"),
    (lambda: mk.router_z_loss(X[0]), "logits: expected shape"),
    (
        lambda: mk.load_balance_loss(_topk(), sequence=CLUSTER[:5]),
        r"sequence: expected shape \[T\] with T=6, got \[5\]",
    ),
    (lambda: _bias(counts=CLUSTER[:2]), r"counts: expected shape \[E\] with E=3, got \[2\]"),
    (lambda: _bias(rate=-0.1), "rate: expected a finite number at least 0"),
    (lambda: _mlp(index=INDEX[:5]), "expert_index: expected shape"),
    (lambda: _mlp(weight=WEIGHT[:, :1]), "expert_weight: expected shape"),
    (lambda: _mlp(up=UP[:, :, :3]), "w_up: expected shape"),
    (lambda: _mlp(down=DOWN[:, :3]), "w_down: expected shape"),
    (lambda: _mlp(activation="mish"), "activation: expected one of"),
    (lambda: _mlp(activation="swiglu", gate_layout="split"), "gate_layout: expected one of"),
    (lambda: _mlp(activation="swiglu"), "w_up: expected"),
    (lambda: _mlp(b_up=torch.zeros(3, 4)), "b_up: expected shape"),
    (lambda: _mlp(b_down=torch.zeros(3, 5)), "b_down: expected shape"),
    (lambda: _mlp(plan=mk.route_plan(INDEX[:5], 3)), "plan"),
    (lambda: _mlp(index=INDEX.to("meta")), "expert_index: expected device cpu, got meta"),
    (lambda: _gemm(weight=UP[0]), "weight: expected shape"),
    (lambda: _gemm(offsets=ENDS[:2]), "offsets: expected shape"),
    (lambda: _gemm(bias=torch.zeros(3, 4)), "bias: expected shape"),
    (lambda: _camex(x=SEGMENTS[0]), r"x: expected shape \[S, T, D\]"),
    (lambda: _camex(base=BASE[:, :3]), "base: expected shape .* with D=4"),
    (lambda: _camex(experts=EXPERTS[:, :5]), "experts: expected shape"),
    (lambda: _camex(experts=EXPERTS[:0]), "experts: expected shape .* E at least 1"),
    (lambda: _camex(gates=GATES[:1]), "gates: expected shape .* with S=2, E=3"),
    (lambda: _camex(gates=GATES[:, :2]), "gates: expected shape .* with S=2, E=3"),
    (lambda: _camex(gates=GATES[None]), r"gates: expected shape \[S, E\]"),
    (lambda: _camex(mask="dare"), "mask: expected one of None, 'ties', got 'dare'"),
    (lambda: _camex(deltas=EXPERTS), "experts: expected None where deltas are given"),
    (
        lambda: _camex(experts=None, deltas=EXPERTS, curvature=CURVATURE),
        "curvature: expected None where deltas",
    ),
    (lambda: _camex(experts=None, deltas=BASE), "deltas: expected shape"),
    (lambda: _whole(x=SEGMENTS[0]), r"x: expected shape \[S, T, D\]"),
    (
        lambda: _whole(base=(BASE, BASE)),
        r"base\.down: expected shape .* with O=4, D=6, got \[6, 4\]",
    ),
    (lambda: _whole(base=(BASE, BASE.mT[:, :5])), r"base\.down: expected shape .* with O=4, D=6"),
    (lambda: _whole(base=(BASE, BASE.mT[:3])), r"base\.down: expected shape .* with O=4, D=6"),
    (
        lambda: _whole(experts=(EXPERTS, EXPERTS)),
        r"experts\.down: expected shape .* got \[3, 6, 4\]",
    ),
    (
        lambda: _whole(experts=(EXPERTS, EXPERTS.mT[:2])),
        r"experts\.down: expected shape .* with E=3.*, got \[2, 4, 6\]",
    ),
    (lambda: _whole(gates=GATES[:1]), "gates: expected shape .* with S=2, E=3"),
    (lambda: _whole(gates=(GATES, GATES[:, :2])), r"gates\.down: expected shape .* with S=2, E=3"),
    (lambda: _whole(activation="swiglu"), "activation: expected one of 'relu', .* got 'swiglu'"),
    (lambda: _whole(mask="dare"), "mask: expected one of None, 'ties', got 'dare'"),
    (lambda: _whole(expert_dropout=1.0), "expert_dropout: expected"),
    (
        lambda: _whole(curvature=(CURVATURE, CURVATURE)),
        r"curvature\.down: expected out1 and out2 of sizes whose product is O=4",
    ),
    (
        lambda: _whole(bias=(None, torch.zeros(3, 6)), base_bias=(None, torch.zeros(4))),
        r"bias\.down: expected shape .* with E=3, O=4",
    ),
    (lambda: _whole(deltas=MIXTURE), r"experts\.up: expected None where deltas are given"),
    (
        lambda: _whole(experts=None, deltas=MIXTURE, curvature=CURVATURES),
        r"curvature\.up: expected None where deltas are given",
    ),
    (
        lambda: _whole(experts=None, deltas=(EXPERTS, EXPERTS.mT[:2])),
        r"deltas\.down: expected shape .* with E=3",
    ),
    (lambda: _whole(deltas=_kept(), mask="ties"), "mask: expected that of the deltas, None, got"),
    (lambda: _whole(deltas=_kept(), base=(BASE, BASE.mT)), r"base\.down: expected the tensor of"),
    (lambda: _whole(x=SEGMENTS.to("meta"), deltas=_kept()), r"base\.up: expected device meta, got"),
    (
        lambda: _kept(base=(BASE, BASE)),
        r"base\.down: expected shape .* with O=4, D=6, got \[6, 4\]",
    ),
    (
        lambda: _kept(experts=(EXPERTS[:0], EXPERTS.mT)),
        r"experts\.up: expected shape .* E at least 1",
    ),
    (lambda: _kept(mask="dare"), "mask: expected one of None, 'ties', got 'dare'"),
    (
        lambda: _kept(base=(BASE.to("meta"), BASE.mT), experts=(EXPERTS.to("meta"), EXPERTS.mT)),
        r"base\.down: expected device meta, got cpu",
    ),
    (lambda: _camex(alpha=math.nan), "alpha: expected a finite number"),
    (lambda: _camex(expert_dropout=1.0), "expert_dropout: expected at least 0 and below 1"),
    (lambda: _camex(expert_dropout=-0.1), "expert_dropout: expected"),
    (lambda: _camex(base_bias=torch.zeros(5)), "base_bias: expected shape"),
    (
        lambda: _camex(bias=torch.zeros(3, 5), base_bias=torch.zeros(6)),
        "bias: expected shape .* with E=3, O=6",
    ),
    (
        lambda: _camex(
            bias=torch.zeros(3, 6), base_bias=torch.zeros(6), bias_curvature=CURVATURE[2:]
        ),
        "bias_curvature: expected out1 and out2 of sizes whose product is O=6, got 2 and 2",
    ),
    (
        lambda: _deltas(curvature=WIDE),
        "curvature: expected in1 and in2 of sizes whose product is D=4, got 3 and 2",
    ),
    (
        lambda: _deltas(curvature=mk.KroneckerCurvature.identity(3, 4, 4, 2)),
        "curvature: expected out1 and out2 of sizes whose product is O=6, got 2 and 2",
    ),
    (
        lambda: _deltas(curvature=mk.KroneckerCurvature.identity(2, 6, 4, 1)),
        "curvature.out1: expected shape .* with r=1, E=3",
    ),
    (lambda: _deltas(curvature=CURVATURE._replace(in1=WIDE.in1[:1])), "curvature.in1: expected"),
    (
        lambda: _deltas(curvature=mk.KroneckerCurvature(*(c[:0] for c in CURVATURE))),
        "curvature: expected a rank of at least 1",
    ),
    (lambda: _deltas(mask="sign"), "mask: expected one of"),
    (lambda: mk.camex_merge(BASE, EXPERTS, GATES[:, :2]), "gates: expected shape"),
    (lambda: mk.KroneckerCurvature.identity(3, 6, 4, 0), "rank: expected at least 1"),
    (lambda: mk.KroneckerCurvature.identity(3, 6, 4, 1, "half"), "scale: expected one of"),
    (lambda: mk.segment_gates(GATES), "gates: expected shape"),
    (lambda: mk.segment_gates(GATES[:, None][:, :0]), "S at least 1"),
    (lambda: mk.segment_gates(GATES[None], first="last"), "first: expected one of"),
    (lambda: mk.noisy_topk_gates(X, GATE.T, top_k=4, training=True), "top_k: expected at least 1"),
    (
        lambda: mk.noisy_topk_gates(X, GATE.T, GATE, top_k=2, training=True),
        "w_noise: expected shape",
    ),
    (lambda: mk.cv_squared_loss(GATES, GATES[0, :2]), "load: expected shape"),
    (lambda: mk.propagate_base(BASE, EXPERTS[:, :5], 0.1), "deltas: expected shape"),
    (lambda: mk.propagate_base(BASE, EXPERTS[:0], 0.1), "deltas: expected shape .* E at least 1"),
    (lambda: mk.CAMExLinear(4, 6, 3, segment=0), "segment: expected at least 1"),
    (lambda: mk.CAMExLinear(4, 6, 3, mask="dare"), "mask: expected one of"),
    (lambda: mk.CAMExLinear(4, 6, 3, top_k=4), "top_k: expected at least 1 and at most 3"),
    (lambda: mk.CAMExLinear(4, 6, 3, segment=4)(SEGMENTS), "segments of 4 divide, got 5"),
    (lambda: mk.CAMExLinear(4, 6, 3)(SEGMENTS[:, :0]), "L at least 1, got L=0"),
    (lambda: mk.CAMExLinear(4, 6, 3)(SEGMENTS[..., :3]), "x: expected shape .* with D=4"),
    (lambda: mk.CAMExMLP(4, 6, 3, activation="mish"), "activation: expected one of"),
    (lambda: mk.TopKRouter(4, 3, 4), "top_k: expected"),
    (lambda: mk.TopKRouter(4, 6, 2, num_groups=4, top_groups=2), "num_groups: expected a divisor"),
    (lambda: mk.TopKRouter(0, 3, 2), "d_model: expected at least 1"),
    (lambda: mk.ACRouter(4, 3, 2, cosine=True, bias=True), "bias: expected False"),
    (lambda: mk.MoEMLP(4, 0, 3), "d_hidden: expected at least 1"),
    (lambda: mk.MoEMLP(4, 4, 3, activation="mish"), "activation: expected one of"),
    (lambda: _momentum(f=X[:5]), r"f: expected the shape of x, \[6, 4\], got \[5, 4\]"),
    (lambda: _momentum(f=X.to("meta")), "f: expected device cpu, got meta"),
    (lambda: _momentum(x=X[:, :0], f=X[:, :0]), "x: expected shape .* D at least 1"),
    (lambda: _momentum(x=X[0, 0]), "x: expected shape"),
    (lambda: _momentum(state=(X, X)), r"state: expected 1 entries \(m\) for HeavyBall, got 2"),
    (lambda: _momentum(state=()), "state: expected 1 entries"),
    (lambda: _momentum(state=(X,), rule=mk.AdEMAMix()), "state: expected 4 entries .*step"),
    (lambda: _momentum(state=(X[:5],)), r"state\.m: expected the shape of x"),
    (lambda: _momentum(state=(X.to("meta"),)), r"state\.m: expected device cpu"),
    (
        lambda: _momentum(state=(X, X, X, -1), rule=mk.AdEMAMix()),
        r"state\.step: expected at least 0",
    ),
    (lambda: _momentum(norm=(X[0, :3], None, 1e-5)), r"norm\.weight: expected shape"),
    (lambda: _momentum(norm=(None, None, 0.0)), r"norm\.eps: expected .* above 0"),
    (lambda: _momentum(rule=mk.HeavyBall(X[0, 0].to("meta"))), r"rule\.mu: expected device"),
    (lambda: mk.HeavyBall(1.0), "mu: expected below 1"),
    (lambda: mk.HeavyBall(-1.0), "mu: expected a finite number above -1"),
    (lambda: mk.HeavyBall(math.nan), "mu: expected a finite number"),
    (lambda: mk.Nesterov(0.5, math.inf), "gamma: expected a finite number"),
    (lambda: mk.HeavyBall(X[0]), r"mu: expected a tensor of one element, got \[4\]"),
    (lambda: mk.Adam(eps=0.0), "eps: expected a finite number above 0"),
    (lambda: mk.Adam(beta2=1.0), "beta2: expected at least 0 and below 1"),
    (lambda: mk.Adam(decay=-0.1), "decay: expected"),
    (lambda: mk.RobustMomentum(1.0, 1.0, 0.5), "smoothness: expected a finite number above 1"),
    (lambda: mk.RobustMomentum(4.0, 1.0, 0.4), "rho: expected a finite number at least 0.5"),
    (lambda: mk.RobustMomentum(4.0, 1.0, 1.0), "rho: expected below 1"),
    (lambda: mk.RobustMomentum(4.0, 0.0, 0.9), "convexity: expected"),
    (lambda: mk.AdEMAMix(beta1=0.0, beta3_warmup=3), "beta3_warmup: expected 0 < beta1"),
    (lambda: mk.AdEMAMix(alpha=-1.0), "alpha: expected"),
    (lambda: mk.Signum(1.0), "beta: expected"),
    (lambda: mk.Mars(correction=-1.0), "correction: expected"),
    (lambda: _moe_momentum(index=INDEX[:5]), r"expert_index: expected shape \[6, K\]"),
    (lambda: _moe_momentum(weight=WEIGHT[:, :1]), "expert_weight: expected shape"),
    (lambda: _moe_momentum(expert_input=X[:5]), "expert_input: expected the shape of x"),
    (lambda: _moe_momentum(dropout_p=1.0), "dropout_p: expected at least 0 and below 1"),
    (lambda: _moe_momentum(dropout_p=0.1, dropout_seed=INDEX[0]), "dropout_seed: expected shape"),
    (lambda: mk.MomentumMoE(4, 4, 3, 2, BALL, wiring="post"), "wiring: expected one of"),
    (lambda: mk.MomentumMoE(4, 4, 3, 2, BALL, sign=0), "sign: expected one of"),
    (lambda: mk.MomentumMoE(4, 4, 3, 2, BALL, dropout=1.0), "dropout: expected"),
    (lambda: _rpc(k=HEADS[0]), r"k: expected shape \[B, H, N, d\], got \[3, 5, 4\]"),
    (lambda: _rpc(k=HEADS[..., :0]), "k: expected shape .* d at least 1"),
    (lambda: _rpc(v=HEADS[:, :, :4]), r"v: expected the shape of k, \[2, 3, 5, 4\], got"),
    (lambda: _rpc(v=HEADS.to("meta")), "v: expected device cpu, got meta"),
    (lambda: _rpc(q=HEADS[:1]), "q: expected the shape of k"),
    (lambda: _rpc(num_iters=0), "num_iters: expected at least 1, got 0"),
    (lambda: _rpc(lam=-0.1), "lam: expected a finite number at least 0"),
    (lambda: _rpc(lam=math.nan), "lam: expected a finite number"),
    (lambda: _rpc(threshold="mu"), "threshold: expected one of"),
    (lambda: _rpc(threshold=-1.0), "threshold: expected a finite number at least 0"),
    (lambda: _rpc(threshold=BOUND.T), r"threshold: expected shape \[B, H\] with B=2, H=3, got"),
    (lambda: _rpc(threshold=HEADS[..., 0, :]), r"threshold: expected shape \[B, H, N\] .* N=5"),
    (lambda: _rpc(threshold=BOUND.to("meta")), "threshold: expected device cpu, got meta"),
    (lambda: _rpc(mu_width=0), "mu_width: expected at least 1"),
    (lambda: _rpc(mu_divisor=0.0), "mu_divisor: expected a finite number above 0"),
    (lambda: _rpc(causal="yes"), "causal: expected one of False, True, 'prefix', got 'yes'"),
    (
        lambda: _rpc(key_mask=torch.ones(2, 4, dtype=torch.bool)),
        r"key_mask: expected shape \[B, N\] with B=2, N=5",
    ),
    (lambda: _rpc(scale=math.nan), "scale: expected a finite number"),
    (lambda: _rpc(dropout_p=1.0), "dropout_p: expected at least 0 and below 1"),
    (lambda: _scaled(k=HEADS[:1]), "k: expected the shape of q"),
    (lambda: _scaled(s=HEADS[0]), r"s: expected shape \[H, N, N\] with H=3, N=5"),
    (lambda: _scaled(s=BOUND.to("meta")[0, 0]), "s: expected device cpu, got meta"),
    (lambda: _scaled(scale=math.inf), "scale: expected a finite number"),
    (lambda: mk.RPCAttention(10, 3), "dim: expected a multiple of num_heads=3, got 10"),
    (lambda: mk.RPCAttention(8, 2, projection="q"), "projection: expected one of"),
    (lambda: mk.RPCAttention(8, 2, num_iters=0), "num_iters: expected at least 1"),
    (lambda: mk.RPCAttention(8, 2, lam=-1.0), "lam: expected"),
    (lambda: mk.RPCAttention(8, 2, attn_drop=1.0), "attn_drop: expected"),
    (lambda: mk.ScaledAttention(8, 2, kind="vector"), "kind: expected one of"),
    (lambda: mk.ScaledAttention(8, 2, 0, kind="matrix"), "num_tokens: expected at least 1"),
]


@pytest.mark.parametrize(("call", "message"), TYPE, ids=[m for _, m in TYPE])
def test_type_errors(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(("call", "message"), VALUE, ids=[m for _, m in VALUE])
def test_value_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "function",
    [
        _topk,
        _weights,
        _ac,
        _mlp,
        _gemm,
        _momentum,
        _moe_momentum,
        _camex,
        _deltas,
        _whole,
        _kept,
        _rpc,
        _scaled,
    ],
    ids=lambda f: f.__name__,
)
def test_an_implementation_that_cannot_run(function):
    with pytest.raises(NotImplementedError, match="cannot run"):
        function(impl="cuda")
