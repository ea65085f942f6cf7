# make demo | test | test-fast | lint | bench | clean
# Every target sets itself up: a fresh machine needs only Python 3.10 or newer, and make.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.installed

.PHONY: demo test test-fast lint bench clean

$(READY): pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	touch $@

demo: $(READY)  ## all three phases on simulated images, and the result as a table
	$(BIN)/python -m ultrarefiner.train

test: $(READY)  ## everything
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-fast: $(READY)  ## without the slow ones
	$(BIN)/python -m pytest -n 2 -m "not slow"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## speed and memory against segment-anything as it is, into docs/performance.md
	$(BIN)/python benchmarks/performance.py

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
