# make demo | test | test-all | test-versions | check | aot | bench: each works on a fresh clone and keeps its
# environment in .venv, but for test-versions.
PYTHON ?= python3
BIN := .venv/bin
# As many test workers as cores, of one thread each, or they fight. A worker that is done takes half of what another has
# left: tests of a file stay together, with what they share, but at such a cut.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --durations 10

.PHONY: demo test test-all test-versions check aot bench gpu has-gpu clean

demo: .venv/demo
	$(BIN)/levelhead demo

# What guards correctness, in minutes; then also what takes long.
test: check
	$(PYTEST) -m "not slow"

test-all: test
	$(PYTEST) -m slow

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Both ends of what is supported, each in an environment of its own: docs/versions.md. Triton 3.6's interpreter takes an
# array of one element for a number, which numpy 2.4 no longer allows.
OLDEST := torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.3.5
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

# What a GPU is for, in stages of nine minutes (benchmarks/gpu.py): `make gpu-decide OUTPUT=folder`, and so on; all of
# them: `make gpu`, with -k whatever fails. They run as they are in an interpreter that has a GPU build of torch, triton,
# pytest, pytest-xdist and hypothesis, without network and without .venv: GPU_PYTHON=/path/to/python. In a copy without
# its repository, COMMIT=... says what was measured.
GPU_PYTHON ?= python3
OUTPUT ?= benchmarks/results
STAGES := $(addprefix gpu-,decide test bench tune)
.PHONY: $(STAGES)

gpu: $(STAGES)

$(STAGES): export PYTHONPATH := src:$(PYTHONPATH)
$(STAGES): gpu-%: has-gpu
	$(GPU_PYTHON) -m benchmarks.gpu $* --output $(OUTPUT)

has-gpu:
	@$(GPU_PYTHON) -c 'import sys, importlib.util as u; m = [n for n in ("torch", "triton", "pytest", "xdist", "hypothesis") if u.find_spec(n) is None]; sys.exit(bool(m) and sys.executable + " lacks " + ", ".join(m) + ": make gpu GPU_PYTHON=/path/to/python")'

# torch goes first and alone: a machine whose pip offers a CPU build keeps it, because nothing later asks for another.
# What [demo] asks for is named, so that triton stays out: a gigabyte that a CPU has no use for. Of all that is installed
# the demo imports little, so that is compiled as it goes; tests start many processes, and it is compiled for them.
PIP = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.venv/demo: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Levelhead needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) matplotlib rich transformers
	$(PIP) --no-deps --editable .
	@touch $@

.venv/ready: .venv/demo
	$(PIP) --upgrade pip
	$(PIP) --group test --group bench --editable '.[demo,sft,report,trl,deepspeed]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true  # some packages hold files for other versions of Python
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
