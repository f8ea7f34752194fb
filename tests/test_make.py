"""The steps of `make gpu` and the stages of a check: what fails stops nothing, and is not lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXTS = {f"{name}.txt" for name in ("steps", "build", "env", "tests", "bench", "sanitize")}

# Stands for Python: notes what it was asked to do, leaves a report, and fails where it is told to.
STUB = """#!/usr/bin/env bash
echo "$* cuda=$MOLEX_CUDA,$CUDA_HOME extension=$MOLEX_EXTENSION" >> "$NOTES"
case "$*" in *xdist*) exit ;; esac
case "$*" in
    *benchmarks*)
        folder=$(sed 's/.*--out \\([^ ]*\\).*/\\1/' <<< "$*")
        mkdir -p "$folder/stored/card"
        for file in report.md results.json a.svg b.svg c.svg stored/card/run.json; do
            echo "$file" > "$folder/$file"
        done ;;
esac
for word in $FAILING; do case "$*" in *"$word"*) echo "$word fails"; exit 7 ;; esac; done
"""


@pytest.fixture
def gpu(tmp_path: Path):
    """Runs a step with these commands failing: what it did, the folder, and what was asked for."""
    if shutil.which("make") is None:
        pytest.skip("needs make")
    python, notes, out = tmp_path / "python", tmp_path / "notes", tmp_path / "out"
    sanitizer = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir(parents=True)
    for program, text in ((python, STUB), (sanitizer, "#!/bin/sh\n")):
        program.write_text(text)
        program.chmod(0o755)

    def run(step: str = "gpu", failing: str = "", **settings: str):
        notes.write_text("")
        done = subprocess.run(
            ["make", step, f"PYTHON={python}", f"GPU_OUT={out}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={
                **_plain(),
                "NOTES": str(notes),
                "FAILING": failing,
                "CUDA_HOME": str(tmp_path / "cuda"),
                **settings,
            },
        )
        return done, out, notes.read_text()

    return run


def _plain() -> dict[str, str]:
    """The environment, without what an outer make or a GPU's shell put there."""
    ours = ("MAKE", "MFLAGS", "CUDA_HOME", "MOLEX_CUDA", "MOLEX_EXTENSION")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


def test_a_step_that_fails_stops_no_other(gpu):
    done, out, asked = gpu(failing="build_ext --tb")
    assert done.returncode != 0
    assert f"build_ext --inplace cuda=1,{out.parent}/cuda extension=1" in asked
    wanted = ["build_ext", "molex_kernels.env", "-m gpu", "--preset gpu", "-m sanitizer"]
    places = [asked.index(part) for part in wanted]
    assert places == sorted(places), asked
    steps = (out / "steps.txt").read_text()
    for step, status in (("build", "FAILED"), ("test", "FAILED"), ("bench", "ok")):
        assert any(f"gpu-{step} " in line and status in line for line in steps.splitlines()), steps


def test_what_there_is_comes_in_few_files(gpu):
    for failing in ("--tb", "benchmarks", ""):
        done, out, _ = gpu(failing=failing)
        assert (done.returncode == 0) == (not failing), done.stderr
        assert {f.name for f in out.iterdir()} == TEXTS | {"report.md", "all.tgz"}
        assert len(list(out.iterdir())) <= 8
        with tarfile.open(out / "all.tgz") as packed:
            names = {name.removeprefix("./") for name in packed.getnames()}
        assert names >= TEXTS | {"report/c.svg", "report/stored/card/run.json"}
        assert not any(".tgz" in name for name in names)


def test_a_step_alone(gpu):
    done, out, asked = gpu("gpu-build", CUDA_HOME="")
    assert done.returncode == 0, done.stderr
    assert "cuda=1,/usr/local/cuda extension=1" in asked
    assert {f.name for f in out.iterdir()} == {"build.txt", "env.txt"}
    assert gpu("gpu-build", failing="kernels.env")[0].returncode != 0
    assert gpu("gpu-build", failing="_backends")[0].returncode != 0, "built, and does not load"
    for step, failing in (("test", "--tb"), ("bench", "benchmarks"), ("sanitize", "--tb")):
        assert gpu(f"gpu-{step}", failing=failing)[0].returncode != 0
    if shutil.which("compute-sanitizer") is None:
        done, out, asked = gpu("gpu-sanitize", CUDA_HOME="/nowhere")
        assert done.returncode != 0
        assert "is neither on PATH" in (out / "sanitize.txt").read_text()
        assert "pytest -v" not in asked


def test_stages_keep_the_worst_status():
    script = """
    source .ci/stages.sh
    stage first true
    stage second sh -c 'exit 5'
    stage third sh -c 'exit 3'
    stage fourth echo "goes on"
    stages_end
    """
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 5
    assert "\ngoes on\n" in done.stdout
    table = [line.split() for line in done.stdout.strip().splitlines()[-5:]]
    assert [line[0] for line in table] == ["first", "second", "third", "fourth", "total"]
    assert [line[3] for line in table[:4]] == ["ok", "FAILED,", "FAILED,", "ok"]
