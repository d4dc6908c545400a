# What can be done with holo. Every target first makes sure that the machine has what it needs.
#
#   make demo             an unmodified program at a quarter of its memory, and what happened
#   make test             every suite: half an hour after the build
#   make test-fast        the fast suites: five minutes after the build
#   make soak MINUTES=n   the soak suites in turn for n minutes; ROUNDS=n: at most n rounds of each
#   make lint             formatting, lints, documentation, ignored tests, the core's purity, shell scripts
#   make mutate           known faults put back into the core, one at a time: does the simulation find each?
#                         NAMES='a b' for some of them, SEEDS=n for the most seeds of each
#   make bench            the figures of docs/benchmarks.md; ROUNDS=n for more of them, SAVE=file for JSON
#
# One suite, one case, the seed of a failure (the runner prints the line to type):
#   make test SUITE=name CASE=name HOLO_SEED=n

CARGO ?= cargo
MINUTES ?= 60

RUNNER := $(CARGO) run --quiet --release --package holo-tests --bin holo-test --
CHOICE := $(foreach suite,$(SUITE),--suite $(suite)) $(if $(CASE),--case '$(CASE)')

.PHONY: setup build demo test test-fast soak lint bench mutate

setup:
	@scripts/setup

build: setup
	@$(RUNNER) build

demo: setup
	@$(CARGO) build --release --workspace --bins
	@CARGO='$(CARGO)' scripts/demo

test: setup
	@$(RUNNER) run --tier full $(CHOICE)

test-fast: setup
	@$(RUNNER) run --tier fast $(CHOICE)

soak: setup
	@$(RUNNER) soak --minutes $(MINUTES) $(if $(ROUNDS),--rounds $(ROUNDS)) $(CHOICE)

lint: setup
	@scripts/lint

bench: setup
	@scripts/bench $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SAVE),--save '$(SAVE)')

mutate: setup
	@scripts/mutate $(if $(SEEDS),--seeds $(SEEDS)) $(NAMES)
