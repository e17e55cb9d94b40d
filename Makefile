# Two commands do all the set-up: `make quickstart` and `make test`. PYTHON chooses the interpreter,
# VENV the environment, which is made once and used again.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin

.PHONY: quickstart test test-all lint golden dryrun constraints

$(VENV)/installed: requirements.txt constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

# Environment, then the main job on the embedded default, then its summary.
quickstart: $(VENV)/installed
	$(BIN)/python -m qwen_jax.train --config=configs/tiny.py --workdir=$(WORKDIR)
	cat $(WORKDIR)/summary.json

# Everything that takes less than ten seconds a test.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m "not slow"

# The slow ones too: kill -9 and two-process runs, real weights.
test-all: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Rewrites the golden files; look at the diff before you commit it.
golden: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q --update-golden
	git diff --stat tests/golden

# CONFIG=configs/7b.py DEVICES=64: parameters and memory per device, nothing allocated.
CONFIG ?= configs/7b.py
DEVICES ?= 64
dryrun: $(VENV)/installed
	$(BIN)/python -m qwen_jax.train --config=$(CONFIG) --dry_run --dry_run_devices=$(DEVICES)

# Writes the versions of the present environment, after its tests have passed, as the tested ones.
constraints: test
	$(BIN)/python -m pip freeze --exclude-editable | grep -v -i -E "^(torch|nvidia|triton|cuda)" > constraints.txt
