# Every target works in a fresh clone, from nothing but python3 (3.11 or 3.12) and pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: install demo test test-all check bench clean
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	touch $(STAMP)

# A real text of more than 100,000 tokens on two ranks, and a question about it.
demo: $(STAMP)
	$(BIN)/python examples/needle.py

# Everything that proves correctness in minutes.
test: $(STAMP)
	$(BIN)/pytest -m "not slow"

# The all-pairs cover of ranks, strategies, placements, page sizes and chunk cuts; under 30 minutes.
test-all: $(STAMP)
	$(BIN)/pytest

# Format, lint, types, layers, fast tests; under two minutes.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -m "not slow and not processes" -x

bench: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev,bench]"
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/decode.py

clean:
	rm -rf .venv build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
