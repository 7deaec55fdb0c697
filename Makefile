# clipcast: `make demo` shows it, `make test` proves it. Both make .venv first; nothing but Python 3.10+ is needed.
PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
BIN := $(VENV)/bin

.PHONY: demo test test-faults test-device check bench bench-load bench-inference bench-method bench-method-quick clean

demo: $(VENV)/.demo  ## run the whole system on this machine, e.g. make demo ARGS="--clients 2 --rounds 3"
	$(BIN)/clipcast demo $(ARGS)

test: $(VENV)/.dev  ## everything that needs no GPU
	$(BIN)/python -m pytest $(ARGS)

test-faults: $(VENV)/.dev  ## the full tier of the proofs in tests/faults, at most 75 minutes on two cores
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt --only-binary atheris -e '.[fuzz]' || \
	  echo "atheris cannot be installed here: the proof that needs it is skipped, and says so"
	$(BIN)/python -m pytest tests/faults --full $(ARGS)

test-device: $(VENV)/.dev  ## a device from an empty arm64 system on, under emulation; as root, with what .ci/run installs
	$(BIN)/python -m pytest tests/provisioning/test_board.py --device $(ARGS)

check: $(VENV)/.dev  ## what a contributor runs before a commit
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q $(ARGS)

bench: $(VENV)/.dev  ## the figures that README.md quotes
	$(BIN)/python benchmarks/round_overhead.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/frozen_blocks.py

bench-load: $(VENV)/.dev  ## a coordinator with hundreds of clients: overhead of a round, memory; about ten minutes on two cores
	$(BIN)/python -m benchmarks.load $(ARGS)

bench-inference: $(VENV)/.dev  ## answers of ViT-B/32 beside transformers, open_clip and plain ONNX Runtime; a few minutes, 5 GB of memory
	$(BIN)/python -m benchmarks.inference.run $(ARGS)

bench-method: $(VENV)/.dev  ## what each part of the method is worth: every table, about an hour on two cores
	$(BIN)/python benchmarks/method/run.py $(ARGS)

bench-method-quick: $(VENV)/.dev  ## one seed of the first table, a few minutes
	$(BIN)/python benchmarks/method/run.py --quick $(ARGS)

# Torch first and alone: on a machine with a build of its own for this version, pip takes that one.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt torch
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(BIN)/python -m pip install -q $(PIP_ARGS) -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) clipcast-demo clipcast-simulation dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
