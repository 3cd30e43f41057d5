# The front door. Every target is one call of apex or of tox, in a virtual environment of the project's own.
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed

# make build GPU=dgx-spark; GPU="h100 rtx4090"; GPU=all-common. Without GPU: for those of this machine, for the CPU where there is none.
BUILD  := apex build $(foreach name,$(GPU),--gpu $(name))

.PHONY: help build demo test lint clean

help:
	@echo "make build   fetch, verify, patch and compile llama.cpp's tools; GPU=dgx-spark for a GPU that is elsewhere"
	@echo "make demo    the whole road on a small model: build, calibrate, quantize, compare"
	@echo "make test    the tests, on the real tools"
	@echo "make lint    ruff and mypy"

build: $(STAMP)
	$(VENV)/bin/$(BUILD)

demo: $(STAMP)
	$(VENV)/bin/apex demo

test: $(STAMP)
	$(VENV)/bin/tox run

lint: $(STAMP)
	$(VENV)/bin/tox run -e lint,types

$(STAMP): pyproject.toml
	@echo "installing apex-build and the build tools it needs into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .tox demo dist
