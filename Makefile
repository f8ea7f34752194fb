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

SOURCES := pyproject.toml setup.py $(wildcard csrc/*.cpp csrc/*/*/*)
# Two test processes share the machine, so each keeps to one thread.
PYTEST  := OMP_NUM_THREADS=1 $(PY) -m pytest
PARALLEL = $(shell $(PY) -c "import xdist; print('-n $(JOBS)')" 2>/dev/null)

.PHONY: bench bench-compare bench-train test test-models aot-facts emulate gpu gpu-build gpu-test gpu-bench gpu-train gpu-sanitize gpu-pack \
	sanitize rehearse rehearse-tree rehearse-build rehearse-kernels rehearse-tests \
	build ready wheel wheel-cuda wheels sdist env docs lint style types format dev clean

# BENCH has further options: `--dtype bf16` measures every op in 16 bits.
BENCH ?=
bench: $(READY)
	$(PY) -m benchmarks --preset quick $(BENCH)

# Small models on real text and images, and a fine-tune; what is not done after TRAIN_SECONDS is cut off.
TRAIN_SECONDS ?= 1800
bench-train: $(READY)
	$(PY) -m benchmarks.end_to_end --preset quick --limit $(TRAIN_SECONDS)

# Measures, and fails where ours became slower than in RUN: this machine's latest stored run, or a file.
RUN ?=
bench-compare: $(READY)
	$(PY) -m benchmarks --preset quick --compare $(RUN)

# Everything, or what TESTS names: files, and options of pytest.
TESTS ?=
test: $(READY)
	$(PYTEST) $(PARALLEL) -q $(TESTS)

# Tries every function of the integrations on a tiny model of each family: docs/models.md.
test-models: $(READY)
	PYTHONPATH=tests:. OMP_NUM_THREADS=1 $(PY) tests/model_table.py

# Keeps what the compiler makes of the Triton kernels; the diff of the file is what a change does to it.
aot-facts: $(READY)
	PYTHONPATH=tests:. $(PY) -m aot --write >/dev/null

# The Triton tests as a GPU runs them, on a CPU: all of them, or a part that TESTS names ("-k topk").
emulate:
	JOBS=$(JOBS) .ci/emulate $(TESTS)

# Everything that needs a GPU, in steps that can be run one by one, each within 9 minutes on 16 cores.
# All of them run, whatever fails; what they print and find goes to GPU_OUT as it comes.
GPU_OUT ?= benchmarks/reports/gpu
GPU_STEPS := gpu-build gpu-test gpu-bench gpu-train gpu-sanitize
to_gpu_out = 2>&1 | tee "$(GPU_OUT)/$(1).txt"
gpu: | $(GPU_OUT)
	source .ci/stages.sh; \
	{ for step in $(GPU_STEPS); do stage $$step $(MAKE) $$step; done; stages_end; } \
		$(call to_gpu_out,steps); status=$$?; $(MAKE) gpu-pack; exit $$status

$(GPU_STEPS): $(ENVIRONMENT) | $(GPU_OUT)
$(GPU_OUT):
	mkdir -p "$@"

# Fails, and says why, where the library has no CUDA code.
CUDA_RUNS := "import sys; from molex_kernels import _backends; sys.exit(_backends.CUDA.why_not())"
gpu-build gpu-sanitize: export CUDA_HOME := $(or $(CUDA_HOME),/usr/local/cuda)
gpu-build:
	MOLEX_CUDA=1 MOLEX_EXTENSION=1 timeout -k 30 500 $(PY) setup.py --quiet build_ext --inplace \
		$(call to_gpu_out,build); status=$$?; \
	$(PY) -m molex_kernels.env $(call to_gpu_out,env) && exit $$status
	$(PY) -c $(CUDA_RUNS)

# All cores. By SIGINT pytest still says what failed before the time was up.
gpu-test gpu-sanitize: JOBS := $(shell nproc)
GPU_PYTEST = OMP_NUM_THREADS=1 timeout -s INT -k 30 500 $(PY) -m pytest $(PARALLEL) -v --tb=short
gpu-test:
	$(GPU_PYTEST) -m gpu $(call to_gpu_out,tests)

# Cut short, they report what they have measured by then.
GPU_REPORT = --preset gpu --out "$(GPU_OUT)/report" --save-results "$(GPU_OUT)/report/stored"
gpu-bench:
	timeout -k 40 500 $(PY) -m benchmarks $(GPU_REPORT) $(call to_gpu_out,bench)

gpu-train:
	$(PY) -m benchmarks.end_to_end $(GPU_REPORT) --limit 120 2>&1 | tee -a "$(GPU_OUT)/bench.txt"

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

# A copy of the tree without what was built in this one; what was built in the copy is kept.
define copy_tree
mkdir -p $(1)
find $(1) -mindepth 1 -maxdepth 1 ! -name build -exec rm -rf {} +
tar -c --exclude='*.so' --exclude=__pycache__ csrc tests benchmarks molex_kernels setup.py pyproject.toml \
	README.md LICENSE | tar -C $(1) -x
endef

# The native CPU code under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree.
SANITIZED := build/sanitized
PY_PATH    = $(abspath $(shell command -v $(PY)))
sanitize: $(READY)
	$(call copy_tree,$(SANITIZED))
	cd $(SANITIZED) && MOLEX_SANITIZE=1 MOLEX_CUDA=0 MOLEX_EXTENSION=1 \
		$(PY_PATH) setup.py --quiet build_ext --inplace
	cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=2 $(PY_PATH) -m pytest -q -p no:cacheprovider \
		tests/test_native.py tests/test_contract.py -k "native or (cpu and (budget or strided))"

# All of a GPU machine but the GPU: its versions in a venv of their own (several GB, made once), in a copy
# of the tree. Triton 3.6 cannot interpret with its numpy, so no interpreted kernels are tested.
REHEARSED    := build/rehearsed
IN_REHEARSED := cd $(REHEARSED) && OMP_NUM_THREADS=1
SCRIPTS      := $(CURDIR)/.ci
REHEARSE_PY   = "$$($(SCRIPTS)/venv $(SCRIPTS)/rehearse.txt "$$($(SCRIPTS)/python312 "$(REHEARSE_PYTHON)")")"

rehearse: rehearse-build rehearse-kernels rehearse-tests

rehearse-tree:
	$(call copy_tree,$(REHEARSED))

# The extension with CUDA: it compiles, loads and has every operator.
rehearse-build: export CUDA_HOME := $(or $(CUDA_HOME),/usr/local/cuda)
rehearse-build: rehearse-tree
	cd $(REHEARSED) && MOLEX_EXTENSION=1 MOLEX_CUDA=1 TORCH_CUDA_ARCH_LIST=9.0a \
		$(REHEARSE_PY) setup.py --quiet build_ext --inplace
	cd $(REHEARSED) && $(REHEARSE_PY) -m molex_kernels.env
	cd $(REHEARSED) && $(REHEARSE_PY) -c $(CUDA_RUNS)

# Every kernel, compiled for the GPU by its Triton.
rehearse-kernels: rehearse-tree
	$(IN_REHEARSED) MOLEX_AOT_TARGETS=sm_90 MOLEX_AOT_DTYPES=bfloat16 \
		$(REHEARSE_PY) -m pytest -q -n $(JOBS) tests/test_aot.py

REHEARSE_TESTS := extension native implementations integrations timm rpc_cuda
rehearse-tests: rehearse-build
	$(IN_REHEARSED) $(REHEARSE_PY) -m pytest -q -n $(JOBS) \
		$(REHEARSE_TESTS:%=tests/test_%.py)

env: $(READY)
	$(PY) -m molex_kernels.env

# The documentation, into build/site, in an environment of its own. A warning is an error, and so is a
# page that loads something from elsewhere. The package is read, not imported: torch is not needed.
DOCS_PYTHON ?= python3
docs:
	NO_MKDOCS_2_WARNING=1 "$$(.ci/venv .ci/docs.txt "$(DOCS_PYTHON)")" -m mkdocs build --strict

CLANG_FORMAT = $(PY) -c "from clang_format import clang_format; clang_format()"
CPP_FILES    = $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')

lint: style types

style: dev
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(CLANG_FORMAT) --dry-run --Werror $(CPP_FILES)

types: dev
	$(PY) -m mypy

format: dev
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .
	$(CLANG_FORMAT) -i $(CPP_FILES)

dev: $(READY)
	@$(PY) -c "import ruff, mypy, clang_format" 2>/dev/null || \
		$(PY) -m pip install -q -e ".[dev]" --no-build-isolation

# What tests and benchmarks need: the environment, and the extension.
ready: $(READY)

build:
	$(PY) setup.py --quiet build_ext --inplace

# One wheel for every Python from 3.10 on, for this platform: without the CUDA code, or with it.
WHEEL = $(PY) -m pip wheel -q --no-build-isolation --no-deps --wheel-dir dist .
wheel: $(READY)
	MOLEX_EXTENSION=1 MOLEX_CUDA=0 $(WHEEL)
wheel-cuda: $(READY)
	MOLEX_EXTENSION=1 MOLEX_CUDA=1 $(WHEEL)

# Wheels as a release has them, built and tried by cibuildwheel, which pyproject.toml sets up.
wheels: $(VENV)/bin/python
	$(PY) -m pip install -q "cibuildwheel>=3"
	$(PY) -m cibuildwheel --output-dir dist

sdist: $(READY)
	MOLEX_EXTENSION=0 $(PY) setup.py --quiet sdist

# An interpreter that already has torch lends it to the environment; otherwise torch is installed.
$(VENV)/bin/python:
	python3 -m venv $(VENV) $$(python3 -c "import torch; print('--system-site-packages')" 2>/dev/null)

$(VENV)/.ready: $(VENV)/bin/python $(SOURCES)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install $(TORCH)
	$(PY) -m pip install -q "setuptools>=77" ninja
	$(PY) -m pip install -q --no-build-isolation -e ".[test,bench]"
	touch $@

clean:
	rm -rf build dist *.egg-info molex_kernels/*.so .pytest_cache .mypy_cache .ruff_cache
