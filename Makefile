# Two commands: `make bench` and `make test`. Both set up what they need in .venv, once.
# With PYTHON=python3 they use that interpreter as it is: nothing is installed, no network is needed.

SHELL := /bin/bash
.SHELLFLAGS := -o pipefail -c

VENV  := .venv
TORCH ?= torch==2.13.0 triton==3.7.1
JOBS  ?= 2

ifdef PYTHON
PY          := $(PYTHON)
READY       := build
ENVIRONMENT :=
else
PY          := $(VENV)/bin/python
READY       := $(VENV)/.ready
ENVIRONMENT := $(READY)
endif

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*)
# Two test processes share the machine, so each keeps to one thread.
PYTEST  := OMP_NUM_THREADS=1 $(PY) -m pytest
PARALLEL = $(shell $(PY) -c "import xdist; print('-n $(JOBS)')" 2>/dev/null)

.PHONY: bench bench-compare test emulate gpu gpu-build gpu-test gpu-bench gpu-sanitize gpu-pack sanitize \
	build ready env lint format clean

bench: $(READY)
	$(PY) -m benchmarks --preset quick

# Measures, and fails where ours became slower than in RUN: this machine's latest stored run, or a file.
RUN ?=
bench-compare: $(READY)
	$(PY) -m benchmarks --preset quick --compare $(RUN)

# Everything, or what TESTS names: files, and options of pytest.
TESTS ?=
test: $(READY)
	$(PYTEST) $(PARALLEL) -q $(TESTS)

# The Triton tests as a GPU runs them, on a CPU: all of them, or a part that TESTS names ("-k topk").
emulate:
	JOBS=$(JOBS) .ci/emulate $(TESTS)

# Everything that needs a GPU, in steps that can be run one by one, each within 9 minutes on 16 cores.
# All of them run, whatever fails; what they print and find goes to GPU_OUT as it comes.
GPU_OUT ?= benchmarks/reports/gpu
GPU_STEPS := gpu-build gpu-test gpu-bench gpu-sanitize
to_gpu_out = 2>&1 | tee "$(GPU_OUT)/$(1).txt"
gpu: | $(GPU_OUT)
	source .ci/stages.sh; \
	{ for step in $(GPU_STEPS); do stage $$step $(MAKE) $$step; done; stages_end; } \
		$(call to_gpu_out,steps); status=$$?; $(MAKE) gpu-pack; exit $$status

$(GPU_STEPS): $(ENVIRONMENT) | $(GPU_OUT)
$(GPU_OUT):
	mkdir -p "$@"

gpu-build gpu-sanitize: export CUDA_HOME := $(or $(CUDA_HOME),/usr/local/cuda)
gpu-build:
	MOLEX_CUDA=1 MOLEX_EXTENSION=1 timeout -k 30 500 $(PY) setup.py --quiet build_ext --inplace \
		$(call to_gpu_out,build); status=$$?; \
	$(PY) -m molex_kernels.env $(call to_gpu_out,env) && exit $$status
	$(PY) -c "import sys; from molex_kernels import _dispatch; sys.exit(_dispatch.CUDA.why_not())"

# All cores. By SIGINT pytest still says what failed before the time was up.
gpu-test gpu-sanitize: JOBS := $(shell nproc)
GPU_PYTEST = OMP_NUM_THREADS=1 timeout -s INT -k 30 500 $(PY) -m pytest $(PARALLEL) -v --tb=short
gpu-test:
	$(GPU_PYTEST) -m gpu $(call to_gpu_out,tests)

# Cut short, it reports what it has measured by then.
gpu-bench:
	timeout -k 60 470 $(PY) -m benchmarks --preset gpu --out "$(GPU_OUT)/report" \
		--save-results "$(GPU_OUT)/report/stored" $(call to_gpu_out,bench)

gpu-sanitize: export PATH := $(PATH):$(CUDA_HOME)/bin
gpu-sanitize:
	@command -v compute-sanitizer >/dev/null || { echo "gpu-sanitize: compute-sanitizer of the CUDA toolkit" \
		"is neither on PATH nor in $(CUDA_HOME)/bin" $(call to_gpu_out,sanitize); exit 1; }
	$(GPU_PYTEST) -m sanitizer $(call to_gpu_out,sanitize)

# At most 8 files: the texts, the report's text, and all.tgz, which holds everything and comes last.
gpu-pack: | $(GPU_OUT)
	rm -f "$(GPU_OUT)/all.tgz" && tar -C "$(GPU_OUT)" -czf "$(GPU_OUT).tgz" .
	cd "$(GPU_OUT)" && { [ ! -f report/report.md ] || cp report/report.md . ; } && rm -rf report
	mv "$(GPU_OUT).tgz" "$(GPU_OUT)/all.tgz"

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

# What tests and benchmarks need: the environment, and the extension.
ready: $(READY)

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
