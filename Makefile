# make study [STUDY=quick] [PROFILE=local] [CORES=2] [KEEP=1]   run a study and write its report
# make plan [STUDY=quick] [PROFILE=local]   list the runs left, with their time, memory and disk
# make watch [STUDY=quick]  keep the page runs/STUDY/index.html up to date; `make study` does so as well
# make report [STUDY=quick]  write the report of the results so far; it names the missing runs
# make verify [RESULTS=reports/sample] [RUNS=5] [SEED=0]   repeat a few runs of given results and compare them
# make docs                 build the site of guides, notebooks and docstrings in build/site
# make lab                  open JupyterLab on the list of the notebooks
# make test                 run all tests and notebooks except the slow tests
# make test-browser         run the slow tests in a browser: report, watching page, site, JupyterLab, accessibility
# make test-all             run all slow tests: these, interrupted studies, Slurm on one node, examples
# make check-gpu            check a machine with GPUs; run it there before the first study
# KEEP=1 keeps results of other code or data, which are redone otherwise. PROFILE is a folder in workflow/profiles.
# To use an existing environment: make study BIN=/path/to/environment/bin

STUDY ?= quick
PROFILE ?= local
RESULTS ?= reports/sample
RUNS ?= 5
SEED ?= 0
CORES ?= $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
KEEP ?=
FAISS := faiss
PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin
export OMP_NUM_THREADS ?= 1
# By default glibc returns the memory of activations to the system after every step, which takes a third of the time of a
# step on glyphs.
export MALLOC_MMAP_THRESHOLD_ ?= 33554432
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824

# Snakemake, Jupyter, matplotlib and torch keep caches in the home folder, to which a container may not write.
ifneq ($(shell test -w "$$HOME" && echo yes),yes)
export HOME := $(CURDIR)/.home
$(shell mkdir -p "$(HOME)")
endif
# In a container a user can lack a name, which Snakemake asks for.
export USER ?= $(shell id -u)

ifeq ($(BIN),$(VENV)/bin)
STUDY_INSTALLED := $(VENV)/.installed-study
TEST_INSTALLED := $(VENV)/.installed-test
SLURM_INSTALLED := $(VENV)/.installed-slurm
BROWSER_INSTALLED := $(VENV)/.installed-browser
EXAMPLES_INSTALLED := $(VENV)/.installed-examples
DOCS_INSTALLED := $(VENV)/.installed-docs
endif

