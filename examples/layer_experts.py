"""MoLEx on a Hugging Face model: every layer mixed with one that a gate chooses, with adapters."""

import torch
import torch.nn.functional as F
from tiny_mixtral import TEXT
from transformers import GPT2Config, GPT2Model

import molex_kernels as mk


def main(steps: int = 100, width: int = 64) -> list[float]:
    model = GPT2Model(GPT2Config(vocab_size=256, n_embd=width, n_layer=4, n_head=4))
    stack = mk.LayerExpertStack.from_transformers(model, lora_rank=4, vote="mean_softmax")
    head = torch.nn.Linear(width, 256)
    parameters = [p for p in (*stack.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(TEXT) - 65, (16, 1))
        window = TEXT[starts + torch.arange(65)]
        hidden = model.wte(window[:, :-1]) + model.wpe.weight[:64]
        out = stack(hidden)
        logits = head(model.ln_f(out.hidden))
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad()
        (loss + 0.01 * out.balance_loss).backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, beside layers {out.chosen.tolist()}")
    return losses


if __name__ == "__main__":
    main()
