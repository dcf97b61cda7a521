# make demo   the whole study on the synthetic city, ends with the report's table
# make study  a study of studies/, as in make study STUDY=x3kd PROFILE=smoke WORKTREE=../x3kd (docs/studies.md)
# make quick  lint and types only, in seconds
# make test   lint, types and the test suite; DURATIONS=1 lists what took longest
# make test-all  make test, and what it leaves out: whole studies, twins of the paper-scale profiles
# make bench  the teacher-output store measured, in a few minutes (docs/benchmarks.md)
# make setup  the environment (the others call it; it does nothing when it is done)
# make ui     MLflow on http://127.0.0.1:5000
.DEFAULT_GOAL := help
.PHONY: help setup demo study quick test test-all lint bench ui up clean
SHELL := /bin/bash
# Every stage is a process of its own: without bytecode each would compile the same modules again.
unexport PYTHONDONTWRITEBYTECODE

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3,$(shell command -v $(p) 2>/dev/null)))
PY     := .venv/bin/python
# Setup is done when this file is there; its name changes with everything that setup reads.
# A machine with a GPU wants one of its own, since set-up chooses packages for GPUs there. It then leaves both, so that
# a machine without a GPU that shares the folder (a login node) does not put packages for CPUs in their place.
READY  := .venv/.ready-$(shell cat setup/* 2>/dev/null | cksum | cut -d' ' -f1)$(if $(or $(filter 1,$(FORCE_CUDA)),$(wildcard /dev/nvidia[0-9]*)),-gpu)
# Tests use two processes; more would only wait for each other's ray caster and solver threads on a small machine.
TEST_PROCESSES ?= 2

help:            ## this list
	@sed -n 's/^# make/make/p' Makefile

setup: $(READY)  ## virtual environment, locked pins, mmcv with ops, sparse convolution, mlflow tables

$(READY): | setup/setup.sh
	@PYTHON="$(PYTHON)" bash setup/setup.sh
	@rm -f .venv/.ready-* && touch $@ $(@:-gpu=)

demo: setup      ## the study of the parameters at demo size
	@$(PY) -m pipeline profile demo
	@$(PY) -m pipeline run
	@cat reports/table.txt

LAID := $(if $(PROFILE),--profile $(PROFILE))
study: setup     ## PROFILE is optional: the study names the one that it is meant for; WORKTREE is made where it is not there
	@test -n "$(STUDY)" || { $(PY) -m pipeline study; echo "which one? make study STUDY=..."; exit 2; }
	@test -z "$(WORKTREE)" || test -e "$(WORKTREE)" || $(PY) -m pipeline worktree "$(WORKTREE)" --study $(STUDY) $(LAID)
	@cd "$(or $(WORKTREE),.)" && $(PY) -m pipeline study $(STUDY) $(LAID) && $(PY) -m pipeline run && cat reports/table.txt

lint: setup
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

quick: lint      ## what to run before each commit (.pre-commit-config.yaml runs the same)

SUITE := .venv/bin/pytest -n $(TEST_PROCESSES) --dist loadgroup --no-loadscope-reorder $(if $(DURATIONS),--durations 30)
test: lint
	@$(SUITE) -m "not whole"

test-all: lint
	@$(SUITE)

BENCH := outputs/benchmarks
bench: setup     ## the tables of docs/benchmarks.md; numbers and pictures go to outputs/benchmarks
	@mkdir -p $(BENCH)
	@$(PY) benchmarks/store_read.py --rounds 3 --json $(BENCH)/store-read.json --chart $(BENCH)/store-read.svg
	@$(PY) benchmarks/store_step.py --rounds 20 --json $(BENCH)/store-step.json --chart $(BENCH)/store-step.svg
	@$(PY) benchmarks/store_size.py --json $(BENCH)/store-size.json --chart $(BENCH)/store-size.svg

ui: setup
	@$(PY) -m pipeline ui

up: setup
	@$(PY) -m pipeline up

clean:           ## what the pipeline made and git ignores; dvc.lock, the record in reports, MLflow's runs and the environment stay
	@rm -rf outputs .scratch logs reports/report.html reports/look-*.png reports/cost.json reports/stores
