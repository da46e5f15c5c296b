PYTHON ?= python3
BIN := .venv/bin
# Everything here runs offline but the installation and the demo's corpus.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint bench clean

demo: .venv/installed  ## train, pack, reload and score a small 2:4 model: about 10 minutes on 2 cores
	$(BIN)/accelerate launch --config_file recipes/accelerate/one_process.yaml \
	    recipes/wmt_en_de.py recipes/configs/demo.yaml

test: .venv/installed lint  ## the whole test suite, in two processes
	$(BIN)/pytest --numprocesses=2 --dist=worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## masks, layers, whole models and training steps: half an hour on a quiet machine
	$(BIN)/python -m benchmarks.masks
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.training

# torch first: its own line picks the build that the index has for this machine, and nothing later replaces it.
.venv/installed: pyproject.toml tests/constraints.txt hf_nmsparse/kernels/CMakeLists.txt $(wildcard hf_nmsparse/kernels/csrc/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint tests/constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --constraint tests/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv outputs dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
