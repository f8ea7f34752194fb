"""The build's own promises, tried on copies of the tree."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md")
WITHOUT = "MOLEX_EXTENSION=0 pip install --no-build-isolation ."
WITHOUT_CUDA = "MOLEX_CUDA=0 pip install --no-build-isolation ."
# What the build reads from the environment.
READ = ("MOLEX_EXTENSION", "MOLEX_CUDA", "MOLEX_SANITIZE", "CXX", "CC", "CFLAGS", "CXXFLAGS")
READ += ("CUDA_HOME", "CUDA_PATH")

# Runs setup.py with a torch that says of itself what the test needs it to say.
PRETEND = """
import runpy, sys, torch
from torch.utils import cpp_extension
torch.version.cuda, cpp_extension.CUDA_HOME, torch.__version__ = {cuda!r}, {home!r}, {version!r}
sys.argv = ["setup.py", *{arguments!r}]
runpy.run_path("setup.py", run_name="__main__")
"""
# An editable install of this package would lend its library to a package that has none.
ALONE = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
"""
FACTS = """
from molex_kernels import _extension
print(_extension.build_facts()["without_cuda"])
"""


def _copy(to: Path, *beside: str) -> Path:
    to.mkdir()
    left = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "molex_kernels", *beside):
        shutil.copytree(ROOT / name, to / name, ignore=left)
    for name in FILES:
        shutil.copy(ROOT / name, to)
    return to


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy whose kernels are two files that compile in no time."""
    copy = _copy(tmp_path / "tree")
    for source in [*copy.glob("csrc/cpu/*/*.cpp"), *copy.glob("csrc/cuda/*/*.cu")]:
        source.unlink()
    (copy / "csrc/cpu/common/tiny.cpp").write_text("int tiny() { return 0; }\n")
    (copy / "csrc/cuda/rpc_attention/tiny.cu").write_text("__global__ void tiny() {}\n")
    return copy


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = _copy(tmp_path_factory.mktemp("sdist") / "tree", "tests", "benchmarks")
    _succeeds(_setup(tree, "sdist", MOLEX_EXTENSION="0"))
    return next((tree / "dist").glob("*.tar.gz"))


def _run(command: list[str], where: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name not in READ}
    return subprocess.run(
        command, cwd=where, capture_output=True, text=True, env={**inherited, **environment}
    )


def _setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return _run([sys.executable, "setup.py", *arguments], tree, **environment)


def _pretend(tree: Path, **environment: str) -> subprocess.CompletedProcess:
    """Builds in place with a torch that says that it is built with CUDA 13.0."""
    home = environment.pop("home", None)
    version = environment.pop("version", "2.11.0+cu130")
    arguments = ["build_ext", "--inplace"]
    script = PRETEND.format(cuda="13.0", home=home, version=version, arguments=arguments)
    return _run([sys.executable, "-c", script], tree, **environment)


def _succeeds(run: subprocess.CompletedProcess) -> str:
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    return run.stdout


def _fails(run: subprocess.CompletedProcess, reason: str, way_on: str) -> None:
    assert run.returncode != 0
    assert reason in run.stderr
    assert run.stderr.rstrip().splitlines()[-1].endswith(way_on)


def _built(tree: Path) -> bool:
    return any((tree / "molex_kernels").glob("_C*"))


def _python(where: Path, script: str) -> list[str]:
    """What a script prints that has the package of `where` and no other."""
    return _succeeds(_run([sys.executable, "-c", ALONE + script], where)).splitlines()


def _program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def _toolkit(folder: Path, release: str) -> str:
    """A CUDA toolkit with the release that nvcc names, and nothing that compiles."""
    says = f'echo "Cuda compilation tools, release {release}, V{release}.1"'
    _program(folder / "bin/nvcc", f'[ "$1" = --version ] || exit 3\n{says}')
    (folder / "include").mkdir()
    (folder / "include/cuda_runtime.h").touch()
    return str(folder)


def test_the_sdist_holds_every_source_and_no_measurements(sdist: Path):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*") if p.is_file()}
    assert len(sources) > 40
    assert sources | set(FILES) <= names
    assert not [name for name in names if name.startswith(("benchmarks", "tests"))]


def test_an_install_from_the_sdist_loads_and_runs(sdist: Path, tmp_path: Path):
    """The one whole build."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
    ]
    target = tmp_path / "target"
    _succeeds(_run([*pip, "--target", str(target), str(sdist)], tmp_path, MOLEX_CUDA="0"))
    script = """
import torch
import molex_kernels as mk
from molex_kernels import _extension
print(mk.__file__)
print(_extension.why_not())
print(mk.route_plan(torch.tensor([[1, 0], [2, 1]]), 3, impl="cpu").counts.tolist())
"""
    place, reason, counts = _python(target, script)
    assert place == str(target / "molex_kernels/__init__.py")
    assert (reason, counts) == ("None", "[1, 2, 1]")
    assert (target / "molex_kernels/py.typed").exists()
    library = target / "molex_kernels/_C.abi3.so"
    assert library.stat().st_size < 3e6
    # The whole of Python that it needs, in the stable ABI since 3.2.
    needed = _succeeds(_run(["nm", "-D", "--undefined-only", str(library)], tmp_path))
    found = set(re.findall(r"\b_?Py\w+", needed))
    assert found == {"PyModule_Create2", "PyUnicode_FromStringAndSize"}
    assert "no symbols" in _run(["nm", str(library)], tmp_path).stderr


