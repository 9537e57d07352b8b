PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= quickstart
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help install train test lint bench bench-gpu clean

help: ## show this help
	@echo "lightning_reg: training-time regularization for any LightningModule"
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'
	@echo
	@echo '  make train EXPERIMENT=fashion_mnist ARGS="seed=1 logger=csv"'
	@echo '  experiments: $(basename $(notdir $(wildcard conf/experiment/*.yaml)))'

install: $(VENV)/.installed ## create .venv and install, once for each change of pyproject.toml

train: install ## train the quickstart, with and without regularization, and write a report
	$(BIN)/python -m experiments.train experiment=$(EXPERIMENT) $(ARGS)

test: lint ## ruff, mypy, and every test
	$(BIN)/python -m pytest -n 2 tests lightning_reg --doctest-modules $(ARGS)

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## what each callback costs in time and memory, on this machine
	$(BIN)/python -m experiments.benchmarks.overhead $(ARGS)

bench-gpu: install ## the same on a GPU, for larger models and for the kernels, and the page of its results
	$(BIN)/python -m experiments.benchmarks.steps --model vit gpt2-1k gpt2-4k gpt2-16k llama bag $(ARGS)
	$(BIN)/python -m experiments.benchmarks.steps --model vit gpt2-1k llama --mode compiled \
		--arms none entropy sigma density all entropy/usual sigma/usual density/usual all/usual $(ARGS)
	$(BIN)/python -m experiments.benchmarks.steps --growth length layers width \
		--arms none entropy sigma density all entropy/usual sigma/usual density/usual $(ARGS)
	$(BIN)/python -m experiments.benchmarks.attention
	@if [ $$($(BIN)/python -c 'import torch; print(torch.cuda.device_count())') -gt 1 ]; then \
		$(BIN)/torchrun --nproc-per-node 2 -m experiments.benchmarks.distributed; fi
	$(BIN)/python -m experiments.benchmarks.page

clean: ## remove .venv and all outputs
	rm -rf $(VENV) outputs

# torch first and pinned: what resolves it later might pick a build that does not fit torchvision
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make needs Python 3.11 or newer, $(PYTHON) is older: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "the venv module is missing: sudo apt-get install python3-venv"; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.14.1 torchvision==0.29.1
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@
