# The commands of this project. `make quickstart` and `make test` need make and Python >= 3.11, nothing else:
# the environment in .venv is made when it is missing and brought up to date when a lock has changed.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

VENV := .venv
PYTHON := $(VENV)/bin/python
UV_VERSION := 0.13.9
# The lock of the environment's own Python; evaluated when a recipe runs, after .venv exists.
LOCK = requirements/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
INSTALLED := $(VENV)/.installed
TEST_INSTALLED := $(VENV)/.installed-test
WORKDIR := runs/quickstart
EXPORTS := exports/quickstart
PORT := 8000
DEMO_EXPORT := --histories --no-saved-model
# Two workers: the suite is measured on two cores. `make test WORKERS=8 TESTS=tests/nn` narrows or widens.
WORKERS := 2
TESTS := tests
PYTEST = -n $(WORKERS) --dist loadfile --durations=10 $(TESTS)
# 1 checks the shapes that the signatures declare while the tests run.
SHAPES := 0

# Empty = bytecode is kept whatever the surroundings say: without it each process compiles TensorFlow's sources again.
export PYTHONDONTWRITEBYTECODE :=

# `make install EXTRAS=cuda` (or tpu) adds the accelerator's plugin, at the lock's version of jax.
EXTRAS :=

.PHONY: help install quickstart demo test coverage lint typecheck format bench lock clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

install: $(INSTALLED)  ## Make the environment in .venv; EXTRAS=cuda or EXTRAS=tpu for an accelerator
	$(if $(EXTRAS),$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --constraint $(LOCK) -e '.[$(EXTRAS)]')

quickstart: $(INSTALLED)  ## Train, evaluate and recommend on the embedded data, in minutes
	$(PYTHON) -m jaxrec.train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(PYTHON) -m jaxrec.evaluate --workdir=$(WORKDIR)
	$(PYTHON) -m jaxrec.recommend --workdir=$(WORKDIR) --split=test --k=10 --out=$(WORKDIR)/recommendations.parquet

# Two versions to compare, the second trained for a quarter of the steps; the newest answers. Lists of requests that
# do not say whether they explore do; the page says so each time.
demo: $(INSTALLED)  ## Train the quickstart where there is none, export it, and serve it with a page to try it on
	test -f $(WORKDIR)/evaluation.json || $(MAKE) quickstart
	test -d $(EXPORTS)/brief || { \
	  $(PYTHON) -m jaxrec.train --config=configs/quickstart.py --workdir=$(WORKDIR)-brief --config.num_train_steps=100; \
	  $(PYTHON) -m jaxrec.export --workdir=$(WORKDIR)-brief --out=$(EXPORTS) --version=brief $(DEMO_EXPORT); }
	test -d $(EXPORTS)/quickstart \
	  || $(PYTHON) -m jaxrec.export --workdir=$(WORKDIR) --out=$(EXPORTS) --version=quickstart $(DEMO_EXPORT)
	$(PYTHON) -m jaxrec.serve --model=$(EXPORTS) --port=$(PORT) --state=$(WORKDIR)/state.db \
	  --share=quickstart=0.9 --share=brief=0.1 --explore=0.1

test: $(TEST_INSTALLED)  ## Run every test on eight virtual devices
	JAXREC_CHECK_SHAPES=$(SHAPES) $(PYTHON) -m pytest $(PYTEST)

coverage: $(TEST_INSTALLED)  ## The same, a sixth slower, and which lines no test has run
	$(PYTHON) -m coverage erase
	$(PYTHON) -m coverage run -m pytest $(PYTEST)
	$(PYTHON) -m coverage combine --quiet
	$(PYTHON) -m coverage report $(if $(filter-out tests,$(TESTS)),--fail-under=0)

lint: $(INSTALLED)  ## Ruff (rules and layout) and shellcheck
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/shellcheck .ci/run launch/*.sh

typecheck: $(INSTALLED)  ## mypy
	$(VENV)/bin/mypy

format: $(INSTALLED)  ## Rewrite the layout, and what ruff can mend
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(INSTALLED)  ## The benchmarks whose results the README quotes
	$(PYTHON) benchmarks/train_throughput.py

lock: $(INSTALLED)  ## Write the locks anew from pyproject.toml
	for version in 3.11 3.12; do \
	  $(VENV)/bin/uv pip compile --quiet --python-version $$version --extra dev --upgrade \
	    --no-emit-index-url --no-emit-find-links --no-annotate --no-header \
	    --output-file requirements/py$${version/./}.txt pyproject.toml; \
	done
	# A resolution sees one platform; TensorFlow alone has another name on the others.
	sed -i -E "s/^tensorflow-cpu==(\S+)$$/tensorflow-cpu==\1; sys_platform == 'linux' and platform_machine == 'x86_64'\n\
	tensorflow==\1; sys_platform != 'linux' or platform_machine != 'x86_64'/" requirements/py311.txt requirements/py312.txt

clean:  ## Remove the environment and the caches; runs stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.* *.egg-info

# The first of these that is there and new enough: the two that have a lock, then whatever python3 is.
$(PYTHON):
	@for python in python3.11 python3.12 python3; do \
	  if "$$python" -c 'import sys, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    exec "$$python" -m venv $(VENV); \
	  fi; \
	done; \
	echo "jaxrec needs Python >= 3.11 with its venv module; found none as python3.11, python3.12 or python3." >&2; \
	exit 1

$(INSTALLED): $(wildcard requirements/py*.txt) pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --quiet uv==$(UV_VERSION)
	echo "Installing $(LOCK) into $(VENV)"
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) -r $(LOCK)
	$(VENV)/bin/uv pip install --quiet --python $(PYTHON) --no-deps -e .
	touch $@

# torch: see requirements/test-no-deps.txt. Where the index holds only a build that needs CUDA, its
# dependencies come after all: a test that does not run would be worse than a long download.
$(TEST_INSTALLED): requirements/test-no-deps.txt $(INSTALLED)
	$(PYTHON) -m pip install --quiet --no-deps -r requirements/test-no-deps.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or __import__("torch")' 2>/dev/null \
	  || $(PYTHON) -m pip install --quiet -r requirements/test-no-deps.txt
	# The state of users is tested against a real Redis server, the page in a real browser.
	for program in redis-server chromium; do \
	  command -v $$program >/dev/null || { apt-get update -qq && apt-get install -y -qq $$program; } >/dev/null 2>&1 \
	    || { echo "the tests need $$program: install it, e.g. with apt-get install $$program" >&2; exit 1; }; \
	done
	touch $@
