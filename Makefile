# `make demo` and `make test` do all the set-up themselves, in the virtual environment $(VENV).

VENV ?= .venv
PYTHON ?= python3
# The build of torch to install: any release from 2.11 on; pinned, because an unpinned one may bring gigabytes of CUDA.
TORCH ?= torch==2.13.0
# The release of Transformers to install; empty for the newest.
TRANSFORMERS ?= transformers

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test lint format clean

demo: $(INSTALLED)  ## train a small dense Qwen, upcycle it, compare: about five minutes, no GPU, no network
	$(BIN)/python -m upcycled_moe.demo --out runs/demo

# Two workers with a thread each; files stay whole, as tests of one share what they set up.
test: $(INSTALLED)  ## the default test suite
	$(BIN)/python tests/conformance/fetch.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache build dist *.egg-info

$(INSTALLED): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	echo "$(TORCH)" > $(VENV)/constraints.txt
	$(BIN)/pip install --quiet --constraint $(VENV)/constraints.txt "$(TRANSFORMERS)" --editable ".[test,lint]"
	touch $@
