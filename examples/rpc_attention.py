"""Robust attention in a Hugging Face model: RPC attention in the first layer of a decoder."""

from tiny_mixtral import TEXT, mixtral, train

from molex_kernels.integrations.transformers import install_rpc_attention, uninstall


def main(steps: int = 100, width: int = 64) -> list[float]:
    model = mixtral(width)
    print("robust layers:", install_rpc_attention(model, layers=(0,), num_iters=2))
    losses = train(model, steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    # The keys attend to each other, so that a token changes what a cache holds of those before.
    written = model.generate(TEXT[None, :16], max_new_tokens=8, use_cache=False)
    print("goes on with", bytes(written[0, 16:].tolist()))
    uninstall(model)
    return losses


if __name__ == "__main__":
    main()
