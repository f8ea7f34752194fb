"""CAMEx in a Hugging Face model: the experts merged into one for every segment of tokens."""

import torch
from tiny_mixtral import TEXT, mixtral, train

from molex_kernels.integrations.transformers import install_merged_experts, uninstall


def main(steps: int = 100, width: int = 64) -> list[float]:
    model = mixtral(width)
    print("layers with merged experts:", install_merged_experts(model, segment=16))
    losses = train(model, steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    # Each new token needs the segment before, so that there is no cache.
    prompt = TEXT[None, :8]
    mask = torch.ones_like(prompt)
    text = model.generate(prompt, attention_mask=mask, use_cache=False, max_new_tokens=8)
    print(bytes(text[0].tolist()))
    uninstall(model)  # the trained experts, one by one again
    return losses


if __name__ == "__main__":
    main()
