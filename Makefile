# `make demo` and `make test` each do all set-up on a fresh clone; they need Python 3.11 and make only.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INPUTS := requirements/base.txt requirements/dev.txt requirements/methods.txt requirements/torchrec-cpu.txt requirements/torchrec-cuda.txt scripts/install.sh pyproject.toml

# One thread per worker in multi-process tests: two workers of two threads run 4x slower on two cores.
TEST_ENV := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

.PHONY: demo test test-slow lint types check setup setup-dev setup-cuda clean

demo: $(VENV)/.cpu-base
	$(BIN)/c2al demo --output runs/demo

test: $(VENV)/.cpu-dev
	$(TEST_ENV) $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/.cpu-dev
	$(TEST_ENV) $(BIN)/python -m pytest -m slow

lint: $(VENV)/.cpu-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.cpu-dev
	$(BIN)/mypy

check: lint types test

setup: $(VENV)/.cpu-base
setup-dev: $(VENV)/.cpu-dev
setup-cuda: $(VENV)/.cuda-dev

# The stamp carries device and set, so that a dev install satisfies a later `make demo` too.
$(VENV)/.cpu-base: $(INPUTS)
	test -e $(BIN)/python || $(PYTHON) -m venv $(VENV)
	scripts/install.sh $(abspath $(BIN)/python) cpu base
	touch $@

$(VENV)/.cpu-dev $(VENV)/.cuda-dev: $(VENV)/.%-dev: $(INPUTS)
	test -e $(BIN)/python || $(PYTHON) -m venv $(VENV)
	scripts/install.sh $(abspath $(BIN)/python) $* dev
	touch $@ $(VENV)/.$*-base

clean:
	rm -rf $(VENV) build *.egg-info
