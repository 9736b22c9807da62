# `make demo` and `make test` need Python >= 3.10 and make, nothing else.
# TORCH names the PyTorch build to install; on another machine say, for example,
#   make demo TORCH='torch>=2.13'
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test lint docs soak wheel-test clean

demo: $(READY)
	$(BIN)/sophia demo

test: $(READY)
	$(BIN)/python -m pytest -q -n 2

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The documentation as a site: open build/docs/index.html. The variable silences what the theme says of its own future.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Hours of a user's life in minutes: a large text, kills at random moments. Writes benchmarks/results/soak-*.json.
soak: $(READY)
	$(BIN)/python -m tests.soak.prepare
	$(BIN)/python -m tests.soak.kills

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python >= 3.10 is needed, this is " + sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

# The wheel as a user gets it: in an environment of its own, with torch and nothing else of ours.
wheel-test: $(READY)
	rm -rf dist $(VENV)-wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --quiet '$(TORCH)' dist/*.whl
	cd dist && ../$(VENV)-wheel/bin/python ../tests/wheel.py
	rm -rf $(VENV)-wheel

clean:
	rm -rf $(VENV) $(VENV)-wheel dist build demo-out
