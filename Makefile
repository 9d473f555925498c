# Every target sets up what it needs. The first run makes a virtual environment in $(VENV), which takes a few minutes.
#
#   make quickstart [ARGS="--model NAME_OR_PATH --dataset NAME_OR_PATH"]
#   make test [ARGS="-k search"]     the quick tests        make test-all   with the slow ones
#   make test-gptq                   tests/gptq, which need GPTQModel: in $(VENV_GPTQ), with a torch of several GB
#   make test-engines                the engines for training in several processes, DeepSpeed among them: in $(VENV_ENGINES)
#   make test-oldest                 the quick tests with the oldest versions admitted: in $(VENV_OLDEST), PYTHON_OLDEST
#   make test-gpu                    tests/device on the first CUDA device, or on the one that PEFT_ELASTIC_TEST_DEVICE names
#                                    (cuda:1, xpu, mps, cpu, and "pretend", for machines without one); benchmarks/gpu.py has the times
#   make style                       reformat the code      make lint       what CI checks: ruff, mypy
#   make fuzz                        under ASan and UBSan: 200,000 damaged weights, 100,000 damaged inputs from Python
#   make bench [BENCH="training"]    benchmarks/*.py        make wheel      a wheel and a source archive in dist/
#   make clean                       remove what was made, all but the cache of models (see `peft-elastic info`)
#
# Variables: PYTHON (python3), VENV (.venv), ARGS, CONSTRAINTS (constraints.txt; empty for the newest versions), and for
# test-gptq VENV_GPTQ (.venv-gptq), CONSTRAINTS_GPTQ (constraints-gptq.txt), for test-engines VENV_ENGINES, DEEPSPEED, and for test-oldest PYTHON_OLDEST (python3.10),
# VENV_OLDEST (.venv-oldest), CONSTRAINTS_OLDEST (constraints-oldest.txt).

PYTHON ?= python3
VENV ?= .venv
VENV_GPTQ ?= .venv-gptq
VENV_ENGINES ?= .venv-engines
DEEPSPEED ?= deepspeed==0.19.8
PYTHON_OLDEST ?= python3.10
VENV_OLDEST ?= .venv-oldest
CONSTRAINTS ?= constraints.txt
CONSTRAINTS_GPTQ ?= constraints-gptq.txt
CONSTRAINTS_OLDEST ?= constraints-oldest.txt
ARGS ?=
BENCH ?= $(filter-out gpu,$(basename $(notdir $(wildcard benchmarks/*.py))))  # that one by its name, on a machine with a GPU

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_GPTQ := $(VENV_GPTQ)/.installed
INSTALLED_ENGINES := $(VENV_ENGINES)/.installed
INSTALLED_OLDEST := $(VENV_OLDEST)/.installed
SOURCES := peft_elastic tests benchmarks docs examples setup.py .ci
# One thread in each of the test processes: they share the cores.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8

.PHONY: bench clean fuzz install lint quickstart style test test-all test-engines test-gptq test-gpu test-oldest wheel
.DEFAULT_GOAL := test

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py $(CONSTRAINTS) peft_elastic/version.py $(wildcard csrc/* csrc/*/*)
	@echo "Installing into $(VENV), which takes a few minutes."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e ".[dev]"
	@touch $@

quickstart: $(INSTALLED)
	$(BIN)/peft-elastic quickstart $(ARGS)

test: $(INSTALLED)
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(INSTALLED)
	$(PYTEST) $(ARGS)

# GPTQModel wants a newer torch than the rest, so it has an environment of its own.
$(INSTALLED_GPTQ): pyproject.toml setup.py $(CONSTRAINTS_GPTQ) peft_elastic/version.py $(wildcard csrc/* csrc/*/*)
	@echo "Installing into $(VENV_GPTQ), which takes a few minutes and, with CUDA, 7 GB."
	@test -x $(VENV_GPTQ)/bin/python || $(PYTHON) -m venv $(VENV_GPTQ)
	@$(VENV_GPTQ)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS_GPTQ:%=-c %) -e ".[gptq]" pytest
	@touch $@

test-gptq: $(INSTALLED_GPTQ)
	OMP_NUM_THREADS=1 $(VENV_GPTQ)/bin/python -m pytest tests/gptq $(ARGS)

# DeepSpeed is no dependency, and is built by a setup.py that imports torch. Its operators in C++ and CUDA are left out.
$(INSTALLED_ENGINES): pyproject.toml setup.py $(CONSTRAINTS) peft_elastic/version.py $(wildcard csrc/* csrc/*/*)
	@echo "Installing into $(VENV_ENGINES), which takes a few minutes."
	@test -x $(VENV_ENGINES)/bin/python || $(PYTHON) -m venv $(VENV_ENGINES)
	@$(VENV_ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e . pytest setuptools wheel
	@DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(VENV_ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(CONSTRAINTS:%=-c %) --no-build-isolation "$(DEEPSPEED)"
	@touch $@

test-engines: $(INSTALLED_ENGINES)
	OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu $(VENV_ENGINES)/bin/python -m pytest tests/supernet/test_engines.py -rP $(ARGS)

# What the tests themselves need is the newest that these versions go with. torch of PyPI is one with CUDA, of several GB;
# PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has smaller ones.
$(INSTALLED_OLDEST): pyproject.toml setup.py $(CONSTRAINTS_OLDEST) peft_elastic/version.py $(wildcard csrc/* csrc/*/*)
	@echo "Installing into $(VENV_OLDEST), which takes a few minutes."
	@test -x $(VENV_OLDEST)/bin/python || $(PYTHON_OLDEST) -m venv $(VENV_OLDEST)
	@$(VENV_OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS_OLDEST) \
		-e ".[gguf]" hypothesis pybind11 pytest pytest-xdist scikit-learn "setuptools>=77.0.3"
	@touch $@

test-oldest: $(INSTALLED_OLDEST)
	OMP_NUM_THREADS=1 $(VENV_OLDEST)/bin/python -m pytest -n auto --maxprocesses 8 -m "not slow" $(ARGS)

# One process, for one device; `-rs` says what was skipped, and why.
test-gpu: $(INSTALLED)
	$(BIN)/python -m pytest -n 0 -rs tests/device $(ARGS)

fuzz: $(INSTALLED)
	PEFT_ELASTIC_FUZZ=200000 $(PYTEST) -n 0 tests/layers/test_levels.py -k fuzzing

style: $(INSTALLED)
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

lint: $(INSTALLED)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

bench: $(INSTALLED)
	set -e; for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py $(ARGS); done

wheel: $(INSTALLED)
	PEFT_ELASTIC_REQUIRE_EXT=1 $(BIN)/python -m build --outdir dist

clean:
	rm -rf $(VENV) $(VENV_GPTQ) $(VENV_OLDEST) $(VENV_ENGINES) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f peft_elastic/_C.*
	find peft_elastic tests benchmarks examples -name __pycache__ -prune -exec rm -rf {} +
