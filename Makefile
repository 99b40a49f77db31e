# One word per habit; CI calls the same words. `make help` lists them.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# A python of one's own choice: make run PYTHON=/path/to/python3.12
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,\
	$(if $(shell $(name) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo found),$(name))))

VENV := .venv
BIN := $(VENV)/bin
DOCS := $(VENV)-docs
NEEDS := pyproject.toml constraints.txt
# Images of containers often set it. Every process that imports torch and transformers would then compile them again, and take 2.5 times
# as long to start.
unexport PYTHONDONTWRITEBYTECODE
TESTS ?=
# Not compiled: Python compiles the modules that are imported, and pip would compile all.
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
# Tests run side by side, one process a core, four at most: each holds a torch of its own.
WORKERS ?= $(or $(shell $(BIN)/python -c 'import os; print(min(4, os.cpu_count() or 1))' 2>/dev/null),2)

.PHONY: help run test test-slow smoke check pages docs bench peers clients clean

help: ## List the words.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

run: $(VENV)/.installed ## Install what is needed and run the whole loop on the embedded model.
	@$(BIN)/selfeval run

test: $(VENV)/.installed-dev ## Run all tests but the slow ones (some files, whole: make test TESTS=tests/test_store.py).
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(or $(TESTS),-m "not slow")

test-slow: $(VENV)/.installed-dev ## Run the slow tests: before a release, and when what they cover changes.
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m slow

smoke: $(BIN)/python ## Build the wheel, install it elsewhere with the newest and the lowest versions, run the loop and the tests that meet libraries.
	@log=$$(mktemp); trap 'rm -f "$$log"' EXIT; newest=0; lowest=0; \
	export OMP_NUM_THREADS=1 WORKERS=$$((($(WORKERS) + 1) / 2)); \
	.ci/smoke $(BIN)/python >"$$log" 2>&1 & pid=$$!; \
	.ci/smoke $(BIN)/python -c constraints-lowest.txt || lowest=$$?; \
	wait $$pid || newest=$$?; cat "$$log"; exit $$((lowest | newest))

check: $(VENV)/.installed-dev ## Lint, check the format and the types.
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

pages: $(VENV)/.installed-dev ## Check that generated pages are up to date.
	@for script in docs/generate_*.py benchmarks/figures.py; do echo "== $$script --check"; OMP_NUM_THREADS=1 $(BIN)/python $$script --check || exit 1; done

docs: pages $(DOCS)/.installed ## Check the pages (generated ones, links, commands, settings, translations), and build the site into build/site.
	@$(BIN)/python -m pytest tests/docs
	@$(BIN)/python docs/translations.py
	@$(DOCS)/bin/python docs/site/build.py

bench: $(VENV)/.installed-dev ## Run every benchmark; results go to benchmarks/results, their figures into the README.
	@for name in exam loop repeat rounds learners stability "stability --ablations" overoptimisation sparse_reward coverage decoding logprobs long_context \
		roles "roles --learners" precision planner control/run figures; do \
		echo "== $$name"; set -- $$name; script=$$1; shift; $(BIN)/python benchmarks/$$script.py "$$@"; done

peers: $(VENV)/.installed-dev ## Compare with TRL and lm-eval, in an environment of their own (built once).
	@$(BIN)/python benchmarks/peers/run.py
	@$(BIN)/python benchmarks/peers/sft.py
	@$(BIN)/python -m pytest tests/e2e/test_peers.py

clients: $(VENV)/.installed-dev ## Run the scripts of examples/clients against a server, with their clients in an environment of their own (built once).
	@$(BIN)/python examples/clients/environment.py
	@$(BIN)/python -m pytest tests/serve/test_clients.py

clean: ## Remove the virtual environment and caches; runs and results stay.
	rm -rf $(VENV) $(VENV)-peers $(VENV)-clients $(DOCS) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	@if [ -z "$(PYTHON)" ]; then \
		echo "Python 3.11 or newer is needed; found $$(python3 --version 2>/dev/null || echo no python3). Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; \
		exit 2; \
	fi
	@$(PYTHON) -c 'import sys; sys.exit(f"{sys.executable} is Python {sys.version.split()[0]}; 3.11 or newer is needed") if sys.version_info < (3, 11) else 0'
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv" >&2; exit 2; }

$(VENV)/.installed: $(NEEDS) | $(BIN)/python
	@echo "Installing into $(VENV) (once)"
	@$(PIP_INSTALL) -e . -c constraints.txt
	@touch $@

# Dependency groups need pip 25.1.
$(VENV)/.installed-dev: $(VENV)/.installed
	@$(PIP_INSTALL) 'pip>=25.1'
	@$(PIP_INSTALL) --group dev --group notebooks -c constraints.txt
	@touch $@

# A separate environment, because the tests need none of it.
$(DOCS)/.installed: pyproject.toml constraints-docs.txt | $(BIN)/python
	@echo "Installing into $(DOCS) (once)"
	@$(BIN)/python -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check 'pip>=25.1'
	@$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --group docs -c constraints-docs.txt
	@touch $@
