"""Handwritten digits and what is done to them: scikit-learn's bundled set, 1797 of 8 x 8 pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

SIZE = 8
CLASSES = 10
NOISE = 0.3  # standard deviation; pixels are in [0, 1]
OCCLUDED = 4  # side of the square that is blanked
FGSM = 0.1  # how far the attack may move a pixel
EVERY = 4  # every fourth image is for the test, every eighth for validation


class Labelled(NamedTuple):
    """Images [T, 8, 8] and their classes [T]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Digits:
    """Images [T, 8, 8] in [0, 1] and their classes, to train on and held out."""

    train: Labelled
    validation: Labelled
    test: Labelled


def available() -> bool:
    """Whether scikit-learn is installed."""
    try:
        import sklearn.datasets  # noqa: F401
    except ImportError:
        return False
    return True


def load(device: torch.device) -> Digits:
    """The bundled digits, split by their number."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32, device=device) / 16
    labels = torch.tensor(found.target, dtype=torch.int64, device=device)
    number = torch.arange(len(labels), device=device)
    is_test, is_validation = number % EVERY == 0, number % (2 * EVERY) == 1
    chosen = ~(is_test | is_validation), is_validation, is_test
    return Digits(*(Labelled(images[some], labels[some]) for some in chosen))


def noisy(images: Tensor) -> Tensor:
    """With Gaussian noise, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(images.shape, generator=generator).to(images)
    return (images + NOISE * noise).clamp(0, 1)


def occluded(images: Tensor) -> Tensor:
    """With a square blanked somewhere, the same in every call."""
    generator = torch.Generator().manual_seed(2)
    corner = torch.randint(SIZE - OCCLUDED + 1, (len(images), 2, 1), generator=generator)
    place = torch.arange(SIZE)
    inside = ((place >= corner) & (place < corner + OCCLUDED)).to(images.device)
    return torch.where(inside[:, 0, :, None] & inside[:, 1, None, :], 0, images)


def attacked(images: Tensor, gradient: Tensor) -> Tensor:
    """One FGSM step along the gradient of the model's own loss."""
    return (images + FGSM * gradient.sign()).clamp(0, 1)
