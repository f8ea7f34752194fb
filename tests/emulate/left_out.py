"""What an emulated run leaves out of the Triton tests, and why."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

_DRIVER = "asks the driver, and there is none: streams, graphs, fake tensors, Dynamo"
_LARGE = "would take minutes: sizes that fill a chip or a native kernel"
_NO_PACKAGES = "needs packages that this environment has not"

# Files that are not even imported.
FILES = {
    "test_aot.py": "compiles ahead of time and launches nothing",
    "test_autocast.py": _NO_PACKAGES,
    "test_benchmark_models.py": _NO_PACKAGES,
    "test_benchmark_reports.py": _NO_PACKAGES,
    "test_benchmark_terminal.py": _NO_PACKAGES,
    "test_benchmark_training.py": _NO_PACKAGES,
    "test_benchmarks.py": _NO_PACKAGES,
    "test_compile.py": _DRIVER,
    "test_derivatives.py": "functorch's tensors have no memory that could be executed on",
    "test_docstrings.py": _NO_PACKAGES,
    "test_dtensor.py": "starts processes, which are not emulated",
    "test_expert_parallel.py": "starts processes, which are not emulated",
    "test_flops.py": _DRIVER,
    "test_gpu.py": _DRIVER,
    "test_launch.py": "has a driver of its own, in processes of its own",
    "test_layer_stack.py": _NO_PACKAGES,
    "test_meta.py": _DRIVER,
    "test_model_layer_experts.py": _NO_PACKAGES,
    "test_model_merged_experts.py": _NO_PACKAGES,
    "test_model_rpc.py": _NO_PACKAGES,
    "test_models.py": _NO_PACKAGES,
    "test_module_protocol.py": _NO_PACKAGES,
    "test_rpc_cuda.py": _NO_PACKAGES,
    "test_rpc_placement.py": "chooses among the extension's kernels, and there is no extension",
    "test_sanitizer.py": "compute-sanitizer needs a GPU",
}

# Patterns of "file::test[parameters]" and, behind them, which sizes of the op those are.
TESTS = {
    "test_contract.py::test_operators_pass_opcheck*": _DRIVER,
    "test_contract.py::test_traces_without_a_graph_break*": _DRIVER,
    "test_contract.py::test_compiles_with_inductor*": _DRIVER,
    "test_contract.py::* compiled": _LARGE,
    "test_contract.py::* large": _LARGE,
    "test_layer_mixing.py::test_layers_with_other_strides_give_the_same*": (
        "only storages that are arguments exist, and these layers' stand in a table of addresses"
    ),
    "test_merging_memory.py::test_memory_of_the_deltas*": "compares with native code",
    "test_implementations.py::test_triton_without_a_gpu_says_what_it_needs": "here is a GPU",
}

# Asserted, so that leaving something out takes two deliberate changes.
LENGTH = 33


def pattern_for(name: str) -> str | None:
    """The pattern that leaves out the test of this name, if one does."""
    return next((pattern for pattern in TESTS if fnmatchcase(name, pattern)), None)


def faults(files: Iterable[str], matched: Iterable[str]) -> list[str]:
    """What is wrong with the list, given the files there are and the patterns that matched."""
    length = len(FILES) + len(TESTS)
    return [
        *([f"{length} entries, not {LENGTH}"] if length != LENGTH else []),
        *(f"{name}: no such file" for name in sorted(FILES.keys() - {*files})),
        *(f"{pattern}: matches no test" for pattern in sorted(TESTS.keys() - {*matched})),
    ]
