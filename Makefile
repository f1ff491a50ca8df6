# Two commands: `make demo` shows the main job, `make test` is the gate. Each creates .venv by itself.
# `make test-oldest`, `make test-newest` and `make versions` do so for the other Pythons and torches that are declared.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

# The core suite: all but what needs other libraries than the package, or tests benchmarks and documents.
CORE := --ignore=tests/benchmarks --ignore=tests/demo --ignore=tests/integrations \
	--ignore=tests/layers/test_roles.py --ignore=tests/test_api_reference.py --ignore=tests/test_documents.py \
	--ignore=tests/test_examples.py
PYTEST := -m pytest -n 2 --dist worksteal

.PHONY: demo test test-oldest test-newest versions lint types unit wheel-check docs clean

demo: $(STAMP)
	$(BIN)/slimadam demo --out slimadam-demo

test: lint types unit wheel-check

SOURCES := setup.py kernels/cpp/build.py kernels/cpp/adamw.cpp kernels/cpp/threads.h

$(STAMP): pyproject.toml constraints.txt $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(STAMP)
	$(BIN)/mypy

unit: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST)

test-oldest test-newest: test-%: .venv-%/installed
	OMP_NUM_THREADS=1 .venv-$*/bin/python $(PYTEST) -p no:cacheprovider $(CORE)

.venv-%/installed: pyproject.toml constraints-%.txt $(SOURCES)
	python="$$($(PYTHON) tests/environments.py $*)" && "$$python" -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --editable '.[test]' --constraint constraints-$*.txt
	touch $@

# A table for each Python: 25 steps of every plan and implementation, and whether autograd saw them.
versions: $(STAMP) .venv-oldest/installed .venv-middle/installed .venv-newest/installed
	for bin in .venv-oldest/bin $(BIN) .venv-middle/bin .venv-newest/bin; do \
		OMP_NUM_THREADS=1 $$bin/python -m benchmarks.supported || exit 1; done

wheel-check: $(STAMP)
	$(BIN)/python tests/wheel_check.py

# The API reference, from the docstrings, into docs/api.
docs: $(STAMP)
	$(BIN)/pdoc --docformat google --output-directory docs/api slimadam

clean:
	rm -rf .venv .venv-oldest .venv-middle .venv-newest build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .triton
