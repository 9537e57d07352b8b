PYTHON ?= python3
VENV := .venv

.PHONY: help test lint
help: ## show the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/:/'

$(VENV)/.installed: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -q torch==2.14.1 torchvision==0.29.1
	$(VENV)/bin/python -m pip install -q -e ".[dev]"
	touch $@

test: $(VENV)/.installed ## install if needed and run the tests
	$(VENV)/bin/python -m pytest tests lightning_reg --doctest-modules

lint: $(VENV)/.installed ## ruff
	$(VENV)/bin/ruff check lightning_reg
