PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(shell find csrc build_support -type f -not -name '*.pyc')
CXX_SOURCES := $(filter csrc/%,$(SOURCES)) $(shell find tests/ptx/cuda -type f)

.PHONY: demo test quick lint bench gpu-check clean

demo: $(STAMP)
	$(BIN)/tokenfusion compare crossvit_15_240

test: lint
	$(PYTEST) tests

# Parity of each operator on each backend, fuse and the command line, in less than a minute on 2 cores.
quick: $(STAMP)
	$(PYTEST) @tests/quick.txt

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/ --benchmark-only

# Uses the packages of $(PYTHON) as they are and installs nothing. ARGS="--minutes 9 --out FOLDER", then the same with
# --resume, until nothing is left; docs/gpu.md says what comes when.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(ARGS)

# torch comes first, so that the extension is compiled against the torch that it runs beside. The installation is
# editable: Python sources need no reinstallation.
$(STAMP): pyproject.toml setup.py constraints.txt $(SOURCES)
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.exit(sys.version_info < (3, 10) and "tokenfusion needs Python 3.10 or newer, and $(PYTHON) is " + v + ": make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing torch and the other packages of constraints.txt (the first time: about 5 GB) ..."
	@$(PIP) install -qq -c constraints.txt torch setuptools ninja
	@echo "Compiling and installing tokenfusion ..."
	@$(PIP) install -qq -c constraints.txt --no-build-isolation -e '.[demo,lint,test]'
	@$(BIN)/tokenfusion info
	@touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .benchmarks .ruff_cache
	rm -f tokenfusion/_C*.so tokenfusion/_build_info.json
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
