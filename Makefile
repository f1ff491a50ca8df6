# Two commands: `make demo` shows the main job, `make test` is the gate. Each creates .venv by itself.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: demo test lint types unit wheel-check docs clean

demo: $(STAMP)
	$(BIN)/slimadam demo --out slimadam-demo

test: lint types unit wheel-check

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

wheel-check: $(STAMP)
	$(BIN)/python tests/wheel_check.py

# The API reference, from the docstrings, into docs/api.
docs: $(STAMP)
	$(BIN)/pdoc --docformat google --output-directory docs/api slimadam

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
