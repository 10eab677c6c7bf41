# make demo | test | check | bench: each works on a fresh clone and keeps its environment in .venv.
PYTHON ?= python3
BIN := .venv/bin
# As many test workers as cores, of one thread each, or they fight.
WORKERS ?= $(shell nproc 2>/dev/null || echo 2)

.PHONY: demo test check bench clean

demo: .venv/ready
	$(BIN)/levelhead demo

test: check
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/ready
	$(BIN)/python -m benchmarks
	$(BIN)/levelhead demo --output benchmarks/results/demo
	$(BIN)/python -m benchmarks.render

# torch goes first and alone: a machine whose pip offers a CPU build keeps it, because nothing later asks for another.
.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Levelhead needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group test --editable '.[demo,sft,trl,deepspeed]'
	@touch $@

clean:
	rm -rf .venv build dist src/*.egg-info
