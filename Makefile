# Every target's plain commands are in the README. `make help` lists the targets.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help demo train encoder test test-faults test-long bench check clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -r requirements.txt
	@touch $@

demo: .venv/installed ## draw shapes, train on them, write a grid of samples (about 5 minutes on 2 cores)
	$(BIN)/python prepare_data.py experiment=demo
	$(BIN)/python main.py experiment=demo

train: .venv/installed ## CIFAR-10: the recorded pipeline (dvc repro), under 10 minutes on 2 cores
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/dvc repro

encoder: .venv/installed ## train the classifier whose features stand in for Inception's (about 5 minutes on 2 cores)
	$(BIN)/python train_encoder.py overwrite=true
	$(BIN)/python train_encoder.py controls=true

test: .venv/installed ## all tests, with coverage
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/python -m pytest --cov=modeling
	$(BIN)/coverage report --include=modeling/training.py --fail-under=90

test-faults: .venv/installed ## faults: 100 kills, signals, full disks, hostile files (about 20 minutes); ends with the matrix
	$(BIN)/python -m pytest -m fault

test-long: .venv/installed ## tests that take minutes: speed, parity, every edit of the pipeline
	$(BIN)/python -m pytest -m "long and not fault"

bench: .venv/installed ## speed against other loops and the machine's limit (about 40 minutes); writes benchmark.md
	$(BIN)/python prepare_data.py
	$(BIN)/python benchmark.py

check: .venv/installed ## style
	$(BIN)/pip install -q -r requirements-dev.txt
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean: ## remove the virtual environment and caches; runs and data stay
	rm -rf .venv .pytest_cache .ruff_cache .coverage
