# A fresh machine needs Python 3.11, git and make; everything else goes into .venv.
PYTHON ?= python3.11
# an index with CPU builds of torch, if you want one: make demo TORCH_INDEX=URL
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lab studio bench clean

help:
	@echo "make demo   set up, train tiny on digits-sum beside two controls, write a report"
	@echo "make test   set up, run the tests"
	@echo "make lab    set up, open JupyterLab on the notebooks"
	@echo "make studio set up, start the apps, which say their address; a recorded run is on screen"
	@echo "make bench  set up, run the benchmarks"

.venv/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found; name yours: make PYTHON=python3"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.core: constraints.txt pyproject.toml | .venv/bin/python
	$(if $(TORCH_INDEX),$(PIP) torch --extra-index-url $(TORCH_INDEX))
	@echo "installing (PyTorch and friends; this can take minutes) ..."
	$(PIP) -e .
	@touch $@

.venv/.dev: .venv/.core
	$(PIP) -e '.[dev]'
	@touch $@

.venv/.lab: .venv/.core
	$(PIP) -e '.[lab]'
	@touch $@

.venv/.apps: .venv/.core
	$(PIP) -e '.[apps]'
	@touch $@

demo: .venv/.core
	$(BIN)/rlworkbench demo --force

test: .venv/.dev
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests -n 2 --dist loadfile

lab: .venv/.lab
	$(BIN)/jupyter lab --ip=127.0.0.1 nbs

studio: .venv/.apps
	$(BIN)/rlworkbench studio

bench: .venv/.dev
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf .venv build dist *.egg-info
