# make round: sets up, prepares and runs one dual iteration on the embedded world. make test: the test suite.
PYTHON ?= python3
RECIPE ?= recipes/quickstart.yaml
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup init round run status report test test-all lint bench bench-quality bench-methods bench-fit bench-dual bench-one-shot bench-theory bench-kills bench-relabel bench-prepare clean
.DEFAULT_GOAL := round

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

init: setup
	@test -f $(RUN)/state.json || $(BIN)/cdpo init $(RECIPE) $(RUN)

round: init
	$(BIN)/cdpo round $(RUN)

run: init
	$(BIN)/cdpo run $(RUN)

status: setup
	@$(BIN)/cdpo status $(RUN)

report: setup
	$(BIN)/cdpo report $(RUN)

# Files in their own order: by default those with few tests come last, and the longest have few.
test: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The slow ones too: real runs killed, interrupted, launched over several processes.
test-all: setup
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m ""

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

# The tables of docs/benchmarks.md, measured anew (about 40 minutes on 2 cores).
bench: setup
	$(BIN)/python tests/bench_quickstart.py

# Ways of fitting on enumerable worlds at equal passes (about eight hours of one core; goes on where it stopped), and the adapter's own reach.
bench-quality: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_quality.py runs runs/bench-quality.jsonl
	$(BIN)/python tests/bench_quality.py table runs/bench-quality.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_ceiling.py

# The papers' methods beside ours, five seeds (100 runs, about two hours of one core; goes on where it stopped).
bench-methods: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_methods.py runs runs/bench-methods.jsonl
	$(BIN)/python tests/bench_methods.py report runs/bench-methods.jsonl --figures docs/figures

# Steps of a fit beside TRL's, without and with gradient checkpointing (8 minutes each beside other load, one core); sampling (5 minutes).
bench-fit: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_fit.py
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_fit.py --checkpointing
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_sampling.py

# Rounds of the dual steps, coverage of intervals and verdicts (simulated; about an hour on 2 cores), then real fits (hours; goes on where it stopped).
bench-dual: setup
	$(BIN)/python tests/bench_steps.py
	$(BIN)/python tests/bench_coverage.py
	$(BIN)/python tests/bench_dual.py fits runs/bench-dual.jsonl
	$(BIN)/python tests/bench_dual.py table runs/bench-dual.jsonl

# The one-shot dual beside gradient descent and L-BFGS-B (about 25 minutes, one core).
bench-one-shot: setup
	$(BIN)/python tests/bench_one_shot.py

# The tables and figures of docs/theory.md (4 minutes on one core, then 10 minutes of LoRA fits).
bench-theory: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_theory.py --output docs/figures
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_margins.py --output docs/figures
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_rank.py

# 100 kills, a full disk at many points, Ctrl-C in every phase (about an hour on 2 cores).
bench-kills: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_many.py --kills 100
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_many.py --interrupt
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill_many.py --disk-full

# 4 million scored responses under a new λ, beside datasets.map (about 15 minutes).
bench-relabel: setup
	$(BIN)/python tests/bench_relabel.py

# 30,000 prompts with two responses each: read, split, tokenized, validated (about 5 minutes on one core).
bench-prepare: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/bench_prepare.py

clean:
	rm -rf runs build *.egg-info
