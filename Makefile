# Every target sets up what it needs: Python 3.11 or newer and make are enough.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: setup demo run lfw test test-long check docs audit versions bench golden

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "CDP needs Python 3.11 or newer, this is %s; try make PYTHON=python3.12" % sys.version.split()[0])'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY)         # a small run on synthetic faces, in under a minute
	$(BIN)/python -m pipelines.demo

run: $(READY)          # the whole pipeline on synthetic faces, with the default config
	$(BIN)/python -m pipelines.run --stage all

lfw: $(READY)          # the whole pipeline on real faces; set CDP_DATA_ROOT
	$(BIN)/python -m pipelines.run --stage all --config configs/lfw.yaml

test: $(READY)         # about ten minutes on two cores
	$(BIN)/python -m pytest -q --numprocesses 2 --dist loadfile

test-long: $(READY)    # the thorough versions
	$(BIN)/python -m pytest -q -m long

check: $(READY)        # style and types
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m mypy

docs: .venv/.docs      # the documentation as a site, in site/; a broken link is an error
	$(BIN)/python -m mkdocs build --strict

.venv/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	@touch $@

audit: $(READY)        # known vulnerabilities and licences of the dependencies
	test -x .venv/audit/bin/pip-audit || { $(PYTHON) -m venv .venv/audit && .venv/audit/bin/python -m pip install --quiet pip-audit; }
	$(BIN)/python .ci/audit.py .venv/audit/bin/python

versions:              # the lowest dependencies, and every Python from 3.11 on that is found
	.ci/versions

bench: $(READY)        # the clustering core against the published steps; see tests/benchmarks for the others
	$(BIN)/python -m tests.benchmarks.bench_default
	$(BIN)/python -m tests.benchmarks.bench_clustering

golden: $(READY)       # the same bits before and after a refactoring: the first call records, later ones compare
	$(BIN)/python -m tests.golden
