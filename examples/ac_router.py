"""ACMoE in a Hugging Face model: the gates route by the clusters of the layer before."""

import torch
from tiny_mixtral import TEXT, mixtral, train

from molex_kernels.integrations.transformers import install_ac_router, uninstall


def main(steps: int = 100, width: int = 64) -> list[float]:
    model = mixtral(width)
    print("layers with clusters:", install_ac_router(model))
    model.gradient_checkpointing_enable()
    losses = train(model, steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    # The clusters are of all tokens there are, so that every new one needs the whole text again.
    prompt = TEXT[None, :8]
    mask = torch.ones_like(prompt)
    text = model.generate(prompt, attention_mask=mask, use_cache=False, max_new_tokens=8)
    print(bytes(text[0].tolist()))
    uninstall(model)  # the same weights with the gates of Mixtral
    return losses


if __name__ == "__main__":
    main()
