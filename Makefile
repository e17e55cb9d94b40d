# Two commands do all the set-up: `make quickstart` and `make test`. PYTHON chooses the interpreter,
# VENV the environment, which is made once and used again.
PYTHON ?= python3
VENV ?= .venv
WORKDIR ?= runs/quickstart
BIN := $(VENV)/bin
# The versions that were tested with this Python; another Python takes the newest ones.
MINOR := $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])")
TESTED := $(wildcard constraints/$(MINOR).txt)

.PHONY: quickstart pipeline test test-slow test-plan plan-env lint golden dryrun constraints

$(VENV)/installed: requirements.txt $(TESTED)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -r requirements.txt $(TESTED:%=-c %)
	touch $@

$(VENV)/installed-dev: $(VENV)/installed requirements-dev.txt requirements-dev-no-deps.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt $(TESTED:%=-c %)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-dev-no-deps.txt
	touch $@

# Environment, then the main job on the embedded default, then its summary.
quickstart: $(VENV)/installed
	$(BIN)/python -m qwen_jax.train --config=configs/tiny.py --workdir=$(WORKDIR)
	cat $(WORKDIR)/summary.json

# Raw text to aligned model, all stages, with a report: SEED chooses the run.
SEED ?= 0
PIPELINE ?= runs/pipeline
pipeline: $(VENV)/installed
	$(BIN)/python -m qwen_jax.pipeline --workdir=$(PIPELINE) --seed=$(SEED)

# Everything that takes less than ten seconds a test.
test: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m "not slow"

# The slow ones: kill -9, runs of several processes and the like. The one on Slurm needs
# slurmctld, slurmd, slurm-client and munge of Debian, and says so when it skips.
test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q -m slow

# Compilers for TPUs and GPUs, to be used without either: .venv-plan/bin/python -m qwen_jax.plan
PLAN_VENV ?= .venv-plan
plan-env: $(PLAN_VENV)/installed

$(PLAN_VENV)/installed: requirements.txt requirements-plan.txt $(TESTED)
	$(PYTHON) -m venv $(PLAN_VENV)
	$(PLAN_VENV)/bin/python -m pip install --quiet -r requirements.txt -r requirements-plan.txt \
		$(TESTED:%=-c %)
	touch $@

# Every preset compiled for the hardware it is shipped for, and its program checked: about twenty
# minutes on two cores. PAIRS picks some: make test-plan PAIRS="7b and v5p"
PAIRS ?= plan
test-plan: $(PLAN_VENV)/installed
	$(PLAN_VENV)/bin/python -m pytest -q tests/test_plan_compiled.py -k "$(PAIRS)"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/shellcheck launch/*.sh launch/slurm.sbatch

# Rewrites the golden files; look at the diff before you commit it.
golden: $(VENV)/installed-dev
	$(BIN)/python -m pytest -q --update-golden -k golden
	git diff --stat tests/golden

# CONFIG=configs/7b.py DEVICES=64: parameters and memory per device, nothing allocated.
CONFIG ?= configs/7b.py
DEVICES ?= 64
dryrun: $(VENV)/installed
	$(BIN)/python -m qwen_jax.train --config=$(CONFIG) --dry_run --dry_run_devices=$(DEVICES)

# Newest versions into a fresh environment; once its tests pass they are the tested ones.
constraints:
	rm -rf .venv-fresh
	$(MAKE) test VENV=.venv-fresh TESTED=
	.venv-fresh/bin/python -m pip freeze | grep -v -i -E "^(torch|nvidia|triton|cuda)|@" \
		> constraints/$(MINOR).txt
