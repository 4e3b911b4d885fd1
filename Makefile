# The developer's only interface; .ci/run calls the same targets.
PYTHON ?= python3
VENV ?= .venv
# torch goes in first and by itself, so that its build can be chosen. PyPI's Linux build brings CUDA; the small CPU one:
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= $(shell grep '^torch==' constraints.txt)
# More arguments for pytest or the server: make test ARGS="-m slow tests/test_sampling.py", make serve ARGS="--port 8000"
ARGS ?=

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help demo serve test check fmt clean distclean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.installed ## Install, then draw a grid of pictures into demo/ (offline, on the CPU)
	$(BIN)/sana-sprint demo -o demo/

serve: $(VENV)/.installed-serve ## Install, then serve the small model on http://127.0.0.1:7860 (ARGS="..." goes to it)
	$(BIN)/sana-sprint serve $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests (ARGS="..." goes to pytest)
	$(BIN)/python -m pytest $(ARGS)

check: $(VENV)/.installed-dev ## Check formatting, lint, types and architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_architecture.py

fmt: $(VENV)/.installed-dev ## Format the code and apply the linter's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove caches, built packages and the demo's pictures
	rm -rf demo build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## Also remove the virtual environment
	rm -rf $(VENV)

# The stamps say when each install was last complete, so that a second `make demo` starts at once.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install $(TORCH)
	$(PIP) install -q -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-serve: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[dev]'
	@touch $@
