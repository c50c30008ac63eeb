# make install      the environment: .venv with pinned packages (CPU or GPU, whatever the pinned torch brings)
# make test         the same, then lint, types, tests
# make quickstart   the same, then corpus, training, evaluation, generation and report, end to end
# make clean        remove caches and build products; keeps .venv, corpora and runs

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install test quickstart clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"got Python {v[0]}.{v[1]}, need 3.11 or newer: run make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev,corpus,analysis,vq,bpe,hf,data,sweep]'
	touch $@

test: install
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright moma
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m 'not slow'

quickstart: install
	$(BIN)/moma quickstart

clean:
	rm -rf build dist .pytest_cache .ruff_cache *.egg-info
	find moma tests -name __pycache__ -type d -prune -exec rm -rf {} +
