# Everything runs in a virtual environment of its own, made on first use with the pinned versions.
.DEFAULT_GOAL := help
.PHONY: help demo test test-faults check format bench clean

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable
MODEL ?=

help: ## show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo ## build a collection, fine-tune a model, rerank, report (MODEL=folder takes that model)
	$(BIN)/python -m jobs.demo $(if $(MODEL),--model $(MODEL))

test: $(VENV)/.test ## the test suite, two files at a time
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 30

test-faults: $(VENV)/.test ## long fault tests, with a real S3 server installed by apt (needs root)
	$(BIN)/python -m tests.support.s3 ceph install
	$(BIN)/python -m pytest -m faults

check: $(VENV)/.test ## formatting, lint, types, direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.test ## format the code
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test ## benchmarks, each against its baseline in one run
	$(BIN)/python -m tests.benchmarks.bench_inference
	$(BIN)/python -m tests.benchmarks.bench_pipeline
	$(BIN)/python -m tests.benchmarks.bench_training
	$(BIN)/python -m tests.benchmarks.bench_cluster

clean: ## remove the environment and what tools left
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) '.[demo]'
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	$(INSTALL) '.[demo,test]'
	@touch $@
