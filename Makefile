PYTHON ?= python3
BIN := .venv/bin
# Everything here runs offline but the installation and the demo's corpus.
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# What is compiled once and kept is not compiled by every process that the tests start.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long test-oldest lint bench clean

# A thread that waits for the others sleeps: where other work takes a core, one that spins slows a step sixfold.
demo: export OMP_WAIT_POLICY := passive
demo: .venv/installed  ## train, pack, reload, score and show a small 2:4 model: about 4 minutes on 2 cores
	$(BIN)/accelerate launch --config_file recipes/accelerate/one_process.yaml \
	    recipes/wmt_en_de.py recipes/configs/demo.yaml
	$(BIN)/python recipes/show_run.py outputs/demo

test: .venv/installed lint  ## the test suite but for what takes minutes, in two processes
	$(BIN)/pytest --numprocesses=2 --dist=worksteal

# Kills of whole studies, sanitizers over all units, damaged files by the ten thousand: before a release.
test-long: .venv/installed  ## what `make test` leaves out
	$(BIN)/pytest -m long

# The modules that touch other packages. Left out are arithmetic of our own, and tests that ask more of torch and
# transformers than the package does: what 2.9 warns of itself as it loads an export, arguments that came with 5.23.
OLDEST := bounds private_names layers quantizer compute loading saving round_trip sparse_model optimizer padding \
    sharded trainer training_arguments resuming pipeline metrics evaluation evaluate_metric cards averaging batching \
    hub corpus tokenizer losses plots run_logs chrf run_report report_page

# The lowest versions that pyproject.toml allows, in an environment of their own, on the Python that PYTHON names.
# On Linux this torch is the build for GPUs, 3 GB to fetch, unless PIP_EXTRA_INDEX_URL names an index with CPU builds.
test-oldest: .venv-oldest/installed  ## the quick part of the suite on the lowest versions: about 5 minutes
	.venv-oldest/bin/pytest $(OLDEST:%=tests/test_%.py)

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed  ## masks, layers, whole models and training steps: half an hour on a quiet machine
	$(BIN)/python -m benchmarks.masks
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.generate
	$(BIN)/python -m benchmarks.training

# torch first: its own line picks the build that the index has for this machine, and nothing later replaces it. pip
# would compile all modules on one core; some packages hold files that are no Python of this version, on purpose.
.venv/installed: pyproject.toml tests/constraints.txt hf_nmsparse/kernels/CMakeLists.txt $(wildcard hf_nmsparse/kernels/csrc/* hf_nmsparse/kernels/csrc/*/*)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile --constraint tests/constraints.txt torch==2.13.0
	$(BIN)/pip install --quiet --no-compile --constraint tests/constraints.txt --editable '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	touch $@

.venv-oldest/installed: pyproject.toml tests/constraints-oldest.txt hf_nmsparse/kernels/CMakeLists.txt $(wildcard hf_nmsparse/kernels/csrc/* hf_nmsparse/kernels/csrc/*/*)
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --constraint tests/constraints-oldest.txt --editable '.[plot,serve]' \
	    hypothesis packaging peft pytest sentencepiece tensorboard
	touch $@

clean:
	rm -rf .venv .venv-oldest outputs dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
