# Everything here sets itself up: a virtual environment in $(VENV) with the exact
# versions of requirements*.txt, made once and again only when one of them changes.
#
#   make demo     see it work
#   make test     run the tests          (PYTEST_ARGUMENTS="tests/qapi -k union" to choose)
#   make lint     ruff, mypy --strict, import-linter
#   make bench    compare with qemu-storage-daemon   (BENCH_ARGUMENTS=--quick for a short run)
#
# PYTHON chooses the interpreter that the environment is made with (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
DESTDIR ?=
UNITDIR ?= /etc/systemd/system
PYTEST_ARGUMENTS ?=
BENCH_ARGUMENTS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
RUNTIME := $(VENV)/.runtime-installed
TOOLS := $(VENV)/.tools-installed

.PHONY: demo test lint bench install-units clean
.DEFAULT_GOAL := demo

demo: $(RUNTIME)
	@$(BIN)/qmpd demo

test: $(TOOLS)
	@$(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(RUNTIME)
	@$(BIN)/python -m bench $(BENCH_ARGUMENTS)

# The units for systemd; with DESTDIR they go into a directory tree instead of the running system.
install-units:
	install -d $(DESTDIR)$(UNITDIR)
	install -m 644 contrib/systemd/qmpd.service contrib/systemd/qmpd.socket $(DESTDIR)$(UNITDIR)

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# Debian packs ensurepip apart (python3-venv); where it is missing, another pip can fill the environment.
$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "qmpd needs Python 3.11 or newer, and $(PYTHON) is not. Name one: make PYTHON=python3.11" >&2; exit 1; }
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then \
	    $(PYTHON) -m venv $(VENV); \
	elif $(PYTHON) -m pip --version >/dev/null 2>&1; then \
	    $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --quiet --python $@ install pip; \
	else \
	    echo "$(PYTHON) can make no virtual environment: it has neither ensurepip nor pip." \
	         "On Debian: apt-get install python3-venv" >&2; exit 1; \
	fi

$(RUNTIME): requirements.txt pyproject.toml | $(BIN)/python
	@echo "Setting up $(VENV) ..."
	@$(PIP) install --requirement requirements.txt
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(TOOLS): requirements-dev.txt $(RUNTIME)
	@echo "Setting up the tools of $(VENV) ..."
	@$(PIP) install --requirement requirements-dev.txt
	@touch $@
