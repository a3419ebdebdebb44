# Two commands on a fresh machine (Python >= 3.11 and make): `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Where else to look for torch, such as https://download.pytorch.org/whl/cpu, whose builds are a tenth as large.
TORCH_INDEX ?=
PIP_INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: setup demo test test-slow lint check docs site wheel bench fuzz chaos calibration gallery clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet $(PIP_INDEX) --constraint constraints.txt --editable '.[dev]'
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
	$(BIN)/python docs/make_tables.py
	$(BIN)/python docs/make_recipe_schema.py

site: setup
	$(BIN)/pip install --quiet '.[site]'
	$(BIN)/zensical build --clean --strict # build/site; a link or an anchor that leads nowhere is an error

wheel: setup # what somebody without this repository gets: an empty environment, the wheel, the demo
	rm -rf build/wheel dist
	$(BIN)/pip install --quiet build && $(BIN)/python -m build --wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet $(PIP_INDEX) --constraint constraints.txt dist/*.whl
	cd build/wheel && bin/diffract demo && bin/diffract inspect "$$(bin/python -c 'import diffract; print(diffract.__path__[0])')/samples/tiny-olmo2/base"

bench: setup
	$(BIN)/python benchmarks/run.py

fuzz: setup
	$(BIN)/python tests/fuzz.py # 15 minutes; damaged files of every kind, see docs/reliability.md

chaos: setup
	$(BIN)/python tests/chaos.py --kills 200 # kills at random moments; an hour of one core at most

calibration: setup
	$(BIN)/python benchmarks/calibration.py # an hour or two of one core; goes on where it was stopped

gallery: setup
	$(BIN)/python docs/make_gallery.py

clean:
	rm -rf .venv build dist demo-run