def test_a_wheel_is_for_every_python_of_its_platform(tree: Path):
    _succeeds(_setup(tree, "bdist_wheel", MOLEX_CUDA="0"))
    (wheel,) = (tree / "dist").glob("*.whl")
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert wheel.name.endswith(f"-cp310-abi3-{platform}.whl")
    assert "molex_kernels/_C.abi3.so" in zipfile.ZipFile(wheel).namelist()


def test_a_build_in_place_removes_one_for_a_single_python(tree: Path):
    other = tree / "molex_kernels/_C.cpython-310-x86_64-linux-gnu.so"
    other.touch()
    _succeeds(_setup(tree, "build_ext", "--inplace", MOLEX_CUDA="0"))
    assert [p.name for p in (tree / "molex_kernels").glob("_C*")] == ["_C.abi3.so"]


def test_left_out_by_choice(tree: Path, tmp_path: Path):
    """No torch, no compiler: a wheel for every platform, which knows why it has no library."""
    (tree / "torch.py").write_text("raise ImportError('no torch')")
    _succeeds(_setup(tree, "bdist_wheel", MOLEX_EXTENSION="0", CXX="false"))
    (wheel,) = (tree / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    script = "from molex_kernels import _extension; print(_extension.why_not())"
    (reason,) = _python(tmp_path / "installed", script)
    assert "the compiled extension was left out by choice, MOLEX_EXTENSION=0" in reason


@pytest.mark.parametrize("environment", [{}, {"MOLEX_EXTENSION": "1"}], ids=["unset", "demanded"])
def test_a_failed_build_is_an_error(tree: Path, environment):
    (tree / "csrc/cpu/common/tiny.cpp").write_text("this is not C++")
    run = _setup(tree, "build_ext", "--inplace", MOLEX_CUDA="0", **environment)
    _fails(run, "molex_kernels._C cannot be built", WITHOUT)
    assert not _built(tree)


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("exit 1", "there is no working C++ compiler"),
        ("echo '#define __GNUC__ 10'", "expected GCC 11 or clang 14 or later"),
        ("echo '#define __GNUC__ 4\n#define __clang_major__ 13'", "clang 13"),
    ],
    ids=["broken", "old GCC", "old clang"],
)
def test_a_compiler_that_cannot_be_used_is_an_error(tree: Path, compiler, reason):
    program = _program(tree / "compiler", compiler)
    run = _setup(tree, "build_ext", "--inplace", CXX=str(program))
    _fails(run, reason, WITHOUT)


