# The front door. Every target runs in a virtual environment of the project's own.
PYTHON ?= python3
VENV   := .venv
STAMP  := $(VENV)/.installed

# make build GPU=dgx-spark; GPU="h100 rtx4090"; GPU=all-common.
# Without GPU: for this machine's GPUs, or the CPU if it has none.
BUILD  := apex build $(foreach name,$(GPU),--gpu $(name))

.PHONY: help build demo test test-fast test-all lint dist clean

help:
	@echo "make build   fetch, verify, patch and compile llama.cpp's tools; GPU=dgx-spark for a GPU that is elsewhere"
	@echo "make demo    all steps on a small model: build, calibrate, quantize, compare"
	@echo "make test    lint, and the tests with the real tools; PIN=latest: the main ones with that pin's tools"
	@echo "make test-fast   the tests that need neither the tools nor a package index, and are quick"
	@echo "make test-all    lint, and the tests on every Python that is installed"
	@echo "make lint    ruff and mypy"
	@echo "make dist    sdist and wheel in dist/; tries the wheel in a fresh environment"

build: $(STAMP)
	$(VENV)/bin/$(BUILD)

demo: $(STAMP)
	$(VENV)/bin/apex demo

# make test PIN=latest: the tests of the patches and of the main steps, with the tools of another pin
ROAD   := tests/patches tests/calibration/test_run.py tests/quantization/test_quantize.py \
          tests/evaluation/test_draft_head.py

ifdef PIN
test: $(STAMP)
	APEX_PIN=$(PIN) $(VENV)/bin/python -m pytest $(ROAD)
else
test: lint
	$(VENV)/bin/python -m pytest
endif

test-fast: $(STAMP)
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 4 -m "not tools and not network and not slow"

test-all: lint
	$(VENV)/bin/tox run

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/mypy tests/conversion/conftest.py
	$(VENV)/bin/mypy tests/policy/conftest.py
	$(VENV)/bin/mypy tests/toolchain/conftest.py

# The wheel is made from the sdist, so both are tried. Planning needs the tools: make build.
dist: $(STAMP)
	rm -rf dist
	$(VENV)/bin/python -m build --outdir dist .
	$(PYTHON) -m venv dist/tried
	dist/tried/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	dist/tried/bin/apex --help
	dist/tried/bin/apex doctor
	dist/tried/bin/apex plan tests/testbed/testbed-f16.gguf --policy compact
	dist/tried/bin/apex plugins new policy tried-policy -o dist/tried
	dist/tried/bin/python -m pip install --quiet --disable-pip-version-check pytest
	cd dist/tried && bin/python -m pytest -q tried-policy
	rm -rf dist/tried

$(STAMP): pyproject.toml
	@echo "installing apex-build and the build tools it needs into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) .tox demo dist
