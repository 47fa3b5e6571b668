# Thin wrappers of what the README says. Each target does its own set-up in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup train test test-slow test-long test-schedules lint proto bench clean

# Tests start many interpreters, each of which would compile what it imports again.
unexport PYTHONDONTWRITEBYTECODE

# Where tests that run by themselves are (tests/tiers.py sees to it): the other files take longer to import.
ALONE = $(shell grep -l 'mark\.alone' tests/test_*.py)

setup: $(STAMP)

# torch is named in the same call as its constraint and everything else: pip then takes the CPU wheel.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0 -e '.[dev]'
	mkdir -p $(VENV)/checked && ln -sfn ../.. $(VENV)/checked/thinpipe  # for the types of benchmarks/
	touch $@

train: $(STAMP)
	$(BIN)/thinpipe up --stages 4 --model tiny --link 300mbit,25ms --out runs/train --overwrite

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright

# A file at a time, in the order of tests/tiers.py.
ALL_CORES := -n auto --dist loadfile --no-loadscope-reorder

# Every kind of thing at least once: four minutes on two quick cores, ten and more on slow ones. First what runs on all cores,
# then by themselves those that hold real time to figures.
test: lint
	$(BIN)/python -m pytest -m "not slow and not long and not alone" $(ALL_CORES) --durations 10
	$(BIN)/python -m pytest -m "alone and not slow and not long" --durations 10 $(ALONE)

# All the rest but pure repetition (test-long): more combinations, and the stories that real processes take a while to tell.
test-slow: $(STAMP)
	$(BIN)/python -m pytest -m "slow and not long and not alone" $(ALL_CORES) --durations 25
	$(BIN)/python -m pytest -m "slow and alone and not long" --durations 25 $(ALONE)

test-long: $(STAMP)
	$(BIN)/python -m pytest -m long

# Hundreds of random losses, cuts, pauses, damaged and full disks over a small swarm in memory.
test-schedules: $(STAMP)
	$(BIN)/python -m pytest -q -m long -n auto --dist load tests/test_losses.py

# The stubs are committed, so only someone who changes stage.proto needs this.
proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. protocol/stage.proto

clean:
	rm -rf build dist *.egg-info

# Ratios of one run each; a machine that does something else meanwhile spoils them.
bench: $(STAMP)
	$(BIN)/python benchmarks/efficiency.py
	$(BIN)/python benchmarks/overlap.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/startup.py

# All that wants a GPU, within 8 minutes and without a network; so it sets nothing up. Its Python needs torch for CUDA.
GPU_PYTHON ?= $(BIN)/python

.PHONY: gpu
gpu:
	$(GPU_PYTHON) benchmarks/gpu.py --out runs/gpu

# What a codec costs in loss where it matters: an hour of one core for each recipe, resumable.
.PHONY: quality
quality: $(STAMP)
	$(BIN)/python benchmarks/quality.py --preset compute-optimal --out runs/quality --plot runs/quality.png

# Hostile input, guided by coverage: FUZZ_RUNS inputs for each target, half an hour. FUZZ_TARGETS=frames: only that one.
FUZZ_RUNS ?= 1000000

.PHONY: fuzz
fuzz: $(STAMP)
	$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(BIN)/python -m tests.fuzz --runs $(FUZZ_RUNS) $(FUZZ_TARGETS)

# The swarm of docker-compose.yml on a real engine: as root, which gets one of its own; skipped with a reason elsewhere.
.PHONY: test-compose
test-compose: $(STAMP)
	$(BIN)/python -m tests.compose
