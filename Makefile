# Every target sets up what it needs, from nothing. ARGS are passed on: make demo ARGS="--preference structured".

.DEFAULT_GOAL := help
.SHELLFLAGS := -euo pipefail -c
SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
ARGS ?=

STUBS := thumbwheel/v1
GOLDEN := proto/golden/v0.1.binpb

# Writes the stubs of proto/ below the folder $(1).
protoc = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto --python_out=$(1) \
	--grpc_python_out=$(1) --mypy_out=quiet:$(1) --mypy_grpc_out=quiet:$(1) proto/thumbwheel/v1/*.proto

.PHONY: help
help: ## Say what there is to make
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / { printf "  make %-17s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install everything into .venv; does only what has not been done
	@$(PYTHON) -c '' 2>/dev/null || { echo "setup: $(PYTHON) is not there. On Debian 12 type: sudo apt-get install" \
		"python3.11 python3.11-venv python3.11-dev g++; elsewhere take it from python.org or pyenv." >&2; exit 1; }
	@$(PYTHON) requirements/install.py

.PHONY: tools
tools: setup ## Install the tools that need an environment of their own, into .venv/tools
	@$(PYTHON) requirements/install.py --tools

.PHONY: demo
demo: setup ## Watch simulated users change a real model's behaviour
	@$(BIN)/thumbwheel demo $(ARGS)

.PHONY: up
up: setup ## Start every part on this machine, until Ctrl-C
	@$(BIN)/thumbwheel up $(ARGS)

.PHONY: test
test: setup ## Run all tests
	$(BIN)/python -m pytest tests/unit tests/fuzz tests/integration tests/faults tests/e2e $(ARGS)

.PHONY: test-unit
test-unit: setup ## Run the unit tests alone
	$(BIN)/python -m pytest tests/unit $(ARGS)

.PHONY: check
check: check-code check-protos ## Check format, lint, types and contracts

.PHONY: check-code
check-code: setup
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	$(BIN)/mypy
	MYPYPATH=requirements $(BIN)/mypy requirements/install.py requirements/lock.py requirements/image.py requirements/supply.py

.PHONY: check-protos
check-protos: setup
	@fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; $(call protoc,"$$fresh"); \
	diff -rq -x '__*' "$$fresh/$(STUBS)" $(STUBS) || { echo "$(STUBS) is not what proto/ says: make protos" >&2; exit 1; }
	cd proto && ../$(BIN)/buf lint
	cd proto && ../$(BIN)/buf breaking --against $(GOLDEN:proto/%=%)

.PHONY: sbom
sbom: setup ## Print the software bill of materials (CycloneDX)
	@$(BIN)/python requirements/supply.py sbom

.PHONY: check-licences
check-licences: setup ## List every package's licence; fails for one that is not allowed
	@$(BIN)/python requirements/supply.py licences

.PHONY: check-vulnerabilities
check-vulnerabilities: setup ## Look up what is locked in a file of OSV records: make check-vulnerabilities DATABASE=osv.json
	@$(BIN)/python requirements/supply.py vulnerabilities $(DATABASE)

.PHONY: check-k8s
check-k8s: tools ## Render what Kubernetes is given, and check it by schemas, checkov and our own rules
	@$(BIN)/python -m k8s.check

.PHONY: protos
protos: setup ## Write the stubs of proto/ anew
	@rm -f $(STUBS)/*_pb2*; $(call protoc,.)

.PHONY: docs
docs: setup ## Write docs/configuration.md anew from the settings
	@$(BIN)/python docs/configuration.py > docs/configuration.md

.PHONY: dashboards
dashboards: setup ## Write k8s/monitoring/dashboards anew
	@$(BIN)/python -m k8s.monitoring.dashboards

.PHONY: check-ops
check-ops: setup ## Check rules, dashboards and a running stack against a real Prometheus
	@$(BIN)/python -m tests.monitoring.check

.PHONY: golden
golden: setup ## At a release: keep the contracts that later ones must not break
	@mkdir -p $(dir $(GOLDEN)); cd proto && ../$(BIN)/buf build --exclude-source-info -o $(GOLDEN:proto/%=%)

.PHONY: lock
lock: setup ## Resolve the pinned set anew; ARGS=--upgrade takes the newest
	@$(BIN)/python requirements/lock.py $(ARGS)

.PHONY: faults-swap
faults-swap: setup ## Swap a thousand versions under load, many of them sabotaged
	@$(BIN)/python -m tests.faults.swaps $(ARGS)

.PHONY: faults-restarts
faults-restarts: setup ## Restart two replicas of the policy in turns, under load
	@$(BIN)/python -m tests.faults.restarts $(ARGS)

.PHONY: fuzz
fuzz: setup ## Fuzz every decoder of bytes from outside: ten million executions each, hours; ARGS="--seconds 60" for less
	@$(BIN)/python -m tests.fuzz.run $(ARGS)

.PHONY: faults-trainer
faults-trainer: setup ## Kill the trainer at random instants while it learns, with one rank and with two
	@$(BIN)/python -m tests.faults.trainer $(ARGS)

.PHONY: soak
soak: setup ## Run a whole stack for MINUTES (30) and see what grows
	@$(BIN)/python -m bench.soak --minutes $(or $(MINUTES),30) $(ARGS)

.PHONY: faults
faults: setup ## Break everything on purpose, watched by a real Prometheus
	@$(BIN)/python -m tests.faults.run $(ARGS)

.PHONY: bench-%
bench-%: setup ## Run bench/%.py
	@test -f bench/$(subst -,_,$*).py || { echo "there is no bench/$(subst -,_,$*).py" >&2; exit 1; }
	@$(BIN)/python -m bench.$(subst -,_,$*) $(ARGS)

.PHONY: faults-collector
faults-collector: setup ## Kill the collector, its broker and its database under load
	@unshare --user --map-root-user --mount $(BIN)/python -m tests.faults.disk full
	@$(BIN)/python -m tests.faults.disk slow-sqlite
	@$(BIN)/python -m tests.faults.disk slow-postgres
	@$(BIN)/python -m tests.faults.collector $(ARGS)

.PHONY: check-hh
check-hh: setup ## Take in DATA, a file of HH-RLHF pairs, and have TRL train on what is exported
	@$(BIN)/python -m tests.integration.collector.hh_pairs $(DATA)
