# Two commands on a fresh machine with Python 3.11 and make: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev,cuda
WORKERS ?= 2
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

.PHONY: install
install: $(STAMP) ## virtual environment with everything (torch: a CPU build)

.PHONY: demo
demo: $(STAMP) ## the main job: NSA on a real text, and what runs on this machine
	$(BIN)/nsa demo

.PHONY: test
test: $(STAMP) ## the whole test suite
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -q

.PHONY: test-fast
test-fast: $(STAMP) ## without the slow tests
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -q -m "not slow"

.PHONY: lint
lint: $(STAMP) ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(STAMP) ## ruff: repair what can be repaired
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(STAMP) ## mypy, strict
	$(BIN)/mypy

.PHONY: conform
conform: $(STAMP) ## every op on every backend that runs here
	$(BIN)/nsa conform

.PHONY: compile-check
compile-check: $(STAMP) ## compile every Triton kernel for an H200, without one
	$(BIN)/nsa compile-check

.PHONY: bench
bench: $(STAMP) ## measure on this machine: call overhead, reference NSA, the simulator
	$(BIN)/nsa bench --target cpu
	$(BIN)/nsa bench --simulator

.PHONY: clean
clean: ## remove the environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
