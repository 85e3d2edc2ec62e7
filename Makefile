# Two commands matter: `make demo` shows the agent at work, `make test` proves that it works.
# Both install what they need (Debian or Ubuntu, as root) and touch nothing outside network namespaces of their own.

SHELL := /bin/sh
export PATH := $(HOME)/.cargo/bin:$(PATH):/usr/sbin:/sbin

CARGO ?= cargo
# Arguments of the demonstration, for example: make demo DEMO='--variant legacy --family 6'
DEMO ?=
# Arguments of the benchmark; --help lists them.
BENCH ?=
# Which faults `make mutants` seeds, for example: make mutants MUTANTS='--lists compiler,hosts'
MUTANTS ?=
# How many random histories `make histories` goes through: of the graph alone, and with packets at their end.
HISTORIES ?= 1000000
VERDICTS ?= 300000
# How many random worlds `make worlds` goes through, for each variant of iptables.
WORLDS ?= 5000
# How often `make kills` kills an agent, for each variant of iptables, and the seed of the moments. `make simulate` goes
# through the world of this seed alone, or begins with it if SIMULATE is given, too.
KILLS ?= 200
SEED ?= 1
# How many seconds every call of a table program takes in `make slow`.
SLOW ?= 60
# How many seconds `make clobber` lets somebody write back old tables, for each variant.
CLOBBER ?= 600
# How many events and faults `make simulate` goes through.
SIMULATE ?= 1000000

.PHONY: help demo test worlds kills clobber slow bench histories simulate mutants setup lint clean

help:
	@echo 'make demo    build, and show the agent enforcing security groups on real packets (root)'
	@echo "             options: make demo DEMO='--variant legacy|nft --family 4|6'"
	@echo 'make test    build, and run all tests (root; FELIX_TESTS=pure make test runs those that need no root)'
	@echo 'make worlds  send packets through many more random worlds than the tests do (WORLDS=n) (root)'
	@echo 'make kills   kill an agent 200 times under load (KILLS=n SEED=n), as the tests do 20 times (root)'
	@echo 'make clobber let somebody write back old tables for ten minutes (CLOBBER=seconds), as the tests do for 15 s (root)'
	@echo 'make slow    what needs patience: programs that take a minute a call (SLOW=seconds), an interface absent for ten (root)'
	@echo 'make bench   build, and write one JSON file of named results, target/bench.json (root)'
	@echo "             parts: make bench BENCH='--only label-index'; BENCH=--help lists them"
	@echo 'make histories  hold graph, program and policy against many more random histories (HISTORIES=n VERDICTS=n) than make test'
	@echo 'make simulate  run the agent core on a simulated kernel through a million events, faults and crashes (SIMULATE=n)'
	@echo '             one world again: make simulate SEED=n; others: make simulate SIMULATE=n SEED=first'
	@echo 'make mutants seed faults into graph, compiler and drivers, one at a time: every one must fail a test'
	@echo "             some of them: make mutants MUTANTS='--lists compiler,hosts' or MUTANTS='--only text'"
	@echo 'make setup   install what is missing: compiler, protoc, iptables, ipset, iproute2, etcd'
	@echo 'make lint    formatting, clippy and the architecture check'
	@echo 'make clean   remove what was built'

demo: setup
	$(CARGO) build --release --package agent --package felix-tests --bins
	$(CARGO) run --release --quiet --package felix-tests --bin demo -- $(DEMO)

# The agent's binary comes first: the end-to-end tests start it.
test: setup
	$(CARGO) build --workspace --bins
	$(CARGO) test --workspace --no-fail-fast
	$(CARGO) run --quiet --package xtask -- check

worlds: setup
	FELIX_WORLDS=$(WORLDS) $(CARGO) test --package felix-tests --test worlds -- --nocapture

kills: setup
	$(CARGO) build --package agent --bins
	FELIX_KILLS=$(KILLS) FELIX_SEED=$(SEED) $(CARGO) test --package felix-tests --test kill -- --nocapture

clobber: setup
	$(CARGO) build --package agent --bins
	FELIX_CLOBBER=$(CLOBBER) $(CARGO) test --package felix-tests --test locks -- --nocapture writes_back

slow: setup
	$(CARGO) build --package agent --bins
	FELIX_SLOW=$(SLOW) $(CARGO) test --package felix-tests --test upkeep -- --nocapture slow_programs
	FELIX_UNPLUGGED=640 $(CARGO) test --package felix-tests --test unplugged -- --nocapture

bench: setup
	$(CARGO) build --release --package agent --package felix-benches --bins
	$(CARGO) run --release --quiet --package felix-benches -- $(BENCH)

# The graph not as a release build: the assertions inside it count too, and what matters is optimised anyway.
histories: setup
	FELIX_HISTORIES=$(HISTORIES) $(CARGO) test --package graph --test properties -- --test-threads=1
	FELIX_HISTORIES=$(VERDICTS) $(CARGO) test --release --package compiler --test verdicts

# What is a choice of the caller, and what stands above.
GIVEN = $(filter-out file undefined,$(origin $(1)))

# Fast, and with the assertions inside it.
simulate: setup
	FELIX_SIMULATION=$(if $(call GIVEN,SEED),$(if $(call GIVEN,SIMULATE),$(SIMULATE),1),$(SIMULATE)) \
	$(if $(call GIVEN,SEED),FELIX_SIMULATION_SEED=$(SEED)) \
	$(CARGO) test --profile simulation --package felix-tests --test simulation -- --nocapture whatever_goes_wrong

# Builds and tests anew for every fault: most of an hour on two cores. One copy of the tree per job, below
# target/mutants; one run at a time; an interrupt ends it with all it started.
mutants: setup
	$(CARGO) run --quiet --package xtask -- mutants --jobs 2 $(MUTANTS)

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- --deny warnings
	$(CARGO) run --quiet --package xtask -- check

setup:
	@sh .ci/setup

clean:
	$(CARGO) clean
