# Every target sets up what it needs: on a fresh machine with Python 3.11, make and git, any one of them is enough.
PYTHON ?= python3.11
BIN := .venv/bin
export DO_NOT_TRACK := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false

.PHONY: setup demo test check bench gpu-check clean

setup: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch numpy setuptools
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python examples/make_data.py
	$(BIN)/requant run examples/demo.yaml

# A file's tests stay together: they share what they build.
test: setup
	$(BIN)/pytest -n 2 --dist loadfile

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: setup
	$(BIN)/python benchmarks/upcast.py
	$(BIN)/python benchmarks/orchestration.py
	$(BIN)/python benchmarks/head_training.py
	$(BIN)/python benchmarks/quantize.py

gpu-check: setup
	@echo "On a machine with a CUDA device, in this folder:"
	@echo "  make setup && $(BIN)/pytest -m gpu -v"
	@echo "The figures belong in docs/benchmarks.md, with the machine and the date."

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
