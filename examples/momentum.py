"""MomentumSMoE in a Hugging Face model: the expert layers hand momentum on."""

from tiny_mixtral import mixtral, train

import molex_kernels as mk
from molex_kernels.integrations.transformers import install_momentum


def main(steps: int = 100, width: int = 64) -> list[float]:
    model = mixtral(width)
    print("layers with momentum:", install_momentum(model, mk.HeavyBall(mu=0.7)))
    losses = train(model, steps)
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
