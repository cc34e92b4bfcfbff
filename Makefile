# `make run` serves Gemma 3 270M on this machine; `make test` checks everything. Both make .venv themselves.

VENV := .venv
BIN := $(VENV)/bin
# 3.11 to 3.13 first: the embedded Valkey has no build for 3.10. A name that is found may still not run
# (a version manager's shim), so each candidate is asked for its version.
CANDIDATES := python3.11 python3.12 python3.13 python3 python3.10
SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))
PYTHON = $(shell for p in $(CANDIDATES); do $$p -c '$(SUPPORTED)' 2>/dev/null && echo $$p && break; done)

.PHONY: help run test tour browser chaos fuzz format bench constraints clean

help:
	@echo "make run          fetch Gemma 3 270M and serve it on http://127.0.0.1:8000"
	@echo "make test         lint, types and tests"
	@echo "make tour         every supported call with OpenAI's, LiteLLM's and LangChain's newest clients"
	@echo "make browser      test the page in Chromium, which must be there; needs npm for axe-core"
	@echo "make chaos        5,000 jobs, 150 faults, nothing lost; at most 10 minutes"
	@echo "make fuzz         20 minutes of random requests, judged by the service's own description"
	@echo "make format       put the code in its standard form"
	@echo "make bench        measure the engine and the service, one JSON line each"
	@echo "make constraints  pin the newest versions that pyproject.toml allows"
	@echo "make clean        remove .venv and caches"

run: $(VENV)/.installed
	$(BIN)/wicore model fetch gemma-3-270m
	$(BIN)/wicore up

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 3 --dist worksteal

tour: $(VENV)/.installed-dev
	$(BIN)/python -m tests.tour

browser: $(VENV)/.installed-browser
	$(BIN)/python -m pytest tests/browser

chaos: $(VENV)/.installed-dev
	$(BIN)/python -m tests.chaos --jobs 5000 --faults 150 --seconds 570

fuzz: $(VENV)/.installed-dev
	$(BIN)/python -m tests.fuzz --seconds 1200

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/wicore bench engine
	$(BIN)/wicore bench service
	$(BIN)/python -m benchmarks.durability

constraints: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip compile --quiet --universal --python-version 3.10 --all-extras --upgrade \
	  --no-annotate --no-emit-index-url --custom-compile-command "make constraints" \
	  pyproject.toml --output-file constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .schemathesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.13 found; install one, or name it: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); echo "error: $(PYTHON) cannot make a virtual environment; \
	on Debian or Ubuntu: apt install python3-venv"; exit 1; }

# Installed again only when a dependency may have changed.
$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.installed

# For the page's tests alone: too large to be wanted by everybody who runs the others.
$(VENV)/.installed-browser: $(VENV)/.installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'playwright>=1.50'
	npm install --silent --no-save --no-audit --no-fund --prefix $(VENV)/browser axe-core@4
	@touch $@
