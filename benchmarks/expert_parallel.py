"""What happens past one card: expert parallelism on paper, from the rates of this run.

Every card holds E/P experts and T tokens. A layer sends each token to the cards of its K experts
and brings as many rows back. With `width` bytes an element, a token costs

    sent = copies * D * width * 2       (out and back; the backward pass as much again)
    work = (6 or 4) * K * D * I FLOPs   (SwiGLU or plain; the backward pass twice as much)

`copies` is K (P - 1) / P where every choice travels alone. Where a card gets a token once and sums
its experts before it answers, it is about (P - 1)(1 - (1 - 1/P)^K), the number of other cards with
at least one of the K experts. Nothing overlaps here, and routing is uniform.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks import results
from benchmarks.formats import percent
from benchmarks.results import Results, Row
from benchmarks.rows import OURS

CARDS = (2, 8, 32, 128)
# Bytes per second, one direction, per card: nominal figures of the links, not measured ones.
LINKS = {
    "cuda": {"NVLink 4": 450e9, "InfiniBand NDR, 400 Gb/s": 50e9},
    "cpu": {"25 Gb/s Ethernet": 3.1e9, "10 Gb/s Ethernet": 1.25e9},
}
WIDTHS = {"fp32": 4, "fp64": 8}


@dataclass(frozen=True)
class Layer:
    """A measured mixture: its sizes, bytes an element, and the FLOP/s of our forward pass."""

    name: str
    width: int
    top_k: int
    dim: int
    hidden: int
    gated: bool
    rate: float

    @property
    def flops(self) -> int:
        """Of one token, forward."""
        return (6 if self.gated else 4) * self.top_k * self.dim * self.hidden

    def copies(self, cards: int, *, merged: bool) -> float:
        """Expected rows of a token that leave their card."""
        if merged:
            return (cards - 1) * (1 - (1 - 1 / cards) ** self.top_k)
        return self.top_k * (cards - 1) / cards

    def sent(self, cards: int, *, merged: bool) -> float:
        """Bytes that a token sends and receives in a forward pass, out and back."""
        return 2 * self.copies(cards, merged=merged) * self.dim * self.width

    def dominated(self, cards: int, link: float, *, merged: bool) -> float:
        """Time on the link over the time of the products; above 1 the link sets the pace.

        Of a forward pass. The backward pass sends as much and computes twice as much: half of it.
        """
        return self.sent(cards, merged=merged) / link / (self.flops / self.rate)

    def break_even(self, cards: int, link: float, *, merged: bool) -> float:
        """The experts' width at which both take equally long at this rate."""
        return self.hidden * self.dominated(cards, link, merged=merged)

    def verdict(self, links: dict[str, float]) -> Iterator[str]:
        """From how many cards on the link takes longer than the products, link by link."""
        for name, link in links.items():
            over = [c for c in CARDS if self.dominated(c, link, merged=True) > 1]
            if over:
                width = math.ceil(self.break_even(CARDS[-1], link, merged=True))
                yield (
                    f"{name}: from {over[0]} cards on, communication takes longer than the forward "
                    f"products. At {CARDS[-1]} cards it takes less with experts wider than {width}."
                )
            else:
                most = max(self.dominated(c, link, merged=True) for c in CARDS)
                yield f"{name}: communication takes at most {percent(most)} of the products' time."


def layers(found: Results) -> Iterator[Layer]:
    """The mixture with the largest measured forward rate, and the field's with names."""
    timed = [
        r
        for r in found["rows"]
        if r["op"] == "moe_mlp" and r["kind"] == OURS and r["mode"] == "forward" and "median_s" in r
    ]
    named = [r for r in timed if r["shape"].endswith(("-swiglu-qwen3", "-swiglu-olmoe"))]
    fastest = max(timed, key=lambda r: r["gflop_per_s"], default=None)
    chosen = ([fastest] if fastest else []) + [r for r in named if r["sizes"]["T"] >= 32768]
    for row in {r["shape"]: r for r in chosen}.values():
        yield _layer(row)


def _layer(row: Row) -> Layer:
    sizes = row["sizes"]
    return Layer(
        row["shape"],
        WIDTHS.get(row["dtype"], 2),
        sizes["K"],
        sizes["D"],
        sizes["I"],
        "glu" in row["shape"],
        row["gflop_per_s"] * 1e9,
    )


def links(found: Results) -> dict[str, float]:
    """The links that cards like this one have."""
    return LINKS.get(found["environment"].get("device", "cpu"), {}) if results.ops(found) else {}
