# `make demo`, `make test` and `make lint` set themselves up on first use; a second run installs nothing.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV := .venv
PY := $(VENV)/bin/python
# Written last, so that an interrupted installation is taken up again.
STAMP := $(VENV)/.installed
EXTRAS := test,demo,notebooks,retrieval,recommend,graph
# The first interpreter that will do; say PYTHON=... to choose one.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,$(shell $(p) -c '$(SUPPORTED)' 2>/dev/null && echo $(p))))
SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))
UV := $(shell command -v uv 2>/dev/null)

export TF_CPP_MIN_LOG_LEVEL ?= 3

.PHONY: help setup demo test slow lint format types docs constraints clean distclean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

setup: $(STAMP) ## make .venv and install the pinned dependencies

$(STAMP): pyproject.toml setup.py constraints.txt
	@if [ -x $(PY) ] && ! $(PY) -c '$(SUPPORTED)' 2>/dev/null; then \
		echo "Remaking $(VENV): its Python does not run or is not 3.11, 3.12 or 3.13."; rm -rf $(VENV); fi
ifneq ($(UV),)
	@[ -x $(PY) ] || $(UV) venv --allow-existing --python '>=3.11,<3.14' $(VENV)
	$(UV) pip install --quiet --python $(PY) --constraint constraints.txt --editable '.[$(EXTRAS)]'
else
	@[ -x $(PY) ] || "$(PYTHON)" -c '$(SUPPORTED)' 2>/dev/null || { \
		echo "tfkit needs Python 3.11, 3.12 or 3.13; found: $$($(or $(PYTHON),python3) --version 2>&1)." \
		"Install one, or say where it is: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@[ -x $(PY) ] || $(PYTHON) -m venv $(VENV) || { \
		echo "Could not make a virtual environment. On Debian or Ubuntu: apt-get install python3-venv" >&2; exit 2; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade >/dev/null
	@echo "Installing into $(VENV): a few minutes the first time."
	$(PY) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
endif
	@touch $@

demo: $(STAMP) ## the main job on 5,000 real digits: train, compress, export, measure, report
	$(VENV)/bin/tfkit demo --out demo_output --force

test: $(STAMP) ## run the tests, a process for each core
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

slow: $(STAMP) ## run the tests that take minutes
	$(PY) -m pytest -m slow

lint: $(STAMP) types ## ruff and mypy over tfkit and export
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# mypy knows no package map, so it is shown one: tfkit/ with export/ inside.
types: $(STAMP)
	@rm -rf build/types && mkdir -p build/types/tfkit
	@ln -s $(CURDIR)/tfkit/* build/types/tfkit/ && ln -s $(CURDIR)/export build/types/tfkit/export
	cd build/types && $(CURDIR)/$(VENV)/bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache -p tfkit

format: $(STAMP) ## let ruff mend what it can
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

docs: $(STAMP) ## write the generated parts of README.md and docs/
	$(PY) docs/generate.py

constraints: $(STAMP) ## pin the newest versions that fit together (run with Python 3.11, the oldest that is served)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip --upgrade >/dev/null
	@mkdir -p build
	$(PY) -m pip install --quiet --dry-run --ignore-installed --report build/resolution.json \
		'.[$(EXTRAS),interop]'
	$(PY) .ci/constraints.py build/resolution.json constraints.txt
	touch $(STAMP)

clean: ## remove what the targets made, but for .venv
	rm -rf build dist demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## remove .venv as well
	rm -rf $(VENV)
