# make serve   installs Pelton into .venv, pulls the default model, serves it on port 8000
# make test    every test, with the real default model; make check   everything else that CI runs
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

MODEL ?= qwen2.5-coder-0.5b-instruct
ARGS ?=
BIN := .venv/bin
STAMP := .venv/.pelton-installed
CODE := src tests scripts benchmarks

.PHONY: help setup serve test gpu-check fuzz check format lint types imports size settings bench wheel clean

help:
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP) ## make .venv with everything that serving, tests and checks need

$(STAMP): pyproject.toml scripts/setup.sh CMakeLists.txt $(wildcard src/pelton/worker/kernels/cpu/native/*)
	@bash scripts/setup.sh .venv
	@touch $@

serve: setup ## pull MODEL and serve it on port 8000; ARGS="--max-num-seqs 16" adds flags
	@exec $(BIN)/pelton serve $(MODEL) --port 8000 $(ARGS)

# Two processes run all; one, which tells the files by name, what ARGS names.
test: setup ## run every test; ARGS="tests/engine -k kv" narrows it down
	@$(BIN)/pytest --durations=10 --durations-min=5 $(or $(ARGS),-n 2)

# Not `setup`: a machine with a GPU may be offline, and have torch, Triton and transformers already.
gpu-check: ## prove and measure the GPU backend, offline, with PYTHON's packages; ARGS=--interpret needs no GPU
	@PYTHONPATH=src:. $(or $(PYTHON),python3) -m benchmarks.gpu.check $(ARGS)

check: format lint types imports size settings ## format, lint, types, import contracts, size budgets, settings table

format: setup
	@$(BIN)/ruff format --check $(CODE)

lint: setup
	@$(BIN)/ruff check $(CODE)

types: setup
	@$(BIN)/mypy

imports: setup
	@$(BIN)/lint-imports --no-logo

size: setup
	@$(BIN)/python scripts/check_size.py

settings: setup
	@$(BIN)/python scripts/make_settings_table.py --check

fuzz: setup ## feed damaged input to all that reads requests and keys, for FUZZ_S seconds (60)
	@$(BIN)/python -m tests.fuzz.decoders -max_total_time=$(or $(FUZZ_S),60) $(ARGS)

bench: setup ## drive the server at URL with the five workloads
	@$(BIN)/pelton bench serve --base-url $(or $(URL),http://127.0.0.1:8000) --workload all $(ARGS)

wheel: setup ## build the wheel and try it in a fresh environment
	@bash scripts/check_wheel.sh

clean: ## remove .venv, caches and build outputs; pulled models stay
	@rm -rf .venv build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
