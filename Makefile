# Everything needed is set up in .venv on first use; `make clean` removes it.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-fast test-adapters check docs reference readme audit clean

demo: .venv/ready-run
	$(BIN)/python -m mergelab method=ties task=rte

test: .venv/ready-dev check
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

# What a contributor runs before every commit: without the tests marked slow.
test-fast: .venv/ready-dev
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal -m "not slow"

# What needs the Adapters library, which trains, saves and loads adapters in an environment of its own with an older
# transformers; merging is done in .venv, which has neither.
test-adapters: .venv-adapters/ready .venv/ready-run
	.venv-adapters/bin/python -m pytest --confcutdir tests/adapterhub tests/adapterhub

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml mergelab hydra_plugins

# The site, in site/; a warning is an error (with --quiet, --strict would not see it).
docs: .venv-docs/ready
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# The pages that are made from the code: methods, configuration, the configuration's JSON Schema.
reference: .venv/ready-run
	$(BIN)/python -m docs.scripts.reference

# What the commands print that README.md and the pages show; takes some minutes.
readme: .venv/ready-run
	$(BIN)/python -m docs.scripts.printed

# Known vulnerabilities of what is installed; asks a server, so that it is no part of `make check`.
audit: .venv/ready-dev
	$(BIN)/pip install --quiet pip-audit
	$(BIN)/pip-audit

# A new environment is made of exactly the versions in constraints.txt.
.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/ready-run: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ .venv/ready-run

.venv-adapters/ready: constraints-adapters.txt
	$(PYTHON) -m venv .venv-adapters
	.venv-adapters/bin/pip install --quiet --constraint constraints-adapters.txt adapters torch pytest
	touch $@

# The extra `docs` alone, without mergelab and what it needs: pages are made from its source.
.venv-docs/ready: pyproject.toml constraints-docs.txt
	$(PYTHON) -m venv .venv-docs
	$(PYTHON) -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); \
		print(*p["project"]["optional-dependencies"]["docs"], sep="\n")' > .venv-docs/requirements.txt
	.venv-docs/bin/pip install --quiet --constraint constraints-docs.txt --requirement .venv-docs/requirements.txt
	touch $@

clean:
	rm -rf .venv .venv-adapters .venv-docs site
