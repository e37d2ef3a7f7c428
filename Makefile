# Every target sets up what it needs: a virtual environment, torch, the package with its C++ kernels.
PYTHON ?= python3
VENV ?= .venv
# torch is installed first and by itself: the kernels are built against it (--no-build-isolation), and pinned so that
# what is measured here can be measured again. Any torch >= 2.11 works: make TORCH="torch==2.11.0".
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help install test demo lint bench report attacks wheel hub clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED)  ## make the virtual environment and build the package into it

$(INSTALLED): pyproject.toml setup.py $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "setuptools>=77" wheel ninja "pybind11>=2.12"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable ".[test,lint]"
	touch $@

test: install  ## run every test
	$(BIN)/python -m pytest

demo: install  ## fine-tune a pretrained model under a rank budget (about five minutes on two cores)
	$(BIN)/peftkernels demo $(ARGS)

lint: install  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: install  ## measure all cases, or CASE=..., into bench/results/ (under half an hour on two cores)
	$(BIN)/peftkernels bench $(foreach case,$(CASE),'$(case)') --out bench/results $(ARGS)

report: install  ## write the tables of README.md and bench/plots/ from bench/results/
	$(BIN)/python -m bench.report $(ARGS)

attacks: install  ## attack the package at length, or as ARGS says (docs/attacks.md; about an hour on two cores)
	cd tests && ../$(BIN)/python -m attacks $(or $(ARGS),--keep ../bench/results)

wheel: install  ## build a wheel against the environment's torch into dist/
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

hub: install  ## write the package as a kernel of the Hugging Face Hub into dist/hub
	rm -rf dist/hub
	$(BIN)/python -m peftkernels.integrations.hub dist/hub

clean:  ## remove what was built, and the virtual environment
	rm -rf $(VENV) build dist peftkernels.egg-info peftkernels/*.so peftkernels-demo peftkernels-bench .pytest_cache .mypy_cache .ruff_cache
