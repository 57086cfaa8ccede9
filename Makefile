# make setup       environment in .venv, embedded backbone and data (checksums verified)
# make test        setup, ruff, mypy, unit tests, notebook hygiene, nbval, the pruner in a browser
# make test-lowest, make test-newest
#                 the unit tests with the lowest versions that pyproject.toml allows, or with the newest releases, each in a
#                 fresh environment of its own (build/lowest, build/newest)
# make browser-test  the last of these alone: Voilà, JupyterLab and Chromium (installed where missing and permitted)
# make reproduce   setup, every notebook in the smoke profile into build/notebooks, its figures into build/figures
# make notebooks   rewrite the committed notebooks/*.ipynb from their scripts, executed
# make figures     setup, every reference figure and table again from data/reference_runs (seconds, no training),
#                 docs/sites.svg and docs/benchmarks.md
# make benchmark   timings, as ratios within one run: banks against single runs, the pruner, scoring (quiet machine)
# make gpu         with a torch that sees CUDA, no set-up and no network: the GPU's tests, then the banks' benchmark
# make estimate    how long the runs of HADAMARD_PROFILE=paper may take on this machine
# make clean       remove what the targets above made, except downloads
#
# Choices, all optional:
#   PYTHON=python3.12        which Python makes the environment (3.11 or later)
#   TORCH_INDEX=URL         
#                            a further package index for torch, as pytorch.org names them: a small CPU build, CUDA builds;
#                            unset, pip takes what your index offers
#   CHROMIUM=/path/chrome    the browser of the browser test
#   JOBS=2                   notebooks or test files at once
#   OMP_NUM_THREADS=1        threads of each of them; the committed outputs were made with 1
#   HADAMARD_PROFILE=paper   sizes of the paper instead of smoke (make reproduce; wants a GPU). Its runs go into
#                            runs/paper, which lasts: a second start goes on where the first one was stopped
#   ENGINE=processes         where those runs happen: inline, processes or ray; WORKERS=4 how many at a time
#   STORE=runs VENUE=acl-column FOLDER=drawn   of make figures: which runs, the width of which venue, and where to
#   PLAN=FOLDER/plan.toml MINUTES=8   of make gpu: then as much of this plan as fits (docs/sweeps.md)
#   HF_HUB_OFFLINE=0         allow the hub (GLUE without a local folder)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
TORCH_INDEX ?=
ENGINE ?= processes
WORKERS ?=
CHROMIUM ?= chromium
export OMP_NUM_THREADS ?= 1
export HADAMARD_PROFILE ?= smoke
export HF_HUB_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= $(HF_HUB_OFFLINE)
export TRANSFORMERS_OFFLINE ?= $(HF_HUB_OFFLINE)
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BROWSER := $(VENV)/.browser
FETCHED := $(or $(HADAMARD_CACHE),data/cache)/.fetched
LIBRARY := $(shell find hadamard_toolkit -name '*.py')
SCRIPTS := $(sort $(wildcard notebooks/[0-9][0-9]_*.py))
EXECUTED_IN := build/notebooks$(if $(filter-out smoke,$(HADAMARD_PROFILE)),-$(HADAMARD_PROFILE))
FIGURES_IN := $(if $(filter smoke,$(HADAMARD_PROFILE)),build/)figures
EXECUTED := $(SCRIPTS:notebooks/%.py=$(EXECUTED_IN)/%.ipynb)
COMMITTED := $(SCRIPTS:notebooks/%.py=build/stamps/%)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test lint unit nbval browser-test estimate paper-runs test-lowest test-newest benchmark gpu reproduce executed notebooks figures clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: $(FETCHED)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $(PYTHON) is missing or older than 3.11; name another with PYTHON=python3.12"; exit 1; }
	@if ! $(PYTHON) -m venv $(VENV) > /dev/null 2>&1; then \
		echo "make: $(PYTHON) has no working venv module (Debian: package python3-venv); using virtualenv instead"; \
		rm -rf $(VENV); \
		$(PYTHON) -m virtualenv --version > /dev/null 2>&1 || $(PYTHON) -m pip install --quiet --target build/virtualenv virtualenv; \
		PYTHONPATH=build/virtualenv $(PYTHON) -m virtualenv --quiet $(VENV); \
	fi

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --progress-bar off $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt -e ".[notebooks,test]"
	@touch $@

$(FETCHED): $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/hadamard fetch
	@mkdir -p $(@D) && touch $@

# The committed outputs are smoke outputs without progress bars, whatever the shell says.
test lint unit nbval browser-test test-lowest test-newest notebooks: export HADAMARD_PROFILE := smoke
test lint unit nbval browser-test test-lowest test-newest notebooks: export HADAMARD_PROGRESS := 0

test: lint unit nbval browser-test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

unit: lint
	$(BIN)/python -m pytest -q tests -n $(JOBS) --dist loadfile --durations=10

