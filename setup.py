"""Builds `molex_kernels._C` against the installed torch, or fails and says how to go on without.

`MOLEX_EXTENSION=0` leaves it out: nothing is compiled, and no torch is needed to build. The CUDA
sources are part of it where torch is built with CUDA and a toolkit that fits it is found; no GPU is
needed. Elsewhere, and where they do not compile, they are left out, which is said. `MOLEX_CUDA=0`
forbids them, `MOLEX_CUDA=1` makes it an error that they cannot be built. `MOLEX_SANITIZE=1` builds
for AddressSanitizer and UndefinedBehaviorSanitizer; `CXX`, `MAX_JOBS`, `CUDA_HOME` and
`TORCH_CUDA_ARCH_LIST` are honoured.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from setuptools import Extension, setup

ROOT = Path(__file__).parent
INSTALL = "pip install --no-build-isolation ."
# The oldest torch whose stable ABI serves: one build runs on 2.11 and later.
OLDEST_TORCH = (2, 11)
TORCH_TARGET_VERSION = "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)
# Nobody reads errno or floating-point traps, and both forbid vectorising a square root or a choice.
CXX_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall"]
CXX_FLAGS += ["-fno-math-errno", "-fno-trapping-math"]
# Clang compiles for one level of x86-64, GCC for all of them. This one has AVX2.
CLANG_LEVEL = "-march=x86-64-v3"
# Vectors are only passed to functions that are inlined: no ABI is involved.
CXX_FLAGS += ["-Wno-psabi"]
# Python's own flags ask for debug information, which would be nine tenths of the library.
NO_DEBUG = ["-g0"]
STRIP = ["-Wl,--strip-all"] if sys.platform == "linux" else []
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
# One library, in the limited API of the oldest Python, serves every later one.
PYTHON_TAG = "cp310"
# Products by warp groups come with 9.0a, whose PTX runs on no later chip; clusters with 9.0.
CUDA_ARCHITECTURES = "8.0;9.0a;9.0+PTX"


def fail(reason: str, how: str = "") -> NoReturn:
    without = "To go on without the compiled extension (several times slower on a CPU)"
    sys.exit(f"error: {reason}\n{how or f'{without}: MOLEX_EXTENSION=0 {INSTALL}'}")


def switch(name: str) -> bool | None:
    """What the environment says: on, off, or nothing."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        sys.exit(f"error: {name}: expected 0 or 1, or nothing, got {value!r}")
    return value == "1" if value else None


EXTENSION, CUDA, SANITIZED = map(switch, ("MOLEX_EXTENSION", "MOLEX_CUDA", "MOLEX_SANITIZE"))
if EXTENSION is False and CUDA:
    sys.exit("error: MOLEX_CUDA=1 asks for CUDA code, and MOLEX_EXTENSION=0 for none at all")
if EXTENSION is False:
    BuildExtension = object  # nothing will be compiled
else:
    try:
        import torch
        from torch.utils import cpp_extension
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        fail(
            f"molex_kernels is built against the installed torch, which cannot be imported: {error}"
            f"\nInstall torch first, then: {INSTALL}"
        )


class Build(BuildExtension):
    """Compiles with CUDA where that is possible, else without; fails where nothing compiles."""

    def build_extensions(self) -> None:
        if reason := torch_misfit() or compiler_misfit():
            fail(reason)
        reason = without_cuda()
        if reason is None:
            try:
                self._compile(None)
                return
            except Exception as error:
                reason = f"its build failed: {error}"
        if CUDA:
            fail(
                f"MOLEX_CUDA=1, and the CUDA code cannot be built: {reason}",
                f"To go on without the CUDA code: MOLEX_CUDA=0 {INSTALL}",
            )
        if torch.version.cuda and CUDA is None:
            print(f"warning: the CUDA code is left out: {reason}", file=sys.stderr)
            print("warning: MOLEX_CUDA=1 makes this an error", file=sys.stderr)
        try:
            self._compile(reason)
        except Exception as error:
            fail(f"molex_kernels._C cannot be built: {error}")

    def copy_extensions_to_source(self) -> None:
        for other in ROOT.glob("molex_kernels/_C.cpython-*"):
            other.unlink()  # Python would load it before the one for every Python
        super().copy_extensions_to_source()

    def _compile(self, no_cuda: str | None) -> None:
        (target,) = self.extensions
        facts = Path(self.build_temp, "facts").absolute()
        facts.mkdir(parents=True, exist_ok=True)
        vars(target).update(vars(extension(no_cuda, facts)))
        super().build_extensions()


def torch_misfit() -> str | None:
    found = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if found >= OLDEST_TORCH:
        return None
    return "expected torch {}.{} or later, got torch ".format(*OLDEST_TORCH) + torch.__version__


