# Everything that is done to this repository, one command each. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

# serve: what to serve, and where
MODEL ?= models/nanoflow-demo
HOST ?= 127.0.0.1
PORT ?= 8000
# setup: the interpreter (default: the first of python3, python3.13, … that is new enough), the torch to install, and
# the build of it: TORCH_BACKEND=cpu, =cu130, … or =auto for what this machine's driver supports. Empty: the build that
# the package index has, or one in a folder of wheels named by PIP_FIND_LINKS or UV_FIND_LINKS.
PYTHON ?=
TORCH ?= torch==2.13.0
TORCH_BACKEND ?=
# test: further arguments for pytest, such as ARGS='-k scheduler -x'
ARGS ?=
# cuda-build: the tiles of the matrix product that are compiled; empty: all
TILES ?=

comma := ,
empty :=
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(subst $(empty) $(empty),$(comma),$(strip $(PIP_FIND_LINKS)))
endif
export TORCH TORCH_BACKEND
# The virtual environment of another project must not be taken for this one's.
unexport VIRTUAL_ENV

BIN := .venv/bin
STAMP := .venv/.setup-stamp
SETUP_INPUTS := pyproject.toml requirements.lock requirements-cuda.txt scripts/setup.sh $(wildcard packages/*/pyproject.toml apps/*/pyproject.toml) \
	$(wildcard packages/*/CMakeLists.txt packages/*/csrc/*)
PYTEST := $(BIN)/python -m pytest

.PHONY: help
help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

.PHONY: serve
serve: setup ## Serve the demo model on 127.0.0.1:8000 (MODEL=, PORT=, HOST=)
	@exec $(BIN)/nanoflow serve '$(MODEL)' --host '$(HOST)' --port '$(PORT)'

.PHONY: setup
setup: $(STAMP) ## Prepare .venv (PYTHON=, TORCH=, TORCH_BACKEND=cpu|auto|cu130…)

$(STAMP): $(SETUP_INPUTS)
	@PYTHON='$(PYTHON)' scripts/setup.sh

.PHONY: test
test: setup ## Run the whole test suite (ARGS= goes to pytest); under 20 minutes on two cores
	$(PYTEST) -m 'not long and not gpu' --session-timeout=2700 $(ARGS)

.PHONY: test-long
test-long: setup ## Run the tests that take long: soak, many kill rounds, many random plans, all kernel tiles, the whole feature matrix
	$(PYTEST) -m 'long and not gpu' --timeout=7200 $(ARGS)

.PHONY: gpu-check
gpu-check: ## Check and measure what needs a CUDA device, with the Python at hand (PYTHON=, ARGS=--rehearse)
	@"$${PYTHON:-$$(if [ -x $(BIN)/python ]; then echo $(BIN)/python; else echo python3; fi)}" scripts/gpu_check.py $(ARGS)

.PHONY: cuda-build
cuda-build: setup ## Compile the CUDA library, which needs nvcc but no device (TILES=)
	@$(BIN)/python -m nf_kernels.cuda.build $(if $(TILES),--tiles $(TILES)) $(ARGS)

.PHONY: asan
asan: setup ## Run the tests of the native code under AddressSanitizer and UBSan (ARGS=)
	@$(BIN)/python scripts/asan.py $(ARGS)

.PHONY: gpu-status
gpu-status: setup ## Write docs/gpu-status.md: what of the CUDA code is compiled, executed, measured
	@$(BIN)/python scripts/gpu_status.py

.PHONY: lint
lint: setup ## Check format, lint, types and the arrows between packages
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

.PHONY: format
format: setup ## Rewrite the sources as `make lint` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: bench
bench: setup ## Run all benchmarks; their JSON is kept under build/benchmarks, one file per run
	@mkdir -p build/benchmarks
	$(PYTEST) tests/benchmarks --timeout=3600 \
		--benchmark-json="build/benchmarks/$$(date -u +%Y%m%dT%H%M%SZ).json" $(ARGS)

.PHONY: bench-table
bench-table: setup ## Print a Markdown table of a run (RUN=build/benchmarks/….json)
	@$(BIN)/python scripts/bench_table.py '$(RUN)'

SMOKE := build/benchmarks/smoke
# One thread, and CPU time: neither other programs nor threads that wait for each other count.
smoke_run = OMP_NUM_THREADS=1 $(PYTEST) tests/benchmarks -m smoke -q --benchmark-timer=time.process_time \
	--benchmark-json=$(SMOKE)-$(1).json $(ARGS)

# A loss has to show in three runs before it counts: the machine may be busy with something else.
.PHONY: bench-check
bench-check: setup ## Run a minute of benchmarks; fail where one lost more than 25 % of its speed
	@mkdir -p $(dir $(SMOKE)); rm -f $(SMOKE)-*.json
	@for run in 1 2 3; do \
		$(call smoke_run,$$run); \
		if $(BIN)/python scripts/bench_check.py $(SMOKE)-*.json; then exit 0; fi; \
	done; exit 1

.PHONY: bench-baseline
bench-baseline: setup ## Make three such runs the committed baseline for this kind of processor
	@mkdir -p $(dir $(SMOKE)); rm -f $(SMOKE)-*.json
	@for run in 1 2 3; do $(call smoke_run,$$run); done
	$(BIN)/python scripts/bench_check.py $(SMOKE)-*.json --update

.PHONY: lock
lock: setup ## Resolve anew and write requirements.lock
	@scripts/lock.sh requirements.lock

.PHONY: lock-check
lock-check: setup ## Fail when requirements.lock is no resolution of what is declared
	@scripts/lock.sh --check requirements.lock

.PHONY: clean
clean: ## Remove .venv and everything that was built
	rm -rf .venv uv.lock build packages/*/build packages/*/dist apps/*/dist \
		.mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis .benchmarks
	find packages apps tests scripts -name __pycache__ -prune -exec rm -rf {} +
