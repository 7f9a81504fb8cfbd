# `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
WITHOUT_GIT := $(if $(wildcard .git),,.dvc/config.local)

.DEFAULT_GOAL := help
.PHONY: help demo train report experiments plots restore record weights encoder configuration test test-isa test-faults test-long mutants bench check check-lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.txt
	@echo "installing PyTorch and what else a run needs into .venv: once, about 6 GB, 2 to 10 minutes"
	@$(PYTHON) -m venv .venv
	@$(PIP) -r requirements.txt
	@touch $@

.venv/dev: .venv/installed requirements-dev.txt requirements-sweeps.txt
	@echo "installing what tests and checks need into .venv"
	@$(PIP) -r requirements-dev.txt -r requirements-sweeps.txt
	@touch $@

.dvc/config.local: # a downloaded ZIP is no Git repository, in which DVC refuses to work unless it is told so
	@printf '[core]\n    no_scm = true\n' > $@

demo: .venv/installed ## draw shapes, train on them, write a grid of samples (about 3 minutes on 2 cores)
	$(BIN)/python prepare_data.py experiment=demo
	$(BIN)/python main.py experiment=demo

train: .venv/installed $(WITHOUT_GIT) ## CIFAR-10: the recorded pipeline (dvc repro), under 10 minutes on 2 cores
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro

report: .venv/installed ## all runs under runs/ beside each other: report.html, a page that needs no network
	$(BIN)/python report.py --html report.html

experiments: .venv/installed ## recorded experiments beside each other: losses, seconds and the values that differ
	@columns=$$(tput cols 2>/dev/null || echo 0); [ $$columns -ge 120 ] || columns=120; \
	COLUMNS=$$columns $(BIN)/dvc exp show --no-pager --only-changed --drop \
	    'Created|Executor|eval/(train|heldout_raw)|images|memory|parameters|steps|skipped'

plots: .venv/installed ## the recorded run's plots beside the workspace's: a page that needs no network
	$(BIN)/python -m modeling.comparison.dvc_page .dvc/tmp/plots.html
	$(BIN)/dvc plots diff --html-template .dvc/tmp/plots.html

restore: .venv/installed ## after an experiment: params.yaml and outputs/ as committed; changes go to `git stash`
	git stash push --message "before make restore" -- params.yaml dvc.lock outputs
	$(BIN)/dvc checkout --allow-missing

record: train ## after a change of what a stage computes: the recorded run again, and what to commit
	@git status --short -- dvc.lock outputs
	@echo "commit these files with the change; dvc.lock is true again"

weights: .venv/dev ## after `make record`: its weights into weights/, their record, and the docs' picture of their samples
	$(BIN)/python -m tests.published_weights

encoder: .venv/installed ## train the classifier whose features stand in for Inception's (about 5 minutes on 2 cores)
	$(BIN)/python train_encoder.py overwrite=true
	$(BIN)/python train_encoder.py controls=true

test: .venv/dev ## all tests, with coverage
	$(BIN)/python -m pytest --cov=modeling
	$(BIN)/coverage report --include=modeling/training.py --fail-under=90

test-isa: .venv/dev ## the numeric tests as on a CPU with AVX2 only, whose kernels round otherwise (2 minutes)
	ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest -m "numeric and not long"

test-faults: .venv/dev ## faults: 100 kills, signals, full disks, hostile files (about 20 minutes); ends with the matrix
	$(BIN)/python -m pytest -m fault

test-long: .venv/dev ## tests that take minutes: speed, parity, every edit of the pipeline
	$(BIN)/python -m pytest -m "long and not fault"

mutants: .venv/dev ## bugs put in by hand, each of which must fail a test (long)
	$(BIN)/python -m tests.mutants

bench: .venv/installed ## speed against other loops and the machine's limit (about 40 minutes); writes benchmark.md
	$(BIN)/python prepare_data.py
	$(BIN)/python benchmark.py

check: .venv/dev ## style, types and spelling
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/codespell

configuration: .venv/dev ## write docs/configuration.md: every key, from modeling/sections.py and modeling/options.py
	$(BIN)/python -m tests.configuration_page

check-lock: .venv/installed $(WITHOUT_GIT) ## dvc.lock is true: code and values are those of the recorded run (needs no data)
	@said=$$($(BIN)/dvc repro --allow-missing --dry 2>&1); \
	if echo "$$said" | grep -q "^Data and pipelines are up to date"; \
	then echo "dvc.lock is true"; \
	else echo "$$said" >&2; echo "dvc.lock is stale: run \`make record\` and commit what it lists" >&2; exit 1; fi

clean: ## remove the virtual environment and caches; runs and data stay
	rm -rf .venv .pytest_cache .ruff_cache .coverage
