# Everything here sets itself up: a virtual environment in $(VENV) with the exact
# versions of requirements*.txt, made once and again only when one of them changes.
#
#   make demo     see it work
#   make test     run the tests          (PYTEST_ARGUMENTS="tests/qapi -k union" to choose)
#   make lint     ruff, mypy --strict, import-linter
#   make bench    compare with qemu-storage-daemon and nbdkit, and write the results into docs/
#                 (BENCH_ARGUMENTS=--quick for a short run that writes nothing)
#
#   make install install-units      as root: into $(PREFIX), with units for systemd
#
# PYTHON chooses the interpreter that the environment is made with (3.11 or newer).

PYTHON ?= python3
VENV ?= .venv
PREFIX ?= /opt/qmpd
DESTDIR ?=
PYTEST_ARGUMENTS ?=
BENCH_ARGUMENTS ?= --write

BIN := $(VENV)/bin
PIP := -m pip --quiet --disable-pip-version-check
RUNTIME := $(VENV)/.runtime-installed
TOOLS := $(VENV)/.tools-installed
PLOTTING := $(VENV)/.plotting-installed

.PHONY: demo test lint bench install install-units clean
.DEFAULT_GOAL := demo

demo: $(RUNTIME)
	@$(BIN)/qmpd demo

test: $(TOOLS)
	@$(BIN)/python -m pytest $(PYTEST_ARGUMENTS)

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(PLOTTING)
	@$(BIN)/python -m bench $(BENCH_ARGUMENTS)

# An environment of its own, with the same exact versions.
install:
	rm -rf build
	$(PYTHON) -m venv $(PREFIX)
	$(PREFIX)/bin/python $(PIP) install --requirement requirements.txt
	$(PREFIX)/bin/python $(PIP) install --no-deps --no-build-isolation .

# The units, and the user that they run qmpd as; with DESTDIR into a directory tree.
install-units:
	install -d $(DESTDIR)/etc/systemd/system $(DESTDIR)/usr/lib/sysusers.d
	sed 's|^ExecStart=/usr/bin/qmpd|ExecStart=$(PREFIX)/bin/qmpd|' contrib/systemd/qmpd.service \
	    > $(DESTDIR)/etc/systemd/system/qmpd.service
	install -m 644 contrib/systemd/qmpd.socket $(DESTDIR)/etc/systemd/system
	install -m 644 contrib/systemd/qmpd.sysusers $(DESTDIR)/usr/lib/sysusers.d/qmpd.conf

clean:
	rm -rf .guest $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

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
	@$(BIN)/python $(PIP) install --requirement requirements.txt
	@$(BIN)/python $(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(TOOLS): requirements-dev.txt $(RUNTIME)
	@echo "Setting up the tools of $(VENV) ..."
	@$(BIN)/python $(PIP) install --requirement requirements-dev.txt
	@touch $@

$(PLOTTING): requirements-bench.txt $(RUNTIME)
	@echo "Setting up what the benchmark's plot is drawn with ..."
	@$(BIN)/python $(PIP) install --requirement requirements-bench.txt
	@touch $@
