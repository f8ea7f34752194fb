"""Trains a small mixture of experts to continue its own source text, byte by byte."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import molex_kernels as mk


class Block(nn.Module):
    """Attention, then 8 experts of which every token takes 2."""

    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.router = mk.TopKRouter(width, num_experts=8, top_k=2)
        self.experts = mk.MoEMLP(width, 2 * width, 8, activation="swiglu")

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h, mask = self.norms[0](x), nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        x = x + self.attention(h, h, h, attn_mask=mask.to(x), is_causal=True)[0]
        h = self.norms[1](x)
        routing = self.router(h)
        return x + self.experts(h, routing), mk.load_balance_loss(routing)


def main(steps: int = 300, width: int = 64) -> list[float]:
    text = torch.tensor(list(Path(__file__).read_bytes()))
    embedding, head = nn.Embedding(256, width), nn.Linear(width, 256)
    model = nn.ModuleList([embedding, *(Block(width) for _ in range(2)), head])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(steps):
        starts = torch.randint(len(text) - 65, (16, 1))
        window = text[starts + torch.arange(65)]
        x, balance = embedding(window[:, :-1]), 0.0
        for block in model[1:-1]:
            x, loss = block(x)
            balance = balance + loss
        loss = F.cross_entropy(head(x).flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + 0.01 * balance).backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 50 == 0:
            print(f"step {step}: {losses[-1]:.3f} nats per byte")
    return losses


if __name__ == "__main__":
    main()
