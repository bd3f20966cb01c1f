# make quickstart: install into .venv, then compare methods on real digits.   make test: install, then all checks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Of quickstart: more options of benchmarks/methods.py, as OPTIONS='--max_steps 100'.
OPTIONS ?=
# Of bench-gpu: seconds in all, where the results go, and TINY=1 for toy sizes, which a CPU does in two minutes.
BUDGET ?= 420
OUT ?= runs/gpu
TINY ?=
# Of test-oldest: the oldest versions that setup.py promises.
PYTHON312 ?= python3.12
OLDEST_VENV ?= .venv-oldest
OLDEST_TORCH = 'torch==2.11.*' 'torchvision==0.26.*'
OLDEST = $(OLDEST_TORCH) deepspeed==0.19.8 timm==1.0.31 'nvidia-dali-$(CUDA)==2.4.*'
# DALI's wheel is per CUDA major version; cuda130 also serves machines without a GPU.
CUDA ?= $(shell nvidia-smi 2>/dev/null | grep -q 'CUDA Version: 12' && echo cuda120 || echo cuda130)

.PHONY: install quickstart test test-full test-gpu bench-gpu test-oldest test-slurm test-kills test-docs lint clean
.DEFAULT_GOAL := help

help:  ## show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/.installed: setup.py
	$(PYTHON) -c 'import sys; sys.exit("make: Python 3.11 or newer is needed: set PYTHON=") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install --quiet 'torch>=2.11' torchvision
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[$(CUDA),digits,plots,test,lint,fairscale]'
	touch $@

install: $(BIN)/.installed  ## install everything into .venv

quickstart: install  ## supervised, UDA, MPL with and without feedback, finetuned: on real digits, two ranks, ZeRO-2
	@echo "Five methods on 1,797 real digits, 500 steps each, on two ranks; some 4 minutes on two cores. Starting DeepSpeed."
	PATH="$(CURDIR)/$(BIN):$$PATH" DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --num_accelerators 2 benchmarks/methods.py \
		--ds_config ds_configs/digits.json --output runs/quickstart --set mpl_scale.phases.train.steps=500 $(OPTIONS)

# loadgroup, and no groups: each worker gets one test at a time. Both keep pools of ranks, 8 GB together.
TESTS = -m pytest -n 2 --dist loadgroup --durations 25 --ignore tests/test_kills.py

test: install  ## lint, types, layering, and a test of every promise
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/lint-imports
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(TESTS) -m 'not full'

test-full: install  ## further layouts, stages and launchers, kills under the launcher, the largest networks
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python $(TESTS) -m full

test-gpu: install  ## the tests that need a GPU
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest -m gpu -rs --durations 10

bench-gpu: install  ## everything else that needs a GPU, measured in BUDGET seconds; results in OUT
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.gpu_suite --budget $(BUDGET) --output $(OUT)/gpu_suite.json $(if $(TINY),--tiny)

$(OLDEST_VENV)/.installed: setup.py
	$(PYTHON312) -m venv $(OLDEST_VENV)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel
	$(OLDEST_VENV)/bin/python -m pip install --quiet $(OLDEST_TORCH)
	$(OLDEST_VENV)/bin/python -m pip install --quiet --no-build-isolation --editable '.[$(CUDA),digits,plots,test,fairscale]' $(OLDEST)
	touch $@

test-oldest: $(OLDEST_VENV)/.installed  ## both of them on Python 3.12 and the oldest packages promised
	PATH="$(CURDIR)/$(OLDEST_VENV)/bin:$$PATH" $(OLDEST_VENV)/bin/python $(TESTS)

test-slurm: install  ## the batch scripts on a real Slurm, installed (Debian, root) and started on this machine
	PATH="$(CURDIR)/$(BIN):$$PATH" MPL_SCALE_TEST_SLURM=1 $(BIN)/python -m pytest tests/slurm

test-kills: install  ## one chain of runs of two ranks, killed 30 times, ends bitwise as if it had not been
	PATH="$(CURDIR)/$(BIN):$$PATH" MPL_SCALE_TEST_KILLS=30 $(BIN)/python -m pytest -s tests/test_kills.py

test-docs: install  ## every command of README.md and docs/, in a fresh clone; long runs shortened
	PATH="$(CURDIR)/$(BIN):$$PATH" MPL_SCALE_TEST_DOCS=1 $(BIN)/python -m pytest -s tests/test_docs.py

lint: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports && $(BIN)/mypy

clean:  ## remove the environment and all runs
	rm -rf $(VENV) $(OLDEST_VENV) runs build *.egg-info
