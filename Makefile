# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up what they use, both may be repeated.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test lint format bench bench-diff constraints clean
help:
	@echo "make demo         install what the product needs, make a sample shop and plan its first night"
	@echo "make test         install what the tests need and run them all"
	@echo "make lint         ruff and mypy --strict"
	@echo "make bench        the benchmarks of docs/experiments.md"
	@echo "make constraints  write the installed versions to constraints.txt"

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.product: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.product

demo: $(VENV)/.product
	$(BIN)/catalog-embed init demo
	$(BIN)/catalog-embed -c demo/catalog-embed.yaml plan --since beginning --sample 3

test: $(VENV)/.dev
	$(BIN)/pytest $(TESTS)

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.dev
	$(BIN)/python -m tests.bench.bench_sample --rows 1000000
	$(BIN)/python -m tests.bench.bench_normalize
	$(BIN)/python -m tests.bench.bench_text
	$(BIN)/python -m tests.bench.bench_diff --rows 10000000

constraints: $(VENV)/.dev
	(head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
