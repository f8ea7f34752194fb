"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from test_integrations import _model, _ViT

import molex_kernels as mk

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_examples_run(generator: torch.Generator):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    # What the examples take for granted: models that are there already.
    names = {
        "model": _model(transformers, generator),
        "vit": _ViT(),
        "encoder": transformers.BertModel(config),
    }
    examples = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len(examples) >= 3
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == (4, 512, 352)
    assert names["model"].config._experts_implementation == "molex"
    assert isinstance(names["vit"].blocks[0].attn, mk.RPCAttention)
    assert isinstance(names["stack"], mk.LayerExpertStack)
