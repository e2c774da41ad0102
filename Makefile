# Needs make, Python 3.11 or newer and a package index. Everything goes into .venv, which is made on first use.
# VENV_FLAGS=--copies helps on file systems without symbolic links; ARGS='...' is handed on to pytest and uv.
PYTHON ?= python3
VENV ?= .venv
IMAGE ?= chatproxy
BIN = $(VENV)/bin
# Without bytecode, which takes two seconds: Python makes that of what is imported.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check
COMPILE = $(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header pyproject.toml

.DEFAULT_GOAL = help
.PHONY: help install run doctor check format test cover bench image up smoke lock ci

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' Makefile

install: $(VENV)/.run  ## Make .venv with the locked requirements of the service

run: $(VENV)/.run  ## Serve on port 8000 of this machine and reload on change; without a key, Grok is a built-in demo
	$(BIN)/python -m chatproxy --reload --local

doctor: $(VENV)/.run  ## Say what is wrong with a deployed service: make doctor URL=https://chat.example.com
	$(BIN)/python -m chatproxy doctor $(URL) $(ARGS)

check: $(VENV)/.dev  ## Format, lint and types; Dockerfile and compose file where their tools are installed
	$(BIN)/ruff format --check && $(BIN)/ruff check && $(BIN)/mypy
	@! command -v hadolint >/dev/null || hadolint Dockerfile
	@! docker compose version >/dev/null 2>&1 || docker compose --profile '*' config --quiet

format: $(VENV)/.dev  ## Format the code and mend what the linter can
	$(BIN)/ruff check --fix; $(BIN)/ruff format

test: $(VENV)/.dev  ## Run the tests; what needs a browser or a proxy is skipped where there is none
	$(BIN)/python -m pytest $(ARGS)

cover: $(VENV)/.dev  ## Run the tests and demand that every branch of the package was taken
	$(BIN)/coverage erase && $(BIN)/coverage run -m pytest $(ARGS)
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report

bench: $(VENV)/.dev  ## Measure the cost of a token
	$(BIN)/python -m tests.bench $(ARGS)

image:  ## Build the container image
	docker build --tag $(IMAGE) .

up:  ## Build and start the container with compose, and wait until it is healthy
	docker compose up --build --detach --wait

smoke:  ## Build the image and try it, where a container engine is running
	tests/container/smoke.sh

lock:  ## Pin the requirements anew (ARGS=--upgrade for newer versions)
	$(PIP_INSTALL) uv
	$(COMPILE) $(ARGS) --output-file requirements.txt
	$(COMPILE) $(ARGS) --group dev --constraints requirements.txt --output-file requirements-dev.txt

ci: check smoke cover  ## Everything a change has to pass

$(BIN)/pip:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("chatproxy needs Python 3.11 or newer: make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

$(VENV)/.run: requirements.txt | $(BIN)/pip
	$(PIP_INSTALL) --require-hashes --requirement $< && touch $@

$(VENV)/.dev: requirements-dev.txt | $(BIN)/pip
	$(PIP_INSTALL) --require-hashes --requirement $< && touch $@
