# Everything a checkout can do, from nothing but python3 (3.10 or later), a C++ compiler and make.
# Each target makes what it needs first, in a virtual environment of its own.

PYTHON ?= python3
VENV   ?= .venv
# What pip installs as torch. PyPI's Linux builds bring gigabytes of CUDA along; for a CPU build:
#   make test TORCH='torch==2.13.0 --index-url <the CPU index of pytorch.org>'
TORCH  ?= torch==2.13.0
# What make bench times: roofline, attention, relative, decode, norm, mlp, loss, rotary, embedding,
# optimizer, calls, models or all of them.
SUITE  ?= all
# The files that make readme-bench takes: runs of the suites attention and decode.
RUN    ?= $(wildcard benchmarks/results/*.json)
# More options for pytest: make test PYTEST='-k attention -x'
PYTEST ?=

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
# The environment is what runs, whatever the caller has set for another one.
unexport PYTHONPATH PYTHONHOME

.DEFAULT_GOAL := help
.PHONY: help demo readme readme-bench test test-fast test-full bench build lint format wheel clean FORCE

help: ## list what can be done
	@echo "make <target>, where target is one of"
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14 | sed 's/^/  /'

demo: build $(VENV)/.demo ## a real sentence encoder before and after ft.accelerate, timed
	$(VENV)/bin/fast-transformer demo

readme: demo ## write the demo's figures into the README
	$(PY) benchmarks/readme.py fast-transformer-demo/figures.json

readme-bench: build ## write the runs in benchmarks/results into the README
	$(PY) benchmarks/readme.py $(RUN)

test: build $(VENV)/.test ## the whole correctness suite, as continuous integration runs it
	$(PY) -m pytest -m "not full" $(PYTEST)

test-fast: build $(VENV)/.test ## a small selection, for the minute between two edits
	$(PY) -m pytest -m smoke $(PYTEST)

test-full: build $(VENV)/.test ## everything, the slow tests too
	$(PY) -m pytest $(PYTEST)

bench: build $(VENV)/.test ## time every op against PyTorch's ways to compute it, or one SUITE of them
	$(VENV)/bin/fast-transformer bench --suite $(SUITE)

build: $(VENV)/.tools ## compile the native code, in place; only what changed
	@$(PY) setup.py -q build_ext --inplace

lint: build $(VENV)/.dev ## ruff, clang-format and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp')
	$(PY) -m mypy

format: $(VENV)/.dev ## rewrite the sources in the project's style
	$(PY) -m ruff check --fix-only --quiet .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files '*.h' '*.cpp')

wheel: $(VENV)/.tools ## build a wheel into dist/
	$(PIP) wheel --no-build-isolation --no-deps -w dist .

clean: ## remove what was built; the virtual environment stays
	rm -rf build dist *.egg-info fast_transformer/*.so
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(PY):
	$(PYTHON) -m venv $(VENV)

# Renewed when TORCH names another one than was installed.
$(VENV)/.torch: FORCE | $(PY)
	@echo "$(TORCH)" | cmp -s - $@ || { $(PIP) install $(TORCH) && echo "$(TORCH)" > $@; }

$(VENV)/.tools: $(VENV)/.torch
	$(PIP) install 'setuptools>=77' 'pybind11>=2.13' 'ninja>=1.11'
	@touch $@

# The native code is built by then, with its progress shown, which pip would hide.
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev: $(VENV)/.%: pyproject.toml | build
	$(PIP) install --no-build-isolation -e '.[$*]'
	@touch $@

FORCE:
