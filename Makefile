# Everything that is built, checked or shown, one word each. `make` alone lists the words.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install lint test horovod demo clean

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed
REQUIREMENTS := requirements.txt tests/requirements.txt tests/requirements-triton.txt

help:
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 16

install: $(INSTALLED)  ## .venv with everything that is pinned; does nothing where it is up to date

$(INSTALLED): $(REQUIREMENTS)
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo \
	  "make: $(PYTHON) with its venv module is missing: install it, or name yours: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing into .venv: about 2.5 GB, one to three minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip --quiet --disable-pip-version-check install -r requirements.txt -r tests/requirements.txt
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	  $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-deps -r tests/requirements-triton.txt; fi
	@touch $@

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

test: lint  ## lint, then every test; what was skipped is listed with its reason
	$(BIN)/python -m pytest

horovod: $(INSTALLED)  ## Horovod into .venv: 5 minutes the first time, seconds from the cached wheel afterwards
	build_horovod/install.sh $(BIN)/python

demo: $(INSTALLED)  ## what the program does, on two ranks of this machine
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/demo.sh

clean:  ## undo all of the above; the cached Horovod wheel stays
	rm -rf .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