# The easier and the harder drawing of glyphs, for studies and results that have them.
DRAWINGS := data/glyphs-easy-5/card.json data/glyphs-hard-5/card.json
STUDY_DRAWINGS := $(if $(filter sample glyphs-difficulty,$(STUDY)),$(DRAWINGS))
RESULTS_DRAWINGS := $(if $(findstring glyphs-difficulty,$(RESULTS) $(wildcard $(RESULTS)/parts/*)),$(DRAWINGS))

.PHONY: study plan watch report verify docs lab test types tests test-browser test-all check-gpu
study: $(STUDY_INSTALLED) $(if $(filter-out local,$(PROFILE)),$(SLURM_INSTALLED)) data/glyphs/card.json data/glyphs-5/card.json $(STUDY_DRAWINGS)
	@"$(BIN)"/python workflow/scripts/run_study.py $(STUDY) --profile $(PROFILE) --cores $(CORES) $(if $(KEEP),--keep)

plan: $(STUDY_INSTALLED) data/glyphs/card.json data/glyphs-5/card.json $(STUDY_DRAWINGS)
	@"$(BIN)"/python workflow/scripts/plan_study.py $(STUDY) --profile $(PROFILE) --cores $(CORES)

watch: $(STUDY_INSTALLED)
	@"$(BIN)"/python workflow/scripts/watch_study.py $(STUDY)

report: $(STUDY_INSTALLED) data/glyphs/card.json data/glyphs-5/card.json
	@"$(BIN)"/python workflow/scripts/run_study.py $(STUDY) --collect $(if $(KEEP),--keep)
	@"$(BIN)"/python workflow/scripts/run_notebook.py report $(STUDY)

verify: $(STUDY_INSTALLED) data/glyphs/card.json data/glyphs-5/card.json $(RESULTS_DRAWINGS)
	@"$(BIN)"/python workflow/scripts/verify_results.py $(RESULTS) --runs $(RUNS) --seed $(SEED)

docs: $(DOCS_INSTALLED)
	"$(BIN)"/python -m sphinx --quiet --fail-on-warning --keep-going -c docs . build/site
	@echo build/site/index.html

lab: $(STUDY_INSTALLED) data/glyphs/card.json
	JUPYTER_CONFIG_PATH="workflow/jupyter$${JUPYTER_CONFIG_PATH:+:$$JUPYTER_CONFIG_PATH}" \
	"$(BIN)"/jupyter lab --ServerApp.root_dir=. --LabApp.default_url=/lab/tree/notebooks/README.md

test: $(TEST_INSTALLED) data/glyphs/card.json data/glyphs-5/card.json
	"$(BIN)"/ruff check . && "$(BIN)"/ruff format --check . && "$(BIN)"/lint-imports --no-cache --no-logo
	@"$(MAKE)" --no-print-directory -j2 types tests

types:  # on one core, beside the first tests
	"$(BIN)"/mypy

tests:
	"$(BIN)"/python -m pytest -n logical --maxprocesses=4 --dist=loadfile --nbval -m "not slow" --ignore=tests/benchmarks tests $$(git ls-files 'notebooks/*.ipynb')

test-browser: $(TEST_INSTALLED) $(BROWSER_INSTALLED) $(DOCS_INSTALLED) data/glyphs/card.json data/glyphs-5/card.json
	"$(BIN)"/python -m pytest -m slow -rs --durations=0 tests/browser

test-all: $(TEST_INSTALLED) $(SLURM_INSTALLED) $(BROWSER_INSTALLED) $(EXAMPLES_INSTALLED) $(DOCS_INSTALLED) data/glyphs/card.json data/glyphs-5/card.json
	"$(BIN)"/python -m pytest -m slow -rs --durations=0 tests

check-gpu: FAISS := faiss-gpu
check-gpu: $(TEST_INSTALLED) data/glyphs/card.json
	@"$(BIN)"/python workflow/scripts/check_gpu.py

data/glyphs/card.json: data_prep/glyph_list.json data_prep/glyphs.py data_prep/glyph_drawing.py data_prep/prepared.py | $(STUDY_INSTALLED)
	"$(BIN)"/python -m data_prep glyphs
	@touch $@

# The last of the six datasets that this command writes.
data/glyphs-5/card.json: data/glyphs/card.json
	"$(BIN)"/python -m data_prep glyphs --folds
	@touch $@

data/glyphs-easy-5/card.json data/glyphs-hard-5/card.json: data/glyphs-%-5/card.json: data/glyphs/card.json
	"$(BIN)"/python -m data_prep glyphs --difficulty $* --folds
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "hloss needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-study: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV); this takes some minutes, once"
	$(VENV)/bin/python -m pip install --progress-bar on -e '.[study]'
	@touch $@

# faiss-cpu and faiss-gpu are two packages of one module: one is installed, and only if there is none.
$(VENV)/.installed-test: pyproject.toml | $(VENV)/.installed-study
	$(VENV)/bin/python -m pip install -e '.[test]'
	$(VENV)/bin/python -c 'import faiss' 2>/dev/null || $(VENV)/bin/python -m pip install -e '.[$(FAISS)]'
	@touch $@

$(VENV)/.installed-slurm $(VENV)/.installed-browser $(VENV)/.installed-docs $(VENV)/.installed-examples: $(VENV)/.installed-%: pyproject.toml | $(VENV)/.installed-study
	$(VENV)/bin/python -m pip install -e '.[$*]'
	@touch $@
