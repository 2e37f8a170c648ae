# Two commands, each with its own set-up: a machine with Python and make needs nothing else.
#   make demo   fine-tune, roll out and report on the embedded recordings (about 2 minutes on 2 cores, after installing)
#   make test   lint, types and tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
GL_PACKAGES := libegl1 libgl1 libopengl0 libgl1-mesa-dri libosmesa6

.DEFAULT_GOAL := help
.PHONY: help demo test

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.core
	$(BIN)/ivideogpt demo --out runs/demo

test: $(VENV)/.dev $(VENV)/.gl
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses=2 --dist=worksteal $(PYTEST_ARGS)

# A stamp is newer than pyproject.toml once its packages are in, so that a second run installs nothing.
$(VENV)/.core: pyproject.toml | $(VENV)/.created
	@echo "Installing ivideogpt into $(VENV); with PyTorch that takes some minutes and 6 GB, once."
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.created
	@echo "Installing ivideogpt and its test tools into $(VENV); with PyTorch that takes some minutes and 6 GB, once."
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $(VENV)/.core $@

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	@touch $@

# The simulator's tests render without a screen, through EGL or OSMesa; where neither can be had they are skipped.
$(VENV)/.gl: | $(VENV)/.created
	@if ldconfig -p 2>/dev/null | grep -qE 'libEGL\.so\.1|libOSMesa\.so'; then touch $@; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "Installing $(GL_PACKAGES)"; \
	  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends $(GL_PACKAGES); } \
	    >$(VENV)/gl.log 2>&1 && touch $@ || echo "That failed ($(VENV)/gl.log says why): simulator tests will be skipped."; \
	else echo "Neither EGL nor OSMesa is installed ($(GL_PACKAGES)): simulator tests will be skipped."; fi
