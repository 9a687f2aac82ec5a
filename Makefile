# `make help` lists the targets. Everything runs in ./.venv, which is made when it is missing or out of date.
PYTHON  ?= python3
PROFILE ?= laptop
WORKERS ?= 2
VENV    := .venv
PY      := $(VENV)/bin/python
READY   := $(VENV)/.ready
TORCH   ?= $(shell sed -n 's/^torch==//p' constraints.txt)
# Builds of torch for GPUs bring the Triton they want. Without one, this runs the tests of the kernels in its interpreter;
# it is large (641 MB), so that only the targets that test bring it.
TRITON  ?= 3.6.0
LOCK    := build/lock
# Asked for only by other Python versions than the one that locks, and pinned for them (papermill on 3.12).
ALSO_LOCKED := aiohttp

# The mark is the last thing that set-up writes, and it holds the folder's path: an environment half made, copied, moved
# or left without its interpreter has no valid mark and is made again.
ifneq ($(shell test -x $(PY) && cat $(READY) 2>/dev/null),$(CURDIR))
$(shell rm -f $(READY))
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup reproduce test test-fast test-gpu lint format triton browser fetch lock clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):.*## */  make \1|/' | awk -F'|' '{ printf "%-20s %s\n", $$1, $$2 }'
	@echo "  PROFILE=smoke|laptop|paper (now $(PROFILE)), PYTHON=python3.12, WORKERS=4"

setup: $(READY)  ## make the environment in .venv (the other targets do it when needed)

reproduce: $(READY)  ## run all notebooks and write data/runs/$PROFILE/index.html
	$(VENV)/bin/lorsa reproduce --profile $(PROFILE)

test: $(READY) triton browser fetch lint  ## run every check and test
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-fast: $(READY) triton  ## run the tests that take seconds
	$(PY) -m pytest -n $(WORKERS) --dist loadfile -m "not slow and not gpu and not browser"

test-gpu: $(READY)  ## run the tests of the kernels on an NVIDIA GPU
	$(PY) -m pytest -m "gpu or not gpu" tests/test_kernels.py

lint: $(READY)  ## ruff (code and notebooks) and mypy
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

format: $(READY)  ## rewrite code and notebooks in the house style
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer; install one and name it: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@if [ -e $(READY) ]; then echo "Updating .venv ..."; else echo "Making .venv (a few minutes) ..."; $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@printf '%s' '$(CURDIR)' > $(READY)

triton: $(READY)
	@$(PY) -c 'import triton' 2>/dev/null || $(PY) -m pip install --quiet --disable-pip-version-check triton==$(TRITON) 2>/dev/null \
	  || echo "No Triton $(TRITON) for this system: the tests of the GPU kernels are skipped."

# In the background, while mypy runs; a test that needs the model or the text waits until it is there.
fetch: $(READY)
	@$(PY) -c 'from lorsa_utils import corpus, fetch; fetch.fetch_embedded_model(); corpus.embedded_corpus()' >/dev/null 2>&1 &

# Static figures and the page tests draw with a Chromium. Without one, figures fall back and those tests are skipped.
browser:
	@if ! { command -v chromium || command -v chromium-browser || command -v google-chrome; } >/dev/null && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing chromium ..."; \
	  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core; } >/dev/null \
	  || echo "No chromium could be installed; going on without."; \
	fi

lock:  ## resolve the newest versions afresh and write constraints.txt (TORCH=2.14.0 moves torch)
	rm -rf $(LOCK)
	$(PYTHON) -m venv $(LOCK)
	$(LOCK)/bin/pip install --quiet --disable-pip-version-check torch==$(TORCH)
	$(LOCK)/bin/pip install --quiet --disable-pip-version-check -e '.[all]' $(ALSO_LOCKED)
	@# Left out: CUDA parts (torch pins its own), the build variant after '+', and this package.
	$(LOCK)/bin/pip freeze --exclude-editable --exclude pip --exclude setuptools | grep -Eiv '^(nvidia|cuda|triton)[-_=]' | sed 's/+[^ ]*$$//' > $(LOCK)/pins
	@if grep -n ' @ ' $(LOCK)/pins; then echo "These have no version on the package index; constraints.txt is unchanged." >&2; exit 1; fi
	@{ echo "# Written by 'make lock' from pyproject.toml (all extras of [all]); torch is installed first."; \
	   grep '^torch==' $(LOCK)/pins; grep -v '^torch==' $(LOCK)/pins; } > $(LOCK)/constraints.txt
	mv $(LOCK)/constraints.txt constraints.txt

clean:  ## remove the environment and what tools left behind (data/ stays)
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
