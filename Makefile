# Every target sets itself up in .venv; only Python 3.10+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Without an NVIDIA device the CPU build is enough. PyTorch's own CPU index is used where it answers; elsewhere
# pip takes the build that its configuration offers.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
export OMP_NUM_THREADS ?= 1

.PHONY: help demo test lint bench-tables docs clean
help:
	@echo "make demo   build four models, one of them backdoored, merge them and print accuracy and attack success"
	@echo "make test   lint, types, import rules and tests"
	@echo "make bench-tables  tables and figures of the benchmark anew from its result files"
	@echo "make docs   the documentation as a site, in build/site"
	@echo "make clean  remove .venv and everything that was built"

$(STAMP): constraints.txt setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ ! -e /dev/nvidia0 ] && $(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=3)" 2>/dev/null; \
		then $(BIN)/pip install -q --index-url $(CPU_INDEX) $(TORCH); \
		else $(BIN)/pip install -q $(TORCH); fi
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo]'
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

test: lint
	$(BIN)/python -m mergekit_dam.bench.tables --check
	$(BIN)/python -m pytest -n 2

bench-tables: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt 'matplotlib>=3.8'
	$(BIN)/python -m mergekit_dam.bench.tables --write

docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python -m mergekit_dam.reference
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist *.egg-info examples/demo/build
