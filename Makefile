# Everything here works from a clean clone with Python 3.11, make, gcc and a package index.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup demo test lint compat bench clean

# The model that `make demo` and `make bench` serve: a folder, or a name on a model hub.
MODEL ?= build/models/SmolLM2-135M-Instruct

help:
	@echo "make setup  prepare .venv with the commands vllm, vllm-sarathi and autolrs (does nothing when up to date)"
	@echo "make demo   serve a real model twice, stock and Sarathi, and compare (MODEL=folder-or-name for your own)"
	@echo "make test   check style and types, then run the tests"
	@echo "make lint   check style and types"
	@echo "make compat check each supported vLLM in an environment of its own, and write the table of them in docs/compatibility.md"
	@echo "make bench  measure: overhead, who keeps the promise under load, rehearsals, AutoLRS (about an hour, quiet machine)"
	@echo "make clean  remove what was built and measured; .venv stays"

setup:
	@.ci/setup

demo: setup
	@.venv/bin/vllm-sarathi demo --model "$(MODEL)" --out build/demo

lint: setup
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy vllm_sarathi autolrs_plugin

test: lint
	.venv/bin/pytest

compat:
	@.ci/compat $(VERSIONS)

bench: setup
	@mkdir -p build/bench
	@.venv/bin/vllm-sarathi bench overhead --json build/bench/overhead.json
	@.venv/bin/vllm-sarathi bench live --quick --model "$(MODEL)" --json build/bench/live.json
	@.venv/bin/vllm-sarathi bench simulator
	@.venv/bin/vllm-sarathi validate --json build/bench/validate.json
	@.venv/bin/vllm-sarathi paper --quick --out build/bench/paper --json build/bench/paper.json
	@.venv/bin/autolrs bench --task mnist-resnet,stdlib-gpt,bert-mlm --json build/bench/autolrs.json
	@.venv/bin/autolrs bench-overhead
	@.venv/bin/autolrs bench-parallel --json build/bench/parallel.json

clean:
	rm -rf build .pytest_cache .mypy_cache .ruff_cache .hypothesis
