"""Where the layers of transformers' models keep their parts: a table of attribute paths."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class PositionBias:
    """A bias on the scores by how far apart two tokens are: T5's table of buckets and heads.

    Attributes:
        table: the embedding's path.
        holder: "first": the first layer has it, for all of them; "each": every layer has its own;
            "model": the module around the layers has it.
        num_buckets: of both directions together, or the path in a layer where that is said.
        max_distance: from where on all tokens are in the last bucket, or the path likewise.
    """

    table: str
    holder: str
    num_buckets: int | str
    max_distance: int | str


@dataclass(frozen=True)
class Layout:
    """Where a kind of layer keeps its parts, as attribute paths.

    Attributes:
        name: of the kind.
        classes: whose forward is known to be the block that is computed here. Others have layers of
            the same parts that compute something else with them.
        linears: "q", "k", "v" or one "qkv"; "out", "up", "down" and, of a gated MLP, "gate".
        norm1: before the attention, or behind it where norms come after.
        norm2: likewise, of the MLP.
        activation: of the MLP.
        attention_dropout: of the attention's scores.
        head_width: the width of a head.
        out_dropout: behind the attention; "" for none.
        down_dropout: behind the MLP; "" for none.
        up_dropout: inside of the MLP, before "down"; "" for none.
        head_norms: norms of every head of q and k, "norm_q" and "norm_k"; layers may have none.
        pre_norm: whether norms come before, or where that is said.
        parallel: whether attention and MLP both start from the block's input, or where it says so.
        causal: whether a token attends to those before it alone.
        rotary: whether q and k are rotated by position.
        transposed: weights are [D, N], as GPT-2's Conv1D has them.
        by_heads: rows of "qkv" are in the order of heads, each with its q, k and v.
        residual_scale: what attention and MLP are multiplied by before they are added; "" for 1.
        default_scaling: of the scores where the attention does not say it; None is 1 / sqrt(d), d
            the width of a head.
        position_bias: added to the scores; None for none.
        clamps: in fp16, infinities behind attention and MLP become large numbers.
        returns: what a layer returns, by the names of its arguments; () is the hidden states alone.
        refused: model types whose layers are of these classes and get a mask of another kind.
    """

    name: str
    classes: tuple[str, ...]
    linears: dict[str, str]
    norm1: str
    norm2: str
    activation: str
    attention_dropout: str
    head_width: str
    out_dropout: str = ""
    down_dropout: str = ""
    up_dropout: str = ""
    head_norms: dict[str, str] = field(default_factory=dict)
    pre_norm: bool | str = True
    parallel: bool | str = False
    causal: bool = False
    rotary: bool = False
    transposed: bool = False
    by_heads: bool = False
    residual_scale: str = ""
    default_scaling: float | None = None
    position_bias: PositionBias | None = None
    clamps: bool = False
    returns: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()

    def paths(self) -> tuple[str, ...]:
        """Every path that a layer of this kind has."""
        maybe = (
            *(self.out_dropout, self.down_dropout, self.up_dropout, self.residual_scale),
            *(self.pre_norm, self.parallel),
        )
        return (
            *self.linears.values(),
            *(self.norm1, self.norm2, self.activation, self.attention_dropout, self.head_width),
            *(path for path in maybe if isinstance(path, str) and path),
        )

    def norms(self) -> dict[str, str]:
        """By name, norms of a head among them."""
        return {"norm1": self.norm1, "norm2": self.norm2, **self.head_norms}


def _self_attention(inner: str) -> dict[str, str]:
    return {
        "q": f"attention.{inner}.query",
        "k": f"attention.{inner}.key",
        "v": f"attention.{inner}.value",
        "out": "attention.output.dense",
        "up": "intermediate.dense",
        "down": "output.dense",
    }


_LLAMA = Layout(
    name="llama",
    classes=(
        "LlamaDecoderLayer",
        "MistralDecoderLayer",
        "Qwen2DecoderLayer",
        "Qwen3DecoderLayer",
        "GemmaDecoderLayer",
    ),
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norm1="input_layernorm",
    norm2="post_attention_layernorm",
    activation="mlp.act_fn",
    attention_dropout="self_attn.attention_dropout",
    head_width="self_attn.head_dim",
    head_norms={"norm_q": "self_attn.q_norm", "norm_k": "self_attn.k_norm"},
    causal=True,
    rotary=True,
)

_T5 = Layout(
    name="t5",
    classes=("T5Block", "MT5Block"),
    linears={
        **{name: f"layer.0.SelfAttention.{name}" for name in ("q", "k", "v")},
        "out": "layer.0.SelfAttention.o",
        "up": "layer.1.DenseReluDense.wi",
        "down": "layer.1.DenseReluDense.wo",
    },
    norm1="layer.0.layer_norm",
    norm2="layer.1.layer_norm",
    activation="layer.1.DenseReluDense.act",
    attention_dropout="layer.0.SelfAttention.dropout",
    head_width="layer.0.SelfAttention.key_value_proj_dim",
    out_dropout="layer.0.dropout",
    down_dropout="layer.1.dropout",
    up_dropout="layer.1.DenseReluDense.dropout",
    default_scaling=1.0,
    position_bias=PositionBias(
        table="layer.0.SelfAttention.relative_attention_bias",
        holder="first",
        num_buckets="layer.0.SelfAttention.relative_attention_num_buckets",
        max_distance="layer.0.SelfAttention.relative_attention_max_distance",
    ),
    clamps=True,
    returns=("hidden_states", "position_bias", "encoder_decoder_position_bias"),
)


def _t5_family() -> Iterator[Layout]:
    """T5's and UMT5's blocks, each with the plain and the gated MLP."""
    assert _T5.position_bias is not None
    own = replace(_T5.position_bias, holder="each")
    gated = {
        **_T5.linears,
        "gate": "layer.1.DenseReluDense.wi_0",
        "up": "layer.1.DenseReluDense.wi_1",
    }
    for linears in (_T5.linears, gated):
        plain = replace(_T5, linears=linears)
        yield plain
        yield replace(plain, name="umt5", classes=("UMT5Block",), position_bias=own, returns=())


# Layers that no layout can describe: an attribute that tells them, and what is expected instead.
UNFIT = {
    "attention.self.pos_att_type": (
        "positions that add to the scores what depends on distances alone, where disentangled "
        "attention adds products of q and k with distances that each layer projects"
    ),
}

LAYOUTS = (
    Layout(
        name="gpt2",
        classes=("GPT2Block", "DecisionTransformerGPT2Block"),
        linears={
            "qkv": "attn.c_attn",
            "out": "attn.c_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        norm1="ln_1",
        norm2="ln_2",
        activation="mlp.act",
        attention_dropout="attn.attn_dropout",
        head_width="attn.head_dim",
        out_dropout="attn.resid_dropout",
        down_dropout="mlp.dropout",
        causal=True,
        transposed=True,
    ),
    Layout(
        name="bert",
        classes=("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer"),
        linears=_self_attention("self"),
        norm1="attention.output.LayerNorm",
        norm2="output.LayerNorm",
        activation="intermediate.intermediate_act_fn",
        attention_dropout="attention.self.dropout",
        head_width="attention.self.attention_head_size",
        out_dropout="attention.output.dropout",
        down_dropout="output.dropout",
        pre_norm=False,
    ),
    Layout(
        name="distilbert",
        classes=("TransformerBlock",),
        linears={
            "q": "attention.q_lin",
            "k": "attention.k_lin",
            "v": "attention.v_lin",
            "out": "attention.out_lin",
            "up": "ffn.lin1",
            "down": "ffn.lin2",
        },
        norm1="sa_layer_norm",
        norm2="output_layer_norm",
        activation="ffn.activation",
        attention_dropout="attention.dropout",
        head_width="attention.attention_head_size",
        down_dropout="ffn.dropout",
        pre_norm=False,
    ),
    Layout(
        name="vit",
        classes=("ViTLayer", "DeiTLayer", "IJepaLayer"),
        linears={
            "q": "attention.q_proj",
            "k": "attention.k_proj",
            "v": "attention.v_proj",
            "out": "attention.o_proj",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        norm1="layernorm_before",
        norm2="layernorm_after",
        activation="mlp.activation_fn",
        attention_dropout="attention.attention_dropout",
        head_width="attention.head_dim",
        out_dropout="dropout",
        down_dropout="dropout",
    ),
    Layout(
        name="vit",
        classes=("ViTLayer", "DeiTLayer"),
        linears=_self_attention("attention"),
        norm1="layernorm_before",
        norm2="layernorm_after",
        activation="intermediate.intermediate_act_fn",
        attention_dropout="attention.attention.dropout_prob",
        head_width="attention.attention.attention_head_size",
        out_dropout="attention.output.dropout",
        down_dropout="output.dropout",
    ),
    Layout(
        name="opt",
        classes=("OPTDecoderLayer",),
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "out": "self_attn.out_proj",
            "up": "fc1",
            "down": "fc2",
        },
        norm1="self_attn_layer_norm",
        norm2="final_layer_norm",
        activation="activation_fn",
        attention_dropout="self_attn.dropout",
        head_width="self_attn.head_dim",
        out_dropout="dropout",
        down_dropout="dropout",
        pre_norm="do_layer_norm_before",
        causal=True,
    ),
    Layout(
        name="gpt_neox",
        classes=("GPTNeoXLayer",),
        linears={
            "qkv": "attention.query_key_value",
            "out": "attention.dense",
            "up": "mlp.dense_h_to_4h",
            "down": "mlp.dense_4h_to_h",
        },
        norm1="input_layernorm",
        norm2="post_attention_layernorm",
        activation="mlp.act",
        attention_dropout="attention.attention_dropout",
        head_width="attention.head_size",
        out_dropout="post_attention_dropout",
        down_dropout="post_mlp_dropout",
        parallel="use_parallel_residual",
        causal=True,
        rotary=True,
        by_heads=True,
    ),
    Layout(
        name="clip",
        classes=("CLIPEncoderLayer", "SiglipEncoderLayer"),
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "out": "self_attn.out_proj",
            "up": "mlp.fc1",
            "down": "mlp.fc2",
        },
        norm1="layer_norm1",
        norm2="layer_norm2",
        activation="mlp.activation_fn",
        attention_dropout="self_attn.dropout",
        head_width="self_attn.head_dim",
        refused=("clip_text_model",),
    ),
    Layout(
        name="starcoder2",
        classes=("Starcoder2DecoderLayer",),
        linears={
            "q": "self_attn.q_proj",
            "k": "self_attn.k_proj",
            "v": "self_attn.v_proj",
            "out": "self_attn.o_proj",
            "up": "mlp.c_fc",
            "down": "mlp.c_proj",
        },
        norm1="input_layernorm",
        norm2="post_attention_layernorm",
        activation="mlp.act",
        attention_dropout="self_attn.attention_dropout",
        head_width="self_attn.head_dim",
        out_dropout="self_attn.residual_dropout",
        down_dropout="mlp.residual_dropout",
        causal=True,
        rotary=True,
    ),
    Layout(
        name="mpnet",
        classes=("MPNetLayer",),
        linears={
            **{name: f"attention.attn.{name}" for name in ("q", "k", "v")},
            "out": "attention.attn.o",
            "up": "intermediate.dense",
            "down": "output.dense",
        },
        norm1="attention.LayerNorm",
        norm2="output.LayerNorm",
        activation="intermediate.intermediate_act_fn",
        attention_dropout="attention.attn.dropout",
        head_width="attention.attn.attention_head_size",
        out_dropout="attention.dropout",
        down_dropout="output.dropout",
        pre_norm=False,
        # The numbers that its encoder always takes, whatever its configuration says.
        position_bias=PositionBias("relative_attention_bias", "model", 32, 128),
        returns=("hidden_states",),
    ),
    *_t5_family(),
    # Those with one part more come before Llama's, which every one of them would pass for.
    replace(
        _LLAMA,
        name="granite",
        classes=("GraniteDecoderLayer",),
        residual_scale="residual_multiplier",
    ),
    replace(
        _LLAMA,
        name="stablelm",
        classes=("StableLmDecoderLayer",),
        down_dropout="dropout",
        head_norms={},
    ),
    _LLAMA,
)
