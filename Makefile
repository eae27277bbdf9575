# Two commands on a fresh machine with Python 3.10 to 3.14 and make: `make demo`, `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dev,cuda,hf
WORKERS ?= 2
# PyTorch's own index of CPU builds; empty: torch from where pip is set up to look.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(STAMP): pyproject.toml constraints.txt tools/install.sh
	@tools/install.sh "$(PYTHON)" "$(VENV)" "$(EXTRAS)" "$(TORCH_INDEX)"
	@touch $@

.PHONY: install
install: $(STAMP) ## virtual environment with everything (torch: a CPU build)

.PHONY: demo
demo: $(STAMP) ## the main job: NSA on a real text (ARGS='--target trn2 --mode sim')
	$(BIN)/nsa demo --page out/demo.html $(ARGS)

# A worker for each core: with threads of BLAS as well, each waits for cores that others keep busy.
# A hundred processes start, each of which would compile this project's modules anew.
test test-fast: export OMP_NUM_THREADS = 1
test test-fast: export PYTHONDONTWRITEBYTECODE =

.PHONY: test
test: $(STAMP) ## the whole test suite
	$(BIN)/pytest -n $(WORKERS) --dist worksteal -q

.PHONY: newcomer
newcomer: $(STAMP) ## four kinds of new user, each from an empty environment, torch installed anew
	NEWCOMER=full $(BIN)/pytest -q tests/newcomer

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

.PHONY: readme
readme: $(STAMP) ## the README's table of kernels, as it is now
	$(BIN)/python -c "from pathlib import Path; from nsa_neuron.cli.coverage import rewrite; \
	  page = Path('README.md'); page.write_text(rewrite(page.read_text()))"

CPU_RESULTS ?= benchmarks/results/cpu-native.jsonl
NATIVE := nsa_neuron/backends/cpu/native_mode/src
DRIVEN := $(filter-out %/runtime.cpp %/api.cpp,$(wildcard $(NATIVE)/*.cpp)) $(wildcard tests/cpu/native/*.cpp)
SANITIZED := -std=c++20 -O1 -g -march=x86-64-v3 -I$(NATIVE) -pthread

.PHONY: sanitize
sanitize: ## the CPU kernels under the address, undefined and thread sanitizers (needs g++)
	mkdir -p build
	$(CXX) $(SANITIZED) -fsanitize=address,undefined -fno-sanitize-recover=all $(DRIVEN) -o build/drive-address
	build/drive-address 30
	$(CXX) $(SANITIZED) -fsanitize=thread $(DRIVEN) -o build/drive-thread
	TSAN_OPTIONS=halt_on_error=1 build/drive-thread 15

.PHONY: conform
conform: $(STAMP) ## every op on every backend that runs here
	$(BIN)/nsa conform

# Another Triton, unpacked: `pip download triton==3.6.0 --no-deps && unzip -d FOLDER triton-*.whl`.
TRITON ?=
.PHONY: compile-check
compile-check: $(STAMP) ## every Triton kernel and every tile plan to try, for an H200, without one (TRITON=FOLDER of another)
	PYTHONPATH=$(TRITON) $(BIN)/nsa compile-check
	PYTHONPATH=$(TRITON) $(BIN)/python -m tools.check_candidates

.PHONY: bench
bench: $(STAMP) ## measure on this machine: call overhead, reference NSA, the simulator
	$(BIN)/nsa bench --target cpu
	$(BIN)/nsa bench --simulator

.PHONY: mutants
mutants: $(STAMP) ## plant faults in a copy and count those that no test notices (about an hour on two cores)
	$(BIN)/python -m tools.mutants

BENCH_CPU := $(BIN)/nsa bench --target cpu --out $(CPU_RESULTS) --part

.PHONY: bench-cpu
bench-cpu: bench-cpu-dense bench-cpu-parts ## all of docs/performance.md's rows of the CPU backend, 25 minutes, idle

.PHONY: bench-cpu-dense
bench-cpu-dense: $(STAMP) ## of these, NSA beside dense attention, and decoding
	$(BENCH_CPU) native --tokens 4096 8192 16384 65536 131072 262144
	$(BENCH_CPU) native --tokens 4096 16384 --shape 4/1/64/float32
	$(BENCH_CPU) native --tokens 4096 16384 --shape 16/1/128/bfloat16

.PHONY: bench-cpu-parts
bench-cpu-parts: $(STAMP) ## of these, what bounds each kernel, peers, the cost of a call, memory
	$(BENCH_CPU) stages
	$(BENCH_CPU) peers
	$(BENCH_CPU) overhead
	$(BENCH_CPU) memory

MODEL_RESULTS ?= benchmarks/results/model-cpu.jsonl
.PHONY: bench-model
bench-model: $(STAMP) ## whole models beside full attention into docs/performance.md, 3 minutes, idle
	$(BIN)/nsa bench --target cpu --part layer --out $(MODEL_RESULTS)
	$(BIN)/nsa bench --target cpu --part model --tokens 2048 8192 32768 131072 --out $(MODEL_RESULTS)
	$(BIN)/python -m tools.model_table $(MODEL_RESULTS)

.PHONY: clean
clean: ## remove the environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
