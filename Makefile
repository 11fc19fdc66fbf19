# make study [STUDY=quick] [CORES=2] [KEEP=1]   run a study and write its report
# make test                                     run every test and notebook
# An existing environment: make study BIN=/path/to/environment/bin

STUDY ?= quick
CORES ?= $(shell nproc 2>/dev/null || echo 2)
KEEP ?=
PYTHON ?= python3
VENV ?= .venv
BIN ?= $(VENV)/bin
export OMP_NUM_THREADS ?= 1

ifeq ($(BIN),$(VENV)/bin)
STUDY_INSTALLED := $(VENV)/.installed-study
TEST_INSTALLED := $(VENV)/.installed-test
endif

.PHONY: study test lint
study: $(STUDY_INSTALLED) data/glyphs/card.json
	@$(BIN)/python workflow/run_study.py $(STUDY) --cores $(CORES) $(if $(KEEP),--keep)

test: $(TEST_INSTALLED) data/glyphs/card.json
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
	$(BIN)/python -m pytest --nbval --ignore=tests/benchmarks tests $$(git ls-files 'notebooks/*.ipynb')

data/glyphs/card.json: data_prep/glyph_list.json data_prep/glyphs.py data_prep/glyph_drawing.py data_prep/prepared.py | $(STUDY_INSTALLED)
	$(BIN)/python -m data_prep glyphs
	@touch $@

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "hloss needs Python 3.11 or newer, this is " + sys.version)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-study: pyproject.toml | $(VENV)/bin/python
	@echo "installing into $(VENV) (some minutes, once)"
	$(VENV)/bin/python -m pip install --progress-bar on -e '.[study]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(VENV)/.installed-study
	$(VENV)/bin/python -m pip install -e '.[test]'
	@touch $@
