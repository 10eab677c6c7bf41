# make demo | test | test-versions | check | aot | bench: each works on a fresh clone and keeps its environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
# As many test workers as cores, of one thread each, or they fight.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test test-versions check aot bench gpu tune has-gpu clean

demo: .venv/ready
	$(BIN)/levelhead demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both ends of what is supported, each in an environment of its own: docs/versions.md.
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.17.0
NEWEST := torch==2.15.0 triton==3.9.0 transformers==5.24.0

test-versions: build/oldest/ready build/newest/ready
	for end in oldest newest; do OMP_NUM_THREADS=1 build/$$end/bin/python -m pytest -n $(WORKERS) --dist loadfile \
		tests/laws tests/ops tests/integrations tests/triton || exit; done

build/oldest/ready: STACK := $(OLDEST)
build/newest/ready: STACK := $(NEWEST)
build/%/ready: pyproject.toml Makefile
	$(PYTHON) -m venv --clear build/$*
	build/$*/bin/python -m pip install --quiet --upgrade pip
	build/$*/bin/python -m pip install --quiet $(STACK) --group test --editable '.[demo,sft,report,trl,deepspeed]'
	@touch $@

# Compiles the Triton kernels for chips that need not be here, and prints what the compilers made of them.
aot: .venv/ready
	$(BIN)/python -m tests.triton.aot

bench: .venv/ready
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.render

# Tests and benchmark on a GPU; then the tuner, which rewrites the pinned launch configurations. Both run as they are in
# an interpreter that has a GPU build of torch, triton, pytest and hypothesis, without network and without .venv:
# make gpu GPU_PYTHON=/path/to/python. In a copy without its repository, COMMIT=... says what was measured.
GPU_PYTHON ?= python3

gpu tune: export PYTHONPATH := src:$(PYTHONPATH)

gpu: has-gpu
	$(GPU_PYTHON) -m pytest -m gpu -q tests/ops tests/laws tests/triton tests/benchmarks
	$(GPU_PYTHON) -m benchmarks.gpu

tune: has-gpu
	$(GPU_PYTHON) -m benchmarks.tune

has-gpu:
	@$(GPU_PYTHON) -c 'import sys, importlib.util as u; m = [n for n in ("torch", "triton", "pytest", "hypothesis") if u.find_spec(n) is None]; sys.exit(bool(m) and sys.executable + " lacks " + ", ".join(m) + ": make gpu GPU_PYTHON=/path/to/python")'
	@$(GPU_PYTHON) -m benchmarks.gpu --check

# torch goes first and alone: a machine whose pip offers a CPU build keeps it, because nothing later asks for another.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Levelhead needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test --group bench --editable '.[demo,sft,report,trl,deepspeed]'
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
