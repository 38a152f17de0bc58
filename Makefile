# `make reproduce` runs the whole method, `make test` checks it. Both build .venv where it is missing.
SHELL := /bin/bash
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Built again when the versions in pyproject.toml change.
READY := .venv/.ready
TORCH := $(shell sed -n 's/^ *"\(torch==.*\)",$$/\1/p' pyproject.toml)

# The run that `make pages` shows.
RUN ?= runs/mini
# Of `make real`: a profile, and the local folder of its base.
MODEL ?= smollm2-135m
BASE ?= $(MODEL)

.PHONY: real reproduce smoke figures pages test test-profiles lab clean

reproduce: $(READY)
	$(BIN)/ruadapt run mini

smoke: $(READY)
	$(BIN)/ruadapt run smoke

# A profile of a real model on local data: RUADAPT_REAL has chats and tasks, RUADAPT_REFERENCE the text, BASE the
# model. A fifth of the English text is code. SET='--set …' changes its size.
TEXT = $(RUADAPT_REFERENCE)/text
MIX = [{source: $(TEXT)/train_ru_modern.txt.gz, language: ru, domain: modern}, \
	{source: $(TEXT)/train_ru_literature.txt.gz, language: ru, domain: literature}, \
	{source: $(TEXT)/train_en_modern.txt.gz, language: en, domain: modern}, \
	{source: $(TEXT)/train_en_literature.txt.gz, language: en, domain: literature}, \
	{source: $(CODE), language: en, domain: code, weight: 0.5}]
CODE = runs/code.jsonl
CHATS = [{source: $(RUADAPT_REAL)/chats_en.jsonl.gz, language: en}, \
	{source: $(RUADAPT_REAL)/chats_ru.jsonl.gz, language: ru}]
real: $(READY) $(CODE)
	$(BIN)/ruadapt run $(MODEL) --set base_model=$(BASE) --set instruct_model= --set 'corpus_mix=$(MIX)' \
		--set 'chats=$(CHATS)' --set evaluation_data=$(RUADAPT_REAL)/tasks $(SET)

$(CODE): $(READY)
	$(BIN)/python -m benchmarks.code $@

# Every figure and table again, from the committed results of the default run; no run is needed.
figures: $(READY)
	mkdir -p runs/figures
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/papermill notebooks/09_figures.ipynb runs/figures/09_figures.ipynb \
		-f profiles/mini.yaml -p collect_results False

# A finished run's notebooks as pages with their pictures, for docs/notebooks: make pages RUN=runs/smoke
pages: $(READY)
	$(BIN)/python docs/render.py $(RUN)

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n 2

# Every profile of a real pair, all stages, on tiny models with the real tokenizers of RUADAPT_REFERENCE.
test-profiles: $(READY)
	$(BIN)/python -m pytest -n 2 -m profiles

lab: $(READY)
	HF_HUB_OFFLINE=$${HF_HUB_OFFLINE-1} JUPYTER_PREFER_ENV_PATH=1 $(BIN)/jupyter lab notebooks

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet -e '.[training,evaluation,notebooks,dev]'
	touch $(READY)

clean:
	rm -rf .venv runs build *.egg-info
