# make demo   the demo sweep and its report, from nothing
# make test   lint and tests;  make test-all adds the long drills
# make bench  what the framework costs over a bare loop

PYTHON ?= python3
PIP_ARGS ?=
BIN := .venv/bin
DEMO := runs/demo

.PHONY: demo test test-all lint bench clean

# a failed trial does not take the page away
demo: .venv/runtime
	@status=0; $(BIN)/python -m sweep run sweep/configs/demo.yaml --out $(DEMO) || status=$$?; \
	$(BIN)/python -m analysis report $(DEMO) && exit $$status

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow"

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/dev
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

.venv/runtime: .venv/bin/python requirements.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt
	touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -r requirements.txt -r requirements-dev.txt
	touch $@
