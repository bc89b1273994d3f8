# make demo | test | bench | docs: each creates .venv when it is missing.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
EXTRAS := $(VENV)/.installed-extras

# One thread per process: the test runner and the rollouts parallelise by processes.
export OMP_NUM_THREADS ?= 1

.PHONY: install demo test test-slow lint bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt 'torch==2.13.0'
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs]'
	touch $@

# Everything optional too: Atari, sb3-contrib, Ray, EnvPool. The tests cover them; the demo needs none.
$(EXTRAS): $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,docs,atari,contrib,ray,envpool]'
	touch $@

demo: install
	$(BIN)/robustrl demo --out runs/demo

lint: $(EXTRAS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: lint docs
	$(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(EXTRAS)
	$(BIN)/python -m pytest -n 2 -m slow --ignore tests/rollouts/test_cluster.py
	# Clusters that lose nodes and workers on cue want the machine for themselves.
	$(BIN)/python -m pytest -n 0 -m slow tests/rollouts/test_cluster.py

bench: $(EXTRAS)
	for script in benchmarks/bench_*.py; do $(BIN)/python $$script || exit 1; done

docs: $(EXTRAS)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

clean:
	rm -rf $(VENV) runs docs/_build .mypy_cache .ruff_cache .pytest_cache
