"""One implementation of an op at tiny shapes, forward and backward, for compute-sanitizer.

`compute-sanitizer --tool memcheck python tests/sanitized.py OP IMPL`
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from conftest import DEVICE

from molex_kernels.testing import load_ops
from molex_kernels.testing.calls import run, upstream_for
from molex_kernels.testing.opinfo import Case

# Forms of a kernel that no small case reaches: a head that a cluster of blocks holds, and one that
# none can.
_OPTIONS: tuple[dict[str, Any], ...] = ({}, {"q": True, "causal": True, "dropout": 0.1})
LONGER = {
    ("rpc_attention", "cuda"): [
        (dtype, Case({"B": 1, "H": heads, "N": tokens, "d": width, "n": 2}, options))
        for dtype, heads, tokens, width in (
            (torch.float16, 3, 197, 64),
            (torch.float32, 4, 600, 16),
        )
        for options in _OPTIONS
    ]
}


def main(name: str, impl: str) -> None:
    """Runs the op's first cases."""
    info = load_ops()[name]
    generator = torch.Generator().manual_seed(0)
    cases = [(torch.bfloat16, case) for case in info.tests[:3]]
    cases.append((torch.float32, info.tests[0]))  # its products are parts on tensor cores
    for dtype, case in cases + LONGER.get((name, impl), []):
        inputs = info.make(case, dtype, DEVICE, generator)
        upstream = upstream_for(run(info, inputs, impl, None).results, generator)
        run(info, inputs, impl, upstream)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