# Every notebook again, in a fresh kernel; the cells tagged nbval-check-output must print what is committed.
nbval: unit
	$(BIN)/python -m pytest -q notebooks @notebooks/nbval.args -n $(JOBS) --dist loadfile

# One process: two browsers on two cores would only wait for each other. A missing browser is an error.
browser-test: $(BROWSER)
	@command -v $(CHROMIUM) > /dev/null || { echo "make: no Chromium; installing Debian's with apt-get"; \
		apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium; } \
		|| { echo "make: no Chromium, and it could not be installed; install the package chromium, or set CHROMIUM=PATH"; exit 1; }
	$(BIN)/python -c "import playwright, voila"
	CHROMIUM=$$(command -v $(CHROMIUM)) $(BIN)/python -m pytest -q -m browser tests/browser --durations=5

$(BROWSER): $(INSTALLED) | $(FETCHED)
	$(BIN)/python -m pip install --progress-bar off -c constraints.txt -e ".[notebooks,test,browser]"
	@touch $@

# uv can resolve to the lowest version of what is named in pyproject.toml. The environment is made anew each time, so that
# nothing stays that an earlier bound brought. Old releases beside new ones warn of each other: only failures count here.
test-lowest: RESOLUTION := lowest-direct
test-newest: RESOLUTION := highest
test-lowest test-newest: test-%:
	rm -rf build/$*
	@$(MAKE) --no-print-directory VENV=build/$* build/$*/bin/python
	build/$*/bin/python -m pip install --quiet uv
	build/$*/bin/python -m uv pip install --python build/$*/bin/python --resolution $(RESOLUTION) \
		$(if $(TORCH_INDEX),--index $(TORCH_INDEX) --index-strategy unsafe-best-match) -e ".[notebooks,test]"
	build/$*/bin/hadamard fetch
	TEST_RESOLUTION=$(RESOLUTION) build/$*/bin/python -m pytest -q tests -W default -n $(JOBS) --dist loadfile

benchmark: setup
	$(BIN)/python -m pytest -q -m benchmark tests/benchmarks -s

# The machine's own Python and torch: a GPU that is at hand for minutes leaves no time for an environment.
gpu: export PYTHONPATH := .
gpu:
	$(PYTHON) -c "import torch; assert torch.cuda.is_available(), 'torch sees no GPU'"
	$(PYTHON) -m pytest -q -W default -m gpu tests/gpu
	$(PYTHON) -m pytest -q -W default -m benchmark tests/benchmarks/test_bank_speed.py -s
	$(if $(PLAN),$(PYTHON) -m hadamard_toolkit.cli sweep $(PLAN) --minutes $(or $(MINUTES),8))

reproduce: executed figures
	@echo; echo "Notebooks, executed in the $(HADAMARD_PROFILE) profile, in $(EXECUTED_IN)/"
	@ls -1sh $(EXECUTED_IN) | sed '1d; s/^/  /'
	@echo "Figures, each as .pdf, .png and .json (where its numbers come from), in $(FIGURES_IN)/"
	@ls -1 $(FIGURES_IN) 2> /dev/null | sed -n 's/\.pdf$$//p' | sed 's/^/  /'
	@echo "Reference figures, drawn again from the committed runs, in figures/"
	@ls -1 figures 2> /dev/null | sed -n 's/\.pdf$$//p' | sed 's/^/  /'
	@echo "Open them with  $(BIN)/jupyter lab $(EXECUTED_IN)"

PAPER_RUNS = $(BIN)/python tools/paper_runs.py --engine $(ENGINE) $(if $(WORKERS),--workers $(WORKERS)) $(SCRIPTS)

estimate: setup
	@$(PAPER_RUNS) --dry-run

# Before the notebooks, one sweep of all that they train: one estimate, every GPU, and nothing is trained twice.
paper-runs: setup
	@$(PAPER_RUNS)

executed: setup $(if $(filter paper,$(HADAMARD_PROFILE)),paper-runs)
	@$(MAKE) --no-print-directory -j$(JOBS) $(EXECUTED)

$(EXECUTED_IN)/%.ipynb: notebooks/%.py tools/build_notebook.py $(LIBRARY) | $(FETCHED)
	@$(BIN)/python tools/build_notebook.py $< $@

notebooks: setup
	@$(MAKE) --no-print-directory -j$(JOBS) $(COMMITTED)

build/stamps/%: notebooks/%.py tools/build_notebook.py $(LIBRARY) | $(FETCHED)
	@$(BIN)/python tools/build_notebook.py $< notebooks/$*.ipynb
	@mkdir -p $(@D) && touch $@

figures: setup
	$(BIN)/python tools/figures.py $(if $(STORE),--store $(STORE)) $(if $(VENUE),--venue $(VENUE)) $(if $(FOLDER),--folder $(FOLDER))
	$(BIN)/python tools/draw_sites.py
	$(BIN)/python tools/benchmark_report.py

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
