"""A Mixtral small enough for a laptop, and one step of its training: what the others start from.

For a published model put `AutoModelForCausalLM.from_pretrained(...)` in its place.
"""

from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM

TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def mixtral(width: int = 64, layers: int = 4) -> MixtralForCausalLM:
    config = MixtralConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=8,
    )
    return MixtralForCausalLM(config)


def train(model: MixtralForCausalLM, steps: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(TEXT) - 64, (16, 1))
        window = TEXT[starts + torch.arange(64)]
        loss = model(input_ids=window, labels=window).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
