# Two commands: `make run` (the demo, real input to real answer) and `make test`. Each does its own set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: run test setup check clean

run: setup
	@$(BIN)/inference-gateway demo

test: setup
	$(BIN)/python -m pytest

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt hatch_build.py $(wildcard protos/gateway/v1/*.proto)
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip==26.3
	$(BIN)/python -m pip install --progress-bar on -c constraints.txt -e '.[local,dev]'
	@touch $@
