"""The examples of README and of the pages run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import checkpoints
import pytest
import torch
from test_integrations import _model, _ViT

import molex_kernels as mk

ROOT = Path(__file__).parents[1]
README, INTEGRATIONS, START = "README.md", "docs/integrations.md", "docs/start.md"
EXAMPLES = {
    path.relative_to(ROOT).as_posix(): found
    for path in (ROOT / README, *sorted((ROOT / "docs").rglob("*.md")))
    if (found := re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
}


def test_readme_and_every_method_have_examples():
    assert len(EXAMPLES[README]) >= 3
    methods = {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs" / "methods").glob("*.md")}
    assert methods - {"docs/methods/index.md"} <= EXAMPLES.keys()


@pytest.mark.parametrize("page", EXAMPLES)
def test_examples_run(
    page: str, generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    # What the examples take for granted: models that are there already, and a checkpoint.
    monkeypatch.chdir(tmp_path)
    shapes = checkpoints.MODELS["momentum-lm"][1]()
    torch.save({"model": checkpoints.make(shapes, 0)}, "checkpoint.pt")
    names = {
        "x": torch.randn(4, checkpoints.D, generator=generator, dtype=torch.float64),
        "model": _model(transformers, generator),
        "vit": _ViT(),
        "encoder": transformers.BertModel(config),
        "decoder": transformers.GPT2Model(
            transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=16, vocab_size=32)
        ),
    }
    for example in EXAMPLES[page]:
        exec(compile(example, page, "exec"), names)
    if page in (README, START):
        assert names["y"].shape == (4, 512, 352)
    if page in (README, INTEGRATIONS):
        assert names["model"].config._experts_implementation == "molex"
    if page == INTEGRATIONS:
        assert isinstance(names["vit"].blocks[0].attn, mk.RPCAttention)
        assert isinstance(names["stack"], mk.LayerExpertStack)
    if page == START:
        call, said = re.search(r"^>>> (.*)\n(.*)", (ROOT / page).read_text(), re.MULTILINE).groups()
        with pytest.raises(ValueError, match=r"\[T, D\]") as raised:
            eval(call, names)
        assert f"ValueError: {raised.value}" == said