@pytest.mark.parametrize(("asked", "level"), [("", True), ("-march=x86-64-v2", False)])
def test_clang_is_told_a_level_of_x86_64(tree: Path, asked, level):
    """A compiler that says it is clang; GCC stands behind it."""
    compiler = shutil.which("g++")
    program = f"""case "$*" in
        *-dM*) echo '#define __clang_major__ 18'; echo '#define __x86_64__ 1';;
        *) exec {compiler} "$@";;
    esac"""
    cxx = str(_program(tree / "compiler", program))
    _succeeds(_setup(tree, "build_ext", "--inplace", MOLEX_CUDA="0", CXX=cxx, CFLAGS=asked))
    (flags,) = _python(tree, FACTS.replace("without_cuda", "cxx_flags"))
    assert ("-march=x86-64-v3" in flags) == level


def test_no_compiler_is_an_error(tree: Path):
    run = _setup(tree, "build_ext", "--inplace", CXX=str(tree / "nowhere"))
    _fails(run, "there is no working C++ compiler", WITHOUT)


def test_without_torch_the_build_says_what_to_do(tree: Path):
    (tree / "torch.py").write_text("raise ImportError('no torch here')")
    run = _setup(tree, "--version")
    _fails(run, "Install torch first, then: pip install --no-build-isolation .", WITHOUT)


def test_a_torch_that_is_too_old_is_an_error(tree: Path):
    run = _pretend(tree, version="2.9.1")
    _fails(run, "expected torch 2.11 or later, got torch 2.9.1", WITHOUT)


@pytest.mark.parametrize("name", ["MOLEX_EXTENSION", "MOLEX_CUDA", "MOLEX_SANITIZE"])
def test_a_switch_is_0_or_1(tree: Path, name):
    run = _setup(tree, "--version", **{name: "yes"})
    assert run.returncode != 0
    assert f"{name}: expected 0 or 1, or nothing, got 'yes'" in run.stderr


def test_nothing_at_all_with_cuda_is_a_contradiction(tree: Path):
    run = _setup(tree, "--version", MOLEX_EXTENSION="0", MOLEX_CUDA="1")
    assert run.returncode != 0
    assert "MOLEX_EXTENSION=0" in run.stderr


# Why the CUDA code of a CUDA torch is left out: the toolkit to be tried, and what is said.
MISFITS = {
    "no toolkit": (lambda folder: None, "no CUDA toolkit is found"),
    "a folder above a wrapper": (str, "set CUDA_HOME to the folder with include/cuda_runtime.h"),
    "another release": (lambda folder: _toolkit(folder, "12.4"), "is CUDA release 12.4, and torch"),
    "does not compile": (lambda folder: _toolkit(folder, "13.0"), "its build failed: "),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_a_cuda_toolkit_that_does_not_fit_costs_the_cuda_code_only(tree: Path, misfit):
    make, reason = MISFITS[misfit]
    home = make(tree / "toolkit")
    demanded = _pretend(tree, home=home, MOLEX_CUDA="1")
    _fails(demanded, reason, WITHOUT_CUDA)
    assert not _built(tree)
    run = _pretend(tree, home=home)
    _succeeds(run)
    assert f"warning: the CUDA code is left out: {_python(tree, FACTS)[0]}" in run.stderr
    assert reason in run.stderr


def test_cuda_that_is_not_wanted_is_not_missed(tree: Path):
    run = _pretend(tree, MOLEX_CUDA="0")
    _succeeds(run)
    assert "CUDA" not in run.stderr
    assert _python(tree, FACTS) == ["MOLEX_CUDA=0"]


def test_a_torch_without_cuda_misses_none(tree: Path):
    import torch

    if torch.version.cuda:
        pytest.skip("this torch is built with CUDA")
    run = _setup(tree, "build_ext", "--inplace")
    _succeeds(run)
    assert "CUDA" not in run.stderr
    assert _python(tree, FACTS) == ["torch is built without CUDA"]
    run = _setup(tree, "build_ext", "--inplace", MOLEX_CUDA="1")
    reason = "MOLEX_CUDA=1, and the CUDA code cannot be built: torch is built without CUDA"
    _fails(run, reason, WITHOUT_CUDA)
