"""rpc_attention in bf16 on the matrix tiles of a CPU.

Run by test_cpu_tiles.py in a process of its own with MOLEX_CPU_TILES, since the library reads the
variable once. Prints a JSON object: a digest of results, and by check what fails, or null.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import tile_checks
import torch
from torch import Tensor

import molex_kernels as mk
from molex_kernels.testing import Case, contract, load_ops

BF16 = torch.bfloat16


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _budget(check: Callable[..., None], sizes: tuple[int, ...], **options: Any) -> None:
    case = Case(dict(zip("BHNdn", sizes, strict=True)), options)
    check(load_ops()["rpc_attention"], case, BF16, "cpu", calls=1)


def _attention(threads: int, tokens: int = 300) -> list[Tensor]:
    """Results and gradients."""
    torch.set_num_threads(threads)
    draw = _generator()
    k, v = (torch.randn(1, 3, tokens, 40, generator=draw).to(BF16) for _ in range(2))
    k.requires_grad_()
    v.requires_grad_()
    out = mk.rpc_attention(k, v, num_iters=2, lam=1.0, impl="cpu")
    out.backward(torch.ones_like(out))
    torch.set_num_threads(1)
    return [out.detach(), k.grad, v.grad]


def same_with_any_threads() -> None:
    """A head's sums do not depend on the thread that takes them."""
    for one, several in zip(_attention(1), _attention(3), strict=True):
        assert torch.equal(one, several)


def large_scores_stay_finite() -> None:
    """Scores of 1e11, of which a row's largest is subtracted exactly."""
    k = 1e5 * torch.randn(1, 1, 300, 16, generator=_generator()).to(BF16)
    v = torch.randn(1, 1, 300, 16, generator=_generator()).to(BF16)
    bound = torch.full((1, 1), 1e9)
    for causal in (False, True):
        out = mk.rpc_attention(k, v, num_iters=1, threshold=bound, causal=causal, impl="cpu")
        scores = k[0, 0].double() @ k[0, 0].double().mT
        rows = scores.tril() if causal else scores
        # A key sees itself or a longer one that points its way, and nothing beside.
        assert torch.equal(out[0, 0], v[0, 0, rows.argmax(-1)]), causal


def rising_scores() -> None:
    """The largest score comes last: what the columns before it gave is scaled down."""
    steps = torch.linspace(0, 4, 600)[:, None]
    k = (torch.ones(1, 1, 600, 16) * steps).to(BF16)
    v = torch.randn(1, 1, 600, 16, generator=_generator()).to(BF16)
    bound = torch.full((1, 1), 1e3)
    out = mk.rpc_attention(k, v, num_iters=1, threshold=bound, impl="cpu")
    exact = (k.double() @ k.double().mT / 4).softmax(-1) @ v.double()
    assert (out - exact).abs().max() <= 2**-7 * exact.abs().max()


def masked_tokens_may_hold_anything() -> None:
    """Infinity outside of the key mask; one row of the batch has no token at all."""
    draw = _generator()
    k, v = (torch.randn(2, 1, 70, 16, generator=draw).to(BF16) for _ in range(2))
    mask = torch.rand(2, 70, generator=draw) < 0.5
    mask[1] = False

    def run(fill: float) -> list[Tensor]:
        leaves = [torch.where(mask[:, None, :, None], t, fill).requires_grad_() for t in (k, v)]
        out = mk.rpc_attention(*leaves, num_iters=2, lam=1.0, key_mask=mask, impl="cpu")
        out.backward(torch.ones_like(out))
        return [out.detach(), *(t.grad for t in leaves if t.grad is not None)]

    for plain, other in zip(run(0.0), run(torch.inf), strict=True):
        assert torch.equal(plain, other)
        assert not other[1].any()


def digest() -> str:
    """Of results and gradients of one call."""
    made = hashlib.sha256()
    for result in _attention(1, 50):
        made.update(result.float().numpy().tobytes())
    return made.hexdigest()


CHECKS: dict[str, Callable[[], None]] = {
    "several strips": lambda: _budget(contract.check_budget, (1, 1, 100, 64, 2), lam=0.5, std=0.5),
    "several blocks of columns": lambda: _budget(
        contract.check_budget, (1, 1, 290, 20, 2), lam=0.5, std=0.5
    ),
    "causal, q, mask": lambda: _budget(
        contract.check_budget,
        (2, 1, 270, 33, 1),
        std=0.5,
        given="T",
        q=True,
        causal=True,
        mask=True,
    ),
    "dropout": lambda: _budget(
        contract.check_budget, (1, 1, 65, 128, 1), std=0.5, given="T", dropout=0.3, causal=True
    ),
    "one token of one feature": lambda: _budget(contract.check_budget, (1, 1, 1, 1, 2), given="T"),
    "strided": lambda: _budget(contract.check_strided, (2, 2, 33, 17, 2), lam=0.5, std=0.5, q=True),
    **{
        f.__name__: f
        for f in (
            same_with_any_threads,
            large_scores_stay_finite,
            rising_scores,
            masked_tokens_may_hold_anything,
        )
    },
}


if __name__ == "__main__":
    tile_checks.main(CHECKS, digest)
