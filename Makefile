# make run   one machine, end to end: environment, gateway, two workers, a short demonstration, then it serves
# make test  the whole suite, offline         make check  format, lint, types, tests (what CI runs)
# make retest  the tests that failed last
# make bench the tables of docs/results.md     make clean  throw the environment away
# Settings: WORKERS=3, UP_FLAGS="--http 127.0.0.1:9000" (options of kvasir up), PYTHON=python3.12, VENV=FOLDER;
#            JOBS=2 (processes of the tests, each with torch in it: 1 GB);
#            TRACES="FILE ..." names traces of requests for the labs: eviction, routing (scripts/replay_trace.py); those in
#            a folder traces/ here or beside the checkout are found without

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt
WORKERS ?=
UP_FLAGS ?=
JOBS ?= 2
TRACES ?= $(wildcard traces/*.jsonl.gz ../*/traces/*.jsonl.gz)

.PHONY: run test retest check lint types bench clean install install-dev

run: install
	$(BIN)/kvasir up --demo $(if $(WORKERS),--workers $(WORKERS)) $(UP_FLAGS)

test: install-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

retest:
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q --last-failed --last-failed-no-failures none

check: lint types test

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: install-dev
	$(BIN)/mypy

bench: install-dev
	$(BIN)/python scripts/bench_engine.py
	$(BIN)/python scripts/bench_gateway.py
	$(BIN)/python scripts/bench_cache.py $(if $(PEERS),--peer-dir $(PEERS))
ifneq ($(TRACES),)
	$(BIN)/python scripts/replay_trace.py cache --trace $(TRACES) --policy lru,two_heaps,two_heaps+hints,optimum
	$(BIN)/python scripts/replay_trace.py route --trace $(TRACES) --load 0.2,0.5
else
	@echo 'For eviction policies and routing rules on traces of requests: make bench TRACES="FILE ..."'
endif

clean:
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache .hypothesis

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Kvasir needs Python 3.11 or newer; name one with: make PYTHON=python3.12 run"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: apt-get install python3-venv"; rm -rf $(VENV); exit 2; }

# One command takes a pinned torch as it comes: with a CPU build at hand that is 200 MB, else the CUDA build.
$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	@echo "Installing Kvasir and some 40 packages into $(VENV), once. PyTorch is the large one:"
	@echo "200 MB and more to fetch, then a minute or so to unpack, of which pip says nothing."
	@$(PIP) -e '.[all]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo "Installing what the tests need into $(VENV), once."
	@$(PIP) -e '.[dev]'
	@touch $@
