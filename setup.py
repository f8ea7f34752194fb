"""Builds `molex_kernels._C` against the installed torch.

CUDA sources are built when `torch.version.cuda` and `CUDA_HOME` are both set; no GPU is needed.
`MOLEX_CUDA=0|1` forbids or demands CUDA, `MOLEX_EXTENSION=1` makes a failed build an error rather
than a warning, `MOLEX_SANITIZE=1` builds for AddressSanitizer and UndefinedBehaviorSanitizer;
`MAX_JOBS` and `TORCH_CUDA_ARCH_LIST` are honoured.
"""

import os
import re
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "molex_kernels is built against the installed torch, and there is none here.\n"
        "Install torch first, then: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
# The oldest torch whose stable ABI serves: one build runs on 2.11 and later.
TORCH_TARGET_VERSION = "0x020b000000000000"
# Nobody reads errno or floating-point traps, and both forbid vectorising a square root or a choice.
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# Vectors are only passed to functions that are inlined: no ABI is involved.
CXX_FLAGS += ["-Wno-psabi"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
# PTX of 9.0a would run on no later chip, and clusters of blocks come with 9.0.
CUDA_ARCHITECTURES = "8.0;9.0+PTX"


class OptionalBuild(BuildExtension):
    """Goes on without the extension where it cannot be compiled: the ops have other paths."""

    def build_extensions(self) -> None:
        try:
            super().build_extensions()
        except Exception as error:
            if os.environ.get("MOLEX_EXTENSION") == "1":
                raise
            self.extensions = []
            print(f"warning: molex_kernels._C is not built: {error}", file=sys.stderr)
            print("warning: the ops will run on their other implementations", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """Copies what was built into the tree, for editable installs."""
        if self.extensions:
            super().copy_extensions_to_source()


def sources(folder: str, suffix: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for p in sorted((ROOT / "csrc" / folder).glob(f"*{suffix}"))]


def with_cuda(cuda_sources: list[str]) -> bool:
    wanted = os.environ.get("MOLEX_CUDA")
    possible = torch.version.cuda is not None and CUDA_HOME is not None
    if wanted == "1" and not possible:
        sys.exit("MOLEX_CUDA=1 needs a torch built with CUDA, and CUDA_HOME or nvcc on PATH")
    return bool(cuda_sources) and possible and wanted != "0"


def operators(paths: list[str]) -> str:
    """The operators that these sources register, for the build facts."""
    text = "".join((ROOT / path).read_text() for path in paths)
    return ",".join(sorted(set(re.findall(r'\.impl\(\s*"(\w+)"', text))))


def extension() -> CppExtension:
    cuda_sources = sources("cuda", ".cu")
    cuda = with_cuda(cuda_sources)
    kernels = sources("cpu", ".cpp") + (cuda_sources if cuda else [])
    macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION),
        ("MOLEX_CXX_FLAGS", f'"{" ".join(CXX_FLAGS)}"'),
        ("MOLEX_TORCH_VERSION", f'"{torch.__version__}"'),
        ("MOLEX_OPERATORS", f'"{operators(kernels)}"'),
    ]
    flags = {"cxx": CXX_FLAGS}
    link = []
    if os.environ.get("MOLEX_SANITIZE") == "1":
        macros.append(("MOLEX_SANITIZE", None))
        flags["cxx"] = [*CXX_FLAGS, *SANITIZE]
        link = SANITIZE
    if cuda:
        architectures = os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        macros += [
            ("USE_CUDA", None),
            ("MOLEX_CUDA_VERSION", f'"{torch.version.cuda}"'),
            ("MOLEX_CUDA_ARCHITECTURES", f'"{architectures}"'),
        ]
        flags["nvcc"] = ["-O3", "-std=c++20", "-lineinfo", "--threads=2"]
    build = CUDAExtension if cuda else CppExtension
    return build(
        "molex_kernels._C",
        ["csrc/bindings.cpp", *kernels],
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=link,
    )


setup(ext_modules=[extension()], cmdclass={"build_ext": OptionalBuild.with_options(use_ninja=True)})
