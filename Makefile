# Two commands on a fresh machine (Python >= 3.11 and make): `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-slow lint check docs bench fuzz calibration gallery clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch .venv/ready

demo: setup
	$(BIN)/diffract demo

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile # files side by side, one a core

test-slow: setup
	$(BIN)/python -m pytest -m slow
	$(BIN)/python -m pytest -n auto -m hypothesis --hypothesis-profile new # properties on examples not seen before

check: lint test

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

docs: setup
	$(BIN)/python docs/make_metrics.py
	$(BIN)/python docs/make_recipe_schema.py

bench: setup
	$(BIN)/python benchmarks/run.py

fuzz: setup
	$(BIN)/python tests/fuzz.py # 15 minutes; damaged files of every kind, see docs/reliability.md

calibration: setup
	$(BIN)/python benchmarks/calibration.py # an hour or two of one core; goes on where it was stopped

gallery: setup
	$(BIN)/python docs/make_gallery.py

clean:
	rm -rf .venv build dist demo-run
