# Every target sets up what it needs: a virtual environment, torch, the package with its C++ kernels.
PYTHON ?= python3
VENV ?= .venv
# Exact versions of all that is installed, those that were tested together: make upgrade writes them.
CONSTRAINTS ?= constraints.txt
# torch is installed first and by itself: the kernels are built against it (--no-build-isolation). Any torch >= 2.11
# works: make TORCH="torch==2.11.0" leaves it and what it asks for by version out of the constraints. CUDA builds
# bring their own Triton.
TORCH ?= torch
# Processes that run tests side by side.
PROCESSES ?= 2
UPGRADE := .venv-upgrade
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(VENV)/constraints.txt
PYTEST := $(BIN)/python -m pytest $(ARGS)
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
# What a change is most likely to break. A file belongs here while its tests take a few seconds.
QUICK := $(addprefix tests/, test_constraints.py test_house.py test_messages.py test_repository.py \
    $(addprefix operators/test_, budgets.py direct_call.py dispatch.py errors.py function.py gradcheck.py \
        own_backend.py pack_cache.py rank_plan.py) \
    $(addprefix allocation/test_, adalora.py rank_budgets.py selection_and_plans.py) \
    $(addprefix integrations/test_, peft_backend.py quantised.py) nn \
    $(addprefix cli/test_, doctor.py main.py timing.py) $(addprefix demo/test_, checkpoint.py demo_report.py))

.PHONY: help install check test upgrade demo lint house bench docs report attacks sanitize wheel smoke hub clean

help:  ## show this list
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 12

install: $(INSTALLED)  ## make the virtual environment and build the package into it

$(INSTALLED): pyproject.toml setup.py constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python .ci/versions.py check $(CONSTRAINTS)
	sed -E '/^(triton$(if $(filter-out torch,$(TORCH)),|torch|setuptools))==/d' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(PIP_INSTALL) "$(TORCH)"
	$(BIN)/python .ci/versions.py triton $(CONSTRAINTS) >> $(VENV)/constraints.txt
	$(PIP_INSTALL) "setuptools>=77" wheel ninja "pybind11>=2.12"
	$(PIP_INSTALL) --no-build-isolation --editable ".[test,lint]" $(HOLD)
	touch $@

check: lint house  ## lint, structure, and the tests that a change is most likely to break (under two minutes on two cores)
	$(PYTEST) -q -n $(PROCESSES) --dist loadfile -m "not alone" -k "not triton" $(QUICK)

test: install  ## run every test, those that need the machine for themselves at the end
	@status=0; \
	$(PYTEST) -n $(PROCESSES) --dist loadfile -m "not alone" || status=$$?; \
	$(PYTEST) -m alone || status=$$?; \
	exit $$status

# Kept back: TORCH="torch==2.13.0", others by HOLD="numpy==2.4.6 'peft<1'".
upgrade:  ## write the newest versions into constraints.txt, once all tests pass with them in an environment of their own
	rm -rf $(UPGRADE) $(INSTALLED)
	$(MAKE) install docs VENV=$(UPGRADE) CONSTRAINTS=/dev/null
	$(UPGRADE)/bin/python .ci/versions.py write > $(UPGRADE)/tested.txt
	$(MAKE) test VENV=$(UPGRADE) CONSTRAINTS=/dev/null
	mv $(UPGRADE)/tested.txt constraints.txt

demo: install  ## fine-tune a pretrained model under a rank budget (about five minutes on two cores)
	$(BIN)/python -m demo $(ARGS)

lint: install  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/mypy

house: install  ## check the structure: argument lists, the direction of imports, circles, the form of docstrings
	$(BIN)/python .ci/house.py

bench: install  ## measure all cases, or CASE=..., into bench/results/ (under half an hour on two cores)
	$(BIN)/python -m bench $(foreach case,$(CASE),'$(case)') --out bench/results $(ARGS)

docs: $(VENV)/.docs  ## build the documentation site into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(INSTALLED)
	$(PIP_INSTALL) "peftkernels[docs]"
	touch $@

report: install  ## write the tables of README.md and docs/, and docs/pictures/, from bench/results/
	$(BIN)/python -m bench.report $(ARGS)

attacks: install  ## attack the package at length, or as ARGS says (docs/attacks.md; two hours on two cores)
	cd tests && PYTHONPATH=.. $(abspath $(BIN))/python -m attacks $(or $(ARGS),--keep ../bench/results)

sanitize: install  ## run tests of the C++ kernels under AddressSanitizer and UBSan (ten minutes on two cores; Linux, gcc)
	cd tests && $(abspath $(BIN))/python -m support.sanitize $(ARGS)

wheel: install  ## build a wheel against the environment's torch into dist/
	rm -rf build/lib* build/bdist* dist/peftkernels-*.whl
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .

smoke: wheel  ## install the wheel where nothing is but torch, and use it
	$(BIN)/python .ci/smoke.py dist/peftkernels-*.whl

hub: install  ## write the package as a kernel of the Hugging Face Hub into dist/hub
	rm -rf dist/hub
	$(BIN)/python -m peftkernels.integrations.hub dist/hub

clean:  ## remove what was built, and the virtual environment
	rm -rf $(VENV) $(UPGRADE) build dist site peftkernels.egg-info peftkernels/*.so peftkernels-demo peftkernels-bench .pytest_cache .mypy_cache .ruff_cache
