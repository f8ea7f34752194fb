"""Settings of every test: Triton's interpreter without a GPU, one printed seed, poisoned memory."""

from __future__ import annotations

import importlib
import os
import random
from collections.abc import Callable
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = (
        "1"  # read when kernels are decorated, so before any import of them
    )
# Deterministic mode asks cuBLAS for it, and cuBLAS reads it once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
from filelock import FileLock
from interpreter import make_faster

from molex_kernels._backends import CUDA
from molex_kernels._dtypes import KERNEL_DTYPES
from molex_kernels.testing import budget

# xdist's workers inherit the environment, so that all of them draw from the one printed seed.
SEED = int(os.environ.setdefault("MOLEX_TEST_SEED", str(random.SystemRandom().randrange(2**31))))
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EMULATED = "emulate.plugin" in os.environ.get("PYTEST_PLUGINS", "")
NEED_A_GPU = ("gpu", "sanitizer")  # marks

if os.environ.get("CI"):
    # CI installs whatever the tests can use: there a package that is missing is an error.
    pytest.importorskip = lambda name, *_, **__: importlib.import_module(name)


def pytest_report_header() -> str:
    return f"molex_kernels: MOLEX_TEST_SEED={SEED}, device {DEVICE}, torch {torch.__version__}"


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("markexpr")
    if DEVICE.type == "cpu" and asked in NEED_A_GPU:
        raise pytest.UsageError(f"-m {asked}: there is no CUDA device, and every test would skip")
    if DEVICE.type == "cpu":
        make_faster()


def runs_here(impl: str) -> bool:
    """Whether the implementation runs on the device of the tests."""
    if DEVICE.type == "cuda":
        return impl != "cpu" and (impl != "cuda" or CUDA.why_not() is None)
    return impl != "cuda"


def dtypes_of(impl: str) -> tuple[torch.dtype, ...]:
    """The dtypes in which the implementation is tested here."""
    if impl == "triton" and DEVICE.type == "cpu":
        return (torch.float32, torch.float16)  # the interpreter gets bf16 wrong
    if EMULATED:  # fp16 takes the same kernels, and the interpreter runs it
        return (torch.float32, torch.bfloat16)
    return KERNEL_DTYPES


def is_slow(impl: str) -> bool:
    """Whether the implementation is interpreted or emulated here."""
    return impl == "triton" and (DEVICE.type == "cpu" or EMULATED)


def calls_of(impl: str) -> int:
    """How many draws within the budget call the implementation."""
    return budget.SLOW_DRAWS if is_slow(impl) else budget.DRAWS


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A file that `make` writes, once for all workers."""
    base = factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        base = base.parent
    path = base / name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            make(path)
    return path


def also_for_a_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that runs anywhere as one of the GPU's where there is one."""
    return pytest.mark.gpu(test) if DEVICE.type == "cuda" else test


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if DEVICE.type == "cuda":
        return
    for item in items:
        if any(map(item.get_closest_marker, NEED_A_GPU)):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` is NaN (or the largest integer), so that an unwritten output shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that differs from test to test and from run to run, and repeats with the printed."""
    return SEED ^ (hash_of(request.node.nodeid) & 0x7FFFFFFF)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A generator from the test's own seed."""
    return torch.Generator().manual_seed(seed)


def hash_of(text: str) -> int:
    """A hash that is the same in every process."""
    value = 2166136261
    for byte in text.encode():
        value = (value ^ byte) * 16777619 & 0xFFFFFFFF
    return value


@pytest.fixture
def device() -> torch.device:
    return DEVICE
