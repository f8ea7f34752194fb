"""The experts of a Hugging Face model as one op: the same function, weights and names."""

from tiny_mixtral import mixtral, train

from molex_kernels.integrations.transformers import install_experts


def main(steps: int = 100, width: int = 64) -> list[float]:
    install_experts()
    model = mixtral(width)
    model.set_experts_implementation("molex")
    losses = train(model, steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
