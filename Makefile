# Everything runs in .venv, which is made on first use and brought up to date when pyproject.toml or constraints.txt change.
#   make search ARGS="study.candidates=2000 seed=1"
#   make test ARGS="tests/spaces -k quantizers"
#   make PYTHON=/path/to/python3.12 test

.DEFAULT_GOAL := help
.PHONY: help search test lint types clean

VENV := .venv
IN_VENV := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))

# The first of these that is Python 3.11 or newer.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c '$(NEW_ENOUGH)' 2>/dev/null && echo $$p && break; done)

help:
	@echo "make search   the whole job on this machine: table, supernet, search, winners, report (ARGS: Hydra overrides)"
	@echo "make test     all tests (ARGS: of pytest)"
	@echo "make lint     ruff: rules and formatting"
	@echo "make types    mypy, strict"
	@echo "make clean    remove $(VENV) and caches; runs/ and tables/ stay"

search: $(INSTALLED)
	$(IN_VENV) -m search $(ARGS)

test: $(INSTALLED)
	$(IN_VENV) -m pytest $(ARGS)

lint: $(INSTALLED)
	$(IN_VENV) -m ruff check .
	$(IN_VENV) -m ruff format --check .

types: $(INSTALLED)
	$(IN_VENV) -m mypy

# The stamp is written last, so an installation that was interrupted is repeated.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" && $(PYTHON) -c '$(NEW_ENOUGH)' || \
		{ echo "error: $(or $(PYTHON),python3) is not Python 3.11 or newer; install one, or run: make PYTHON=/path/to/python3.11 ..." >&2; exit 2; }
	@$(IN_VENV) -c 'import pip; $(NEW_ENOUGH)' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu install the package python3-venv, then run make again" >&2; exit 2; }
	$(IN_VENV) -m pip install --disable-pip-version-check --constraint constraints.txt --editable ".[cluster,dev]"
	@touch $@

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
