# Every target sets itself up in .venv from nothing; `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
WORKERS ?= 2
GPU_WORKERS ?= 4
ARGS ?=

BIN := $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check install $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
NEEDS := pyproject.toml setup.py $(CONSTRAINTS) $(NATIVE)

ifneq ($(words $(VENV)),1)
$(error VENV must be one path without spaces, got '$(VENV)')
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test gpu-test gpu-session sanitize races lint bench paper format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' Makefile
	@echo 'Variables: PYTHON=python3.11  CONSTRAINTS= (no pinned versions)  ARGS="..." (for pytest or the demo)  OUT= PARTS= LIMITS= (bench/gpu.sh)'

demo: $(VENV)/.ready-demo  ## simulate a small set, train, evaluate, and draw the pictures in demo/
	$(BIN)/eqcvt demo --out demo $(ARGS)

test: $(VENV)/.ready-test  ## run the tests
	$(BIN)/python -m pytest -p no:benchmark -n $(WORKERS) --dist worksteal $(ARGS)

gpu-test: $(VENV)/.ready-test  ## run the tests that need a GPU, and fail where there is none
	EQCVT_REQUIRE=cuda $(BIN)/python -m pytest -p no:benchmark -m gpu -n $(GPU_WORKERS) --dist worksteal $(ARGS)

sanitize: $(VENV)/.ready-test  ## run the GPU kernels under compute-sanitizer; the record goes to bench/results/
	$(BIN)/python -m bench.sanitize $(ARGS)

races: $(VENV)/.ready-test  ## look for races in the CUDA kernels, emulated on the CPU: minutes, no GPU
	$(BIN)/python -m tests.native.cuda_emulator thread $(ARGS)

gpu-session: $(VENV)/.ready-test  ## on a machine with a GPU: build, test, check, tune, time, sanitize
	PYTHON=$(BIN)/python bench/gpu.sh

lint: $(VENV)/.ready-lint  ## check style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy
	$(if $(NATIVE),$(BIN)/clang-format --dry-run --Werror $(NATIVE))

bench: $(VENV)/.ready-test  ## check, then time the models; the numbers go to bench/results/
	$(BIN)/python -m pytest bench $(ARGS)

paper: $(VENV)/.ready-demo  ## make the paper's table from nothing, or go on with it: paper/
	$(BIN)/python -m bench.paper $(ARGS)

format: $(VENV)/.ready-lint  ## rewrite the sources in the house style
	$(BIN)/python -m ruff format .
	$(BIN)/python -m ruff check --fix .
	$(if $(NATIVE),$(BIN)/clang-format -i $(NATIVE))

clean:  ## remove build products and caches (not .venv, demo/ or runs/)
	rm -rf build dist eqcvt.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find eqcvt kernels tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.ready-venv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and "eqcvt needs Python 3.11 or newer, and $(PYTHON) is %d.%d: name another, as in make PYTHON=python3.11" % v[:2])'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo '$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv) or name another, as in make PYTHON=python3.11' >&2; exit 1; }
	@test ! -e '$(VENV)' || test -e '$(VENV)/pyvenv.cfg' || { echo '$(VENV) exists and is no virtual environment: move it away or name another folder, as in make VENV=.env' >&2; exit 1; }
	@test -x $(BIN)/python || echo 'Setting up $(VENV); the first time this downloads some hundred megabytes.'
	@$(BIN)/python -c 'import pip' 2>/dev/null || $(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.ready-demo: $(VENV)/.ready-venv $(NEEDS)
	$(PIP) -e '.[sim]'
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-venv $(NEEDS) tests/requirements-escnn.txt
	$(PIP) -e '.[test]'
	$(PIP) --no-deps -r tests/requirements-escnn.txt
	@touch $@

$(VENV)/.ready-lint: $(VENV)/.ready-venv $(NEEDS)
	$(PIP) -e '.[lint]'
	@touch $@
