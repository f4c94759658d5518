# Everything that is built, checked or shown, one word each. `make` alone lists the words.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install lint test slow examples horovod audit demo bench speed training docs clean FORCE

# The first of these that runs and has venv is taken: what .venv was made of, where there is one.
PYTHON ?= .venv/bin/python python3.11 python3.12 python3.13 python3.14
PHOTOS ?= ../shared/data/photos.tar
CIFAR10 ?= ../shared/data/cifar10.tar.xz
RUNS ?= runs/accuracy.jsonl
BIN := .venv/bin
INSTALLED := .venv/installed
DOCS_INSTALLED := .venv/docs-installed
AUDIT_INSTALLED := .venv/audit/installed
# Prints what an environment is made of, as "3.11.7 /usr/bin/python3.11", by a Python that has venv and the pins' wheels.
MADE_OF := import ensurepip, os, platform, sys; (3, 11) <= sys.version_info[:2] <= (3, 14) and \
  print(platform.python_version(), os.path.realpath(sys._base_executable))
REQUIREMENTS := requirements.txt tests/requirements.txt tests/requirements-triton.txt

help:
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' Makefile | expand -t 16

install: $(INSTALLED)  ## .venv with everything that is pinned; does nothing where it is up to date

$(INSTALLED): .venv/pyvenv.cfg $(REQUIREMENTS)
	@echo "Installing into .venv: about 2.5 GB, or 6 where torch is a CUDA build, one to three minutes."
	$(BIN)/python -m pip --quiet --disable-pip-version-check install -r requirements.txt -r tests/requirements.txt
	if $(BIN)/python -c 'import sys, torch; sys.exit(torch.version.cuda is not None)'; then \
	  $(BIN)/python -m pip --quiet --disable-pip-version-check install --no-deps -r tests/requirements-triton.txt; fi
	@touch $@

# Changes only where another Python is asked for, or where .venv's own is gone.
.venv/pyvenv.cfg: FORCE
	@for python in $(PYTHON); do \
	  made_of=$$($$python -c '$(MADE_OF)' 2>/dev/null) || true; [ -z "$$made_of" ] || break; done; \
	if [ -z "$$made_of" ]; then echo "make: no Python 3.11 to 3.14 with its venv module: tried $(PYTHON);" \
	  "install one, or name yours: make PYTHON=/path/to/python" >&2; exit 1; fi; \
	if [ "$$made_of" != "$$($(BIN)/python -c '$(MADE_OF)' 2>/dev/null)" ]; then \
	  echo "Making .venv of Python $$made_of"; rm -rf .venv; "$${made_of#* }" -m venv .venv; fi

lint: $(INSTALLED)  ## ruff and mypy
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

test: lint  ## lint, then every test but the slow ones; what was skipped is listed with its reason
	$(BIN)/python -m pytest

slow: $(INSTALLED)  ## the slow tests, and properties on ten times as many examples: writes docs/slow.md
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile=slow -p tests.support.slow_report

examples: $(INSTALLED)  ## every example, in an environment of its own that is made once; `make test` skips them
	python=$$(examples/environment.sh $(BIN)/python); EXAMPLES_PYTHON=$$python $(BIN)/python -m pytest tests/test_examples.py

horovod: $(INSTALLED)  ## Horovod into .venv: 5 minutes the first time, seconds from the cached wheel afterwards
	build_horovod/install.sh $(BIN)/python

audit: $(INSTALLED)  ## known holes of the pins, where the package index tells; fails nothing
	@if [ ! $(AUDIT_INSTALLED) -nt tests/requirements-audit.txt ]; then $(BIN)/python -m venv .venv/audit && \
	  .venv/audit/bin/python -m pip --quiet --disable-pip-version-check --timeout 15 --retries 1 \
	  install -r tests/requirements-audit.txt 2>/dev/null && touch $(AUDIT_INSTALLED) || true; fi
	@if [ -e $(AUDIT_INSTALLED) ]; then \
	  .venv/audit/bin/python .ci/audit.py requirements.txt tests/requirements.txt docs/requirements.txt; \
	  else echo "audit: skipped, pip-audit cannot be installed here"; fi

demo: $(INSTALLED)  ## what the program does, on two ranks of this machine
	PATH="$(CURDIR)/$(BIN):$$PATH" bash benchmarks/demo.sh

bench: speed training  ## every table and picture of BENCHMARKS.md: hours

# Minutes on 2 idle cores: search 1, search_baselines 1, codecs 2, topk 1, loop 5, clocks 1, fidelity 1,
# error_against_bits 2, exchange 15 and broken_barrier 15 (most of them at 100 Mbit/s), scale 3, loaders 2.
speed: $(INSTALLED)  ## those that are no trainings: three quarters of an hour; as root also over slow links
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/search_baselines.py
	$(BIN)/python benchmarks/codecs.py
	$(BIN)/python benchmarks/topk.py
	$(BIN)/python benchmarks/loop.py
	$(BIN)/python benchmarks/clocks.py
	$(BIN)/python benchmarks/fidelity.py -o docs/fidelity.md
	$(BIN)/python benchmarks/error_against_bits.py -o docs/error_against_bits.png
	$(BIN)/python benchmarks/exchange.py -o docs/exchange.png
	$(BIN)/python benchmarks/scale.py
	if [ "$$(id -u)" = 0 ]; then $(BIN)/python benchmarks/broken_barrier.py -o docs/broken_barrier.png; else \
	  echo "make: no table of the broken barrier: its links take root"; fi
	if [ -e $(PHOTOS) ]; then $(BIN)/python benchmarks/loaders.py $(PHOTOS); else \
	  echo "make: no photographs at $(PHOTOS), so no table of loaders; name yours: make bench PHOTOS=/path/to/folder/or/tar"; fi
	if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/python benchmarks/gpu.py; fi

# Finished runs are kept in RUNS: what is cut off goes on where it was.
training: $(INSTALLED)  ## those of trainings: hours; as root also time to accuracy over slow links
	mkdir -p $(dir $(RUNS))
	$(BIN)/python benchmarks/accuracy.py digits --epochs 8 --runs $(RUNS) -- "none" "maxmin --error-feedback"
	if [ -e $(CIFAR10) ]; then bash benchmarks/training.sh $(BIN)/python $(CIFAR10) $(RUNS); else \
	  echo "make: no images at $(CIFAR10), so no tables of trainings; name yours: make bench CIFAR10=/path/to/folder/or/tar"; fi

# In .venv, because the reference of the library is taken from its modules, which import torch.
docs: $(DOCS_INSTALLED)  ## the documentation, as web pages in site/; any warning is an error
	rm -rf site
	$(BIN)/python -m sphinx -b html -n -W --keep-going -q docs site
	@echo "Built: open site/index.html"

$(DOCS_INSTALLED): $(INSTALLED) docs/requirements.txt
	@echo "Installing Sphinx and its theme into .venv: 80 MB, seconds."
	$(BIN)/python -m pip --quiet --disable-pip-version-check install -r docs/requirements.txt
	@touch $@

clean:  ## undo all of the above; what is cached stays: Horovod's wheel, the examples' environment
	rm -rf site .venv .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