def compiler_misfit() -> str | None:
    """Why the C++ compiler cannot be used, as far as that is known before anything is compiled."""
    compiler = cpp_extension.get_cxx_compiler()
    try:
        defined = macros(compiler)
    except (OSError, subprocess.CalledProcessError) as error:
        return f"there is no working C++ compiler (set CXX to one): {error}"
    name, oldest = ("clang", 14) if "__clang_major__" in defined else ("GCC", 11)
    version = int(defined.get("__clang_major__") or defined.get("__GNUC__") or 0)
    if version >= oldest:
        return None
    return f"expected GCC 11 or clang 14 or later (set CXX), got {compiler}: {name} {version}"


def macros(compiler: str) -> dict[str, str]:
    """What the compiler defines before it reads anything."""
    ask = [*shlex.split(compiler), "-dM", "-E", "-x", "c++", os.devnull]
    answer = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"#define (\w+) (\d+)", answer))


def level_flags() -> list[str]:
    """The level of x86-64 for a compiler that has to be told one, and was not."""
    compiler = cpp_extension.get_cxx_compiler()
    needs_one = {"__clang_major__", "__x86_64__"} <= macros(compiler).keys()
    told = "-march" in f"{compiler} {os.environ.get('CFLAGS')} {os.environ.get('CXXFLAGS')}"
    return [CLANG_LEVEL] if needs_one and not told else []


def without_cuda() -> str | None:
    """Why the CUDA code is left out, as far as that is known before anything is compiled."""
    if CUDA is False:
        return "MOLEX_CUDA=0"
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    home = cpp_extension.CUDA_HOME
    if home is None:
        return "no CUDA toolkit is found: neither CUDA_HOME nor nvcc on PATH"
    if not Path(home, "include/cuda_runtime.h").exists():
        return (
            f"{home} holds no CUDA toolkit: set CUDA_HOME to the folder with include/cuda_runtime.h"
        )
    nvcc = Path(home, "bin/nvcc")
    try:
        answer = subprocess.run(
            [nvcc, "--version"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"nvcc does not run: {error}"
    release = re.search(r"release (\d+)\.(\d+)", answer)
    if release is None or release[1] != torch.version.cuda.split(".")[0]:
        found = release[0] if release else "an unknown release"
        return f"{nvcc} is CUDA {found}, and torch is built with {torch.version.cuda}"
    return None


def sources(*patterns: str) -> list[str]:
    return [str(p.relative_to(ROOT)) for pattern in patterns for p in sorted(ROOT.glob(pattern))]


def operators(paths: list[str]) -> str:
    """The operators that these sources register, for the build facts, as `device:name`."""
    registered = re.compile(r'\.impl\(\s*"(\w+)"')
    return ",".join(
        sorted(
            f"{Path(path).parts[1]}:{name}"  # csrc/cpu/... or csrc/cuda/...
            for path in paths
            for name in registered.findall((ROOT / path).read_text())
        )
    )


def write_facts(path: Path, facts: dict[str, str]) -> None:
    """The header that bindings.cpp includes: an object's members in JSON, as a C string."""
    members = json.dumps(facts).removeprefix("{").removesuffix("}")
    path.write_text(f"#define MOLEX_BUILD_FACTS {json.dumps(members)}\n")


def extension(no_cuda: str | None, facts: Path) -> Extension:
    cuda = no_cuda is None
    kernels = sources("csrc/cpu/*/*.cpp", *(["csrc/cuda/*/*.cu"] if cuda else []))
    flags = CXX_FLAGS + level_flags() + (SANITIZE if SANITIZED else NO_DEBUG)
    nvcc = ["-O3", "-std=c++20", "-lineinfo", "--threads=2", "-DUSE_CUDA"]
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    write_facts(
        facts / "build_facts.h",
        {
            "torch_version": torch.__version__,
            "torch_target_version": TORCH_TARGET_VERSION,
            "cxx_flags": " ".join(flags),
            "cuda_version": torch.version.cuda if cuda else "",
            "cuda_architectures": os.environ["TORCH_CUDA_ARCH_LIST"] if cuda else "",
            "without_cuda": no_cuda or "",
            "operators": operators(kernels),
        },
    )
    kind = cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension
    return kind(
        "molex_kernels._C",
        ["csrc/bindings.cpp", *kernels],
        depends=sources("csrc/**/*.h", "csrc/**/*.cuh"),
        include_dirs=[str(ROOT.absolute() / "csrc"), str(facts)],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)],
        extra_compile_args={"cxx": flags, "nvcc": nvcc},
        extra_link_args=SANITIZE if SANITIZED else STRIP,
        py_limited_api=True,
    )


if EXTENSION is False:
    setup()
else:  # its sources are chosen when it is built
    setup(
        ext_modules=[Extension("molex_kernels._C", [], py_limited_api=True)],
        cmdclass={"build_ext": Build},
        options={"bdist_wheel": {"py_limited_api": PYTHON_TAG}},
    )
