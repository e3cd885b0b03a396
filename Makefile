# Every target works in a fresh clone, from nothing but python3 (3.11 or 3.12) and pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# Parallel test processes share the cores: one compute thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest

.PHONY: install demo test test-all check bench clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml $(wildcard src/longspan/native/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

# A real text of more than 100,000 tokens on two ranks, and a question about it.
demo: $(STAMP)
	$(BIN)/python examples/needle.py

# Everything that proves correctness in minutes: first what runs inside one process, on all cores, then real processes,
# one test at a time, since they have deadlines.
test: $(STAMP)
	$(PYTEST) -n auto -m "not slow and not processes"
	$(PYTEST) -m "processes and not slow"

# The all-pairs cover of ranks, strategies, placements, page sizes and chunk cuts; under 30 minutes.
test-all: $(STAMP)
	$(PYTEST) -n auto -m "not processes"
	$(PYTEST) -m processes

# Format, lint, types, layers, fast tests; under two minutes.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -n auto -m "not slow and not processes and not cover" -x

bench: $(STAMP)
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/prefill.py --memory
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
