# `make help` lists the targets.
# Every target sets itself up: a fresh machine needs only Python 3.10 or newer, and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed
DOCS := .venv/.installed-docs

.PHONY: help demo test test-fast lint format docs bench results clean

help:  ## this list
	@awk -F ':.*  ## ' '/^[a-z-]+:.*  ## / {printf "  %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

$(DOCS): $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[docs]"
	touch $@

demo: $(READY)  ## all three phases on simulated images, and the result as a table
	$(BIN)/python -m ultrarefiner.train

test: $(READY)  ## everything
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-fast: $(READY)  ## without the slow ones
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not slow"

lint: $(READY)  ## what CI checks: ruff, its format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)  ## sort imports, repair what ruff can repair, format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS)  ## the documentation as a site, into build/site; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## speed and memory against segment-anything as it is, into docs/performance.md
	$(BIN)/python benchmarks/performance.py

results: $(READY)  ## docs/results.md from the cases kept under docs/results/
	$(BIN)/python benchmarks/results.py

clean:  ## remove .venv and all that was built
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
