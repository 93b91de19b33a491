# `make demo` and `make test` need Python 3.11, 3.12 or 3.13 with its venv module, and nothing else.
# Another interpreter: make demo PYTHON=/path/to/python3.12

SHELL := /bin/sh
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

# An active environment, or modules that someone put on the path, must not reach into ours.
unexport VIRTUAL_ENV PYTHONPATH PYTHONHOME PYTHONSTARTUP PIP_USER PIP_TARGET PIP_PREFIX

PYTHONS := $(or $(PYTHON),python3.12 python3.13 python3.11 python3)
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --no-deps
# The first line of .venv/locked is the folder it was made for (scripts inside name it), the rest the lock it was made
# from. Written last: a killed or moved installation is made anew.
STALE := $(shell { $(PY) -I -c '' && [ "$$(head -n 1 .venv/locked)" = "$(CURDIR)" ]; } >/dev/null 2>&1 || echo stale)

.PHONY: help demo test test-slow lint docs bench lock clean stale

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*##\(.*\)/  make \1\t\2/p' Makefile | expand -t 20

demo: .venv/installed  ## install into .venv, then walk the whole journey on the embedded digits
	$(PY) -m pipeline run digits

test: lint  ## lint, then the fast tests
	$(PY) -m pytest -q

test-slow: .venv/installed  ## the tests that take minutes: real data, killed runs, the notebook
	$(PY) -m pytest -q -m slow

lint: .venv/installed  ## ruff, mypy, and the rules of who may import whom
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports

docs: .venv/installed  ## write docs/configuration.md from the options
	$(PY) -m pipeline.reference > docs/configuration.md

bench: .venv/installed  ## the short benchmarks; each prints ours / theirs and writes benchmarks/out/*.json
	@for script in $(filter-out $(addprefix benchmarks/,collaborative.py gpu_step.py journeys.py multi_worker.py overlap.py smallest.py sparse_dense.py torch_resnet8.py turns.py twin_applications.py),$(wildcard benchmarks/*.py)); do \
	  echo "$$script"; $(PY) "$$script" || exit 1; \
	done

lock:  ## resolve requirements.lock anew from setup.cfg
	@$(find-python); folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT; \
	"$$python" -m venv "$$folder" && "$$folder/bin/python" -m pip -q --disable-pip-version-check install uv && \
	"$$folder/bin/uv" pip compile -q --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
	  --extra dev --output-file requirements.lock --upgrade setup.cfg

clean:  ## remove what tools left behind; keeps .venv and workspace
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find benchmarks components pipeline tests tpu -name __pycache__ -prune -exec rm -rf {} +

.venv/installed: .venv/locked setup.cfg pyproject.toml
	$(PIP) -q --no-build-isolation -e .
	@touch $@

# Compared by content: a checkout that only touches the lock's date installs nothing.
.venv/locked: requirements.lock $(STALE)
	@if { echo "$(CURDIR)"; cat requirements.lock; } | cmp -s - $@ && $(PY) -I -c ''; then touch $@; exit 0; fi; \
	$(find-python); echo "Installing into .venv with $$python (about 3 GB, a few minutes) ..."; \
	rm -f .venv/locked && rm -rf .venv && "$$python" -m venv .venv && $(PIP) --require-hashes -r requirements.lock && \
	{ echo "$(CURDIR)"; cat requirements.lock; } > $@

stale:

# Shims that exist but do not run (pyenv has them) are passed over: each candidate is tried, not looked up. The answer is
# the interpreter behind any environment, since ours may be the active one and is about to be removed.
define find-python
python=; for each in $(PYTHONS); do \
  if python=$$("$$each" -I -c 'import sys, os, ensurepip, venv; print(os.path.realpath(sys.executable)); \
    sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null); then break; else python=; fi; \
done; \
if [ -z "$$python" ]; then \
  echo "make: Python 3.11, 3.12 or 3.13 with its venv module is needed; tried: $(PYTHONS)." >&2; \
  echo "make: install one (Debian, Ubuntu: also python3-venv), or name one: make PYTHON=/path/to/python3.12" >&2; \
  exit 1; \
fi
endef
