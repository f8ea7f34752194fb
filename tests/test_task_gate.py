"""CAMEx' gate on a task's description: the published equations, masks, sharing and errors."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from merging import OUT, D, E, R, draw, same
from test_merging_module import published_weights
from torch import Tensor

import molex_kernels as mk

B, L, N, TASK, REDUCED = 3, 7, 5, 6, 2


def _module(generator, dtype=torch.float64, **options) -> mk.CAMExLinear:
    options = {"task_dim": TASK, "task_reduced": REDUCED, "rank": R, **options}
    module = mk.CAMExLinear(D, OUT, E, dtype=dtype, device=DEVICE, **options)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(generator, *p.shape))
    return module.eval()


def _gates(task: Tensor, module: mk.CAMExLinear) -> Tensor:
    """As `Conv1D_CAMEx` with moe_level="task": projected token by token, then the mean."""
    projected = task @ module.task_weight.T + module.task_bias
    return torch.softmax(projected.mean(1) @ module.w_gate, -1)


def test_the_published_equations(generator):
    module = _module(generator)
    x = draw(generator, B, L, D).requires_grad_()
    task = draw(generator, B, N, TASK).requires_grad_()
    y, loss = module(x, task=task)
    gates = _gates(task, module)
    want = torch.stack([x[b] @ published_weights(module, gates[b]).T for b in range(B)])
    assert same(y, want)
    importance = gates.sum(0)
    assert same(loss, 1e-2 * importance.var() / (importance.mean() ** 2 + 1e-10))
    leaves = [x, task, *(p for n, p in module.named_parameters() if n != "w_noise")]
    got = torch.autograd.grad(y.square().sum(), leaves)
    for a, b in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True):
        assert same(a, b, 1e-9)


def test_a_task_of_all_sequences_is_merged_once(generator):
    module = mk.CAMExMLP(D, OUT, E, rank=R, task_dim=TASK, dtype=torch.float64, device=DEVICE)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(draw(generator, *p.shape))
    assert module.up.w_gate.shape == (1, E)  # 6 // 16, and 1 at least
    module.eval()
    x, task = draw(generator, B, L, D), draw(generator, 1, N, TASK)
    y, loss = module(x, task=task)
    each, _ = module(x, task=task.expand(B, -1, -1))
    assert same(y, each)
    assert module.up.gates(x, task=task)[0].shape == (1, 1, E)
    assert y.shape == x.shape
    assert loss.isfinite()
    assert module(x[:0], task=task)[0].shape == (0, L, D)


def test_no_token_moves_the_gate(generator):
    module = _module(generator)
    x, task = draw(generator, B, L, D), draw(generator, B, N, TASK)
    y, _ = module(x, task=task)
    later = x.clone()
    later[:, 4:] = draw(generator, B, L - 4, D)
    assert torch.equal(module(later, task=task)[0][:, :4], y[:, :4])


def test_padding_of_the_description(generator):
    module = _module(generator)
    x, task = draw(generator, B, L, D), draw(generator, B, N, TASK)
    mask = torch.ones(B, N, dtype=torch.bool, device=DEVICE)
    mask[:, 3:] = False
    want, _ = module(x, task=task[:, :3])
    task[:, 3:] = float("nan")
    assert same(module(x, task=task, task_mask=mask)[0], want)
    mask[1] = False  # a sequence without a description is left to the base
    assert same(module(x, task=task, task_mask=mask)[0][1], x[1] @ module.base.T)


def test_noise_in_training(generator):
    module = _module(generator).train()
    x, task = draw(generator, B, L, D), draw(generator, B, N, TASK)
    torch.manual_seed(1)
    one, _ = module.gates(x, task=task)
    noise, _ = module.gates(x, task=task)
    assert not torch.equal(one, noise)
    y, loss = module(x, task=task)
    (y.square().mean() + loss).backward()
    assert all(p.grad.any() for p in module.parameters())


def test_16_bits_and_autocast_choose_as_fp32_does(generator):
    wide = _module(generator, torch.float32)
    x, task = draw(generator, B, L, D).bfloat16(), draw(generator, B, N, TASK).bfloat16()
    narrow = _module(generator, torch.bfloat16)
    wide.load_state_dict(narrow.state_dict())
    want, _ = wide.gates(x.float(), task=task.float())
    assert torch.equal(narrow.gates(x, task=task)[0], want)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        y, _ = wide(x, task=task)
        assert torch.equal(wide.gates(x, task=task)[0], want)
    assert y.dtype == torch.bfloat16


def test_compiled(generator):
    module = _module(generator, torch.float32)
    x, task = draw(generator, B, L, D).float(), draw(generator, B, N, TASK).float()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(x, task=task)[0], module(x, task=task)[0], atol=1e-5)


def test_bad_input(generator):
    x, task = draw(generator, B, L, D), draw(generator, B, N, TASK)
    module, plain = _module(generator), mk.CAMExLinear(D, OUT, E, dtype=x.dtype, device=DEVICE)
    with pytest.raises(ValueError, match="segment: expected None with task_dim, got 2"):
        mk.CAMExLinear(D, OUT, E, task_dim=TASK, segment=2)
    with pytest.raises(ValueError, match="task_reduced: expected None without task_dim, got 2"):
        mk.CAMExLinear(D, OUT, E, task_reduced=2)
    with pytest.raises(ValueError, match="task_dim: expected at least 1, got 0"):
        mk.CAMExLinear(D, OUT, E, task_dim=0)
    with pytest.raises(ValueError, match=r"task: expected a tensor .* got None"):
        module(x)
    with pytest.raises(ValueError, match=r"task: expected None in a module .* got Tensor"):
        plain(x, task=task)
    with pytest.raises(ValueError, match="token_mask: expected None with task_dim"):
        module(x, task=task, token_mask=torch.ones(B, L, dtype=torch.bool, device=DEVICE))
    with pytest.raises(ValueError, match=r"task: expected shape .*Dt=6, got \[3, 5, 5\]"):
        module(x, task=task[..., :5])
    with pytest.raises(ValueError, match=r"B=3 or 1 and N at least 1, got \[2, 5, 6\]"):
        module(x, task=task[:2])
    with pytest.raises(TypeError, match="task: expected dtype"):
        module(x, task=task.long())
    with pytest.raises(ValueError, match=r"task_mask: expected shape \[B, N\]"):
        module(x, task=task, task_mask=torch.ones(B, 2, dtype=torch.bool, device=DEVICE))
