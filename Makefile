# Two commands: `make bench` and `make test`. Both set up what they need in .venv, once.
# With PYTHON=python3 they use that interpreter as it is: nothing is installed, no network is needed.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

VENV  := .venv
TORCH ?= torch==2.13.0 triton==3.7.1
JOBS  ?= 2

ifdef PYTHON
PY    := $(PYTHON)
READY := build
else
PY    := $(VENV)/bin/python
READY := $(VENV)/.ready
endif

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
# Two test processes share the machine, so each keeps to one thread.
PYTEST  := OMP_NUM_THREADS=1 $(PY) -m pytest
PARALLEL = $(shell $(PY) -c "import xdist; print('-n $(JOBS)')" 2>/dev/null)

.PHONY: bench bench-compare test emulate gpu sanitize build env lint format clean

bench: $(READY)
	$(PY) -m benchmarks --preset quick

# Measures, and fails where ours became slower than in RUN: this machine's latest stored run, or a file.
RUN ?=
bench-compare: $(READY)
	$(PY) -m benchmarks --preset quick --compare $(RUN)

test: $(READY)
	$(PYTEST) $(PARALLEL) -q

# The Triton tests as a GPU runs them, on a CPU; ONLY="-k topk_route" runs a part of them.
ONLY ?=
emulate:
	JOBS=$(JOBS) .ci/emulate $(ONLY)

# Everything that needs a GPU: builds, tests, measures, and writes what it found to GPU_OUT.
GPU_OUT ?= benchmarks/reports/gpu
gpu: $(READY)
	mkdir -p "$(GPU_OUT)"
	$(PY) -m molex_kernels.env | tee "$(GPU_OUT)/env.txt"
	$(PYTEST) $(PARALLEL) -q -m gpu 2>&1 | tee "$(GPU_OUT)/tests.txt"
	$(PY) -m benchmarks --preset gpu --out "$(GPU_OUT)" --save-results
	tar -C "$(GPU_OUT)" -czf "$(GPU_OUT).tgz" . && mv "$(GPU_OUT).tgz" "$(GPU_OUT)/all.tgz"

# The native CPU code under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree.
SANITIZED := build/sanitized
sanitize: $(READY)
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED)
	cp -r csrc tests benchmarks setup.py pyproject.toml README.md LICENSE $(SANITIZED)
	mkdir $(SANITIZED)/molex_kernels
	tar -C molex_kernels -c --exclude='*.so' --exclude=__pycache__ . | tar -C $(SANITIZED)/molex_kernels -x
	cd $(SANITIZED) && MOLEX_SANITIZE=1 MOLEX_CUDA=0 MOLEX_EXTENSION=1 \
		$(abspath $(PY)) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(abspath $(PY)) -m pytest -q -p no:cacheprovider \
		tests/test_native.py tests/test_contract.py -k "native or (cpu and (budget or strided))"

env: $(READY)
	$(PY) -m molex_kernels.env

lint: $(READY)
	@$(PY) -c "import ruff, mypy" 2>/dev/null || $(PY) -m pip install -q -e ".[dev]" --no-build-isolation
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

format: $(READY)
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

build:
	$(PY) setup.py --quiet build_ext --inplace

# An interpreter that already has torch lends it to the environment; otherwise torch is installed.
$(VENV)/bin/python:
	python3 -m venv $(VENV) $$(python3 -c "import torch; print('--system-site-packages')" 2>/dev/null)

$(VENV)/.ready: $(VENV)/bin/python $(SOURCES)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -q "setuptools>=77" ninja "pybind11>=2.12"
	$(PY) -m pip install -q --no-build-isolation -e ".[test,bench]"
	touch $@

clean:
	rm -rf build *.egg-info molex_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
