# Everything here works from a clean clone with Python 3.11, make, gcc and a package index.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test soak lint coverage docs compat bench bench-compare clean

# The model that `make demo` and `make bench` serve: a folder, or a name on a model hub.
MODEL ?= build/models/SmolLM2-135M-Instruct

# `make test`: processes; the tests of one file, which share an engine or a server, stay in one of them.
WORKERS ?= 2

# `make soak`: requests through the scheduler, and how long a real server is sent requests at the least, seconds.
SOAK_REQUESTS ?= 100000
SOAK_S ?= 3300

# What `make bench-compare` compares: the last release's rows, and the latest of `make bench`.
OLD ?= bench/baselines
NEW ?= $(lastword $(sort $(wildcard build/bench/2*)))
BENCH := build/bench/$(shell date +%Y-%m-%dT%H%M)

# The quick tests of what decides; `make test` runs all.
CORE_TESTS := tests/core $(addprefix tests/autolrs/test_,config.py controller.py export.py find.py forecast.py \
  journal.py ledger.py plans.py posterior.py schedule.py search.py staged.py watch.py)

help:
	@echo "make setup  prepare .venv with the commands vllm, vllm-sarathi and autolrs (does nothing when up to date)"
	@echo "make demo   serve a real model twice, stock and Sarathi, and compare (MODEL=folder-or-name for your own)"
	@echo "make test   check style and types, then run the tests"
	@echo "make lint   check style and types"
	@echo "make soak   100,000 requests through the scheduler, and an hour of faults against a real server"
	@echo "make coverage  how much of the two core packages their own tests run; fails below the floor (two minutes)"
	@echo "make docs   build the documentation in build/site; a warning or a broken link is an error"
	@echo "make compat check each supported vLLM in an environment of its own, and write the table of them in docs/compatibility.md"
	@echo "make bench  measure, into a dated folder of build/bench: overhead, SLOs under load, simulation, AutoLRS (an hour)"
	@echo "make bench-compare  ratios of two such folders, with their noise (OLD=bench/baselines NEW=the latest)"
	@echo "make clean  remove what was built and measured; .venv stays"

setup:
	@.ci/setup

demo: setup
	@.venv/bin/vllm-sarathi demo --model "$(MODEL)" --out build/demo

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy vllm_sarathi autolrs_plugin tests

test: lint
	.venv/bin/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# The quick forms of both are in `make test`.
soak: setup
	SOAK_REQUESTS=$(SOAK_REQUESTS) .venv/bin/pytest -s tests/soak/test_scheduler.py
	SOAK_SERVER_REQUESTS=2000 SOAK_S=$(SOAK_S) .venv/bin/pytest -s tests/soak/test_server.py

coverage: setup
	.venv/bin/coverage run -m pytest -q -m "not slow" $(CORE_TESTS)
	.venv/bin/coverage report

docs: setup
	@.ci/docs

compat:
	@.ci/compat $(VERSIONS)

bench: setup
	@mkdir -p "$(BENCH)"
	@.venv/bin/vllm-sarathi bench overhead --json "$(BENCH)/overhead.json"
	@.venv/bin/vllm-sarathi bench live --workload short --workload mix --tbt-slo-ms 250 \
	  --schedulers sarathi,default,default@256 --model "$(MODEL)" --json "$(BENCH)/live.json"
	@.venv/bin/vllm-sarathi bench simulator --json "$(BENCH)/simulator.json"
	@.venv/bin/vllm-sarathi validate --json "$(BENCH)/validate.json"
	@.venv/bin/vllm-sarathi paper --quick --out build/bench-paper --json "$(BENCH)/paper.json"
	@.venv/bin/autolrs bench --task mnist-resnet,stdlib-gpt,bert-mlm --json "$(BENCH)/autolrs.json"
	@.venv/bin/autolrs bench-overhead --json "$(BENCH)/adapters.json"
	@.venv/bin/autolrs bench-parallel --json "$(BENCH)/parallel.json"
	@echo "the rows are in $(BENCH)"

bench-compare: setup
	@[ -n "$(NEW)" ] || { echo "build/bench has no rows yet: run make bench first, or give NEW=FOLDER" >&2; exit 1; }
	@.venv/bin/vllm-sarathi bench compare "$(OLD)" "$(NEW)"

clean:
	rm -rf build .coverage .pytest_cache .mypy_cache .ruff_cache .hypothesis
