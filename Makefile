# make demo       a dataset and a picture of it, from nothing, in minutes
# make test       tests, lint, types: what CI runs
# make test-all   also the slow tests
# make venv       the environment alone
# make lock       write requirements.lock again

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
DEMO := out/demo

.PHONY: demo venv test test-all lint lock

demo: venv
	@test -f $(DEMO)/dataset.yaml || $(BIN)/seedloom init $(DEMO)
	$(BIN)/seedloom build $(DEMO)/dataset.yaml
	$(BIN)/seedloom verify --deep $(DEMO)/out
	@$(BIN)/seedloom show $(DEMO)/out --out $(DEMO)/contact_sheet.png > /dev/null
	@echo
	@echo "shards and Parquet:  $$(echo $(DEMO)/out/builds/*/shards)"
	@echo "picture:             $(DEMO)/contact_sheet.png"
	@echo "config:              $(DEMO)/dataset.yaml"

venv: $(INSTALLED)

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make venv PYTHON=python3.12"; exit 2; }
	@echo "installing into $(VENV): some 6 GB with torch, a few minutes the first time"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# One thread a process: tests start workers of their own, and threads beyond the cores starve each other.
test test-all: export OMP_NUM_THREADS = 1

test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not gpu"

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

lock:
	uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header --quiet -o requirements.lock
