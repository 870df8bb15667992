# `make help` lists the targets. Set-up happens by itself, in .venv, and again when a pinned requirement changes.

.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
UV := uv==0.13.9
XPK_VENV := .venv-xpk
XPK := $(XPK_VENV)/bin/xpk
GCLUSTER ?= gcluster
export JAX_PLATFORMS ?= cpu
export HF_HUB_OFFLINE ?= 1
export TPU_SKIP_MDS_QUERY ?= 1
export TRANSFORMERS_VERBOSITY ?= error

CONFIG ?= yaml/mudd_tiny.yml
STAMP := $(shell date +%Y%m%d-%H%M%S)
RUN ?= $(basename $(notdir $(CONFIG)))-$(STAMP)
STEPS ?=
NAME ?=
ARGS ?=
SHARD ?=
OUTPUT ?= runs
CORPUS := data/stdlib
DATA := $(CORPUS)/train.parquet $(CORPUS)/eval.parquet
WHEEL_DIR ?= dist
OVERRIDES := $(if $(STEPS),steps=$(STEPS)) $(ARGS)

LAUNCHER ?=
CLUSTER ?=
TPU_TYPE ?=
NUM_SLICES ?=
WORKLOAD ?=
MAX_RESTARTS ?= 0
ZONE ?=
XPK_ARGS ?=
GCLUSTER_ARGS ?=
DRY_RUN ?=
MANIFEST ?=
PROJECT ?= $(if $(filter-out 0,$(DRY_RUN)),,$(shell gcloud config get project 2>/dev/null))
COMMIT = $(shell git describe --always --dirty --abbrev=12 --exclude='*' 2>/dev/null)
DOCKER_IMAGE ?= gcr.io/$(or $(PROJECT),your-project)/maxtext-mudd:$(or $(COMMIT),latest)

# Variables that reach a launcher, and $(call refuse,NAME,CHARACTER,WHAT) for what make or a shell would take for its
# own in them.
REQUEST := LAUNCHER GCLUSTER CONFIG CLUSTER TPU_TYPE NUM_SLICES WORKLOAD OUTPUT MAX_RESTARTS PROJECT ZONE DOCKER_IMAGE \
  DRY_RUN MANIFEST
refuse = $(if $(and $(filter command environment,$(origin $(1))),$(findstring $(2),$(value $(1)))),\
  $(error $(1) has $(3), which does not reach the container as it is; write the value without))

.PHONY: help setup corpus train compare vit upcycle submit xpk image test test-slow test-hf aot lint format lock wheel clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(READY)  ## make .venv with the pinned requirements (the other targets do this when needed)

$(READY): requirements/dev.txt requirements/post.txt pyproject.toml
	@set -e; for python in $(PYTHON) python3.12 python3 python; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "make: Python 3.12 is needed and was not found; install it, or name one: make PYTHON=/path/to/python3.12" >&2; exit 2; \
	fi; \
	if ! $$found -m venv --clear $(VENV); then \
	  echo "make: $$found cannot make virtual environments; install its venv package (Debian: python3.12-venv)." >&2; exit 2; \
	fi
	@echo 'make: setting up $(VENV), once ...' >&2
	@if $(PY) -m pip install --quiet --disable-pip-version-check $(UV); then \
	  installer="$(PY) -m uv pip install --quiet --compile-bytecode --python $(PY)"; \
	else \
	  installer="$(PY) -m pip install --quiet --disable-pip-version-check"; \
	fi; \
	$$installer -r requirements/dev.txt && $$installer --no-deps -r requirements/post.txt --editable .
	@touch $@

$(CORPUS)/train.parquet $(CORPUS)/eval.parquet &: | $(READY)
	$(PY) -m maxtext_mudd.corpus $(CORPUS)

corpus: $(READY)  ## build a corpus: of Python's standard library, or with NAME=english of English from Debian packages
ifeq ($(NAME),english)
	$(PY) benchmarks/english_corpus.py data/english
else ifeq ($(NAME),)
	$(PY) -m maxtext_mudd.corpus $(CORPUS)
else
	@echo 'make: NAME=$(NAME): there is no such corpus; leave it out for Python, or set NAME=english.' >&2; exit 2
endif

train: $(READY) $(DATA)  ## train CONFIG (yaml/mudd_tiny.yml); RUN=name resumes a run, STEPS=n sets its length
	$(PY) MaxText/train.py $(CONFIG) 'run_name=$(RUN)' 'base_output_directory=$(OUTPUT)' $(OVERRIDES)
	@$(PY) -m maxtext_mudd.report '$(OUTPUT)/$(RUN)'

compare: $(READY) $(DATA)  ## train the plain and the MUDD model on the same tokens, draw both curves
	for model in transformer_tiny mudd_tiny; do \
	  $(PY) MaxText/train.py yaml/$$model.yml run_name=$$model-$(STAMP) 'base_output_directory=$(OUTPUT)' $(OVERRIDES) \
	    || exit; done
	@$(PY) -m maxtext_mudd.report '$(OUTPUT)/transformer_tiny-$(STAMP)' '$(OUTPUT)/mudd_tiny-$(STAMP)'

vit: $(READY)  ## train a small image classifier with and without MUDD, three seeds each, and compare them (10 minutes)
	$(PY) benchmarks/vit.py $(ARGS)

upcycle: $(READY) $(DATA)  ## train a plain model, add connections to it, train on, draw docs/upcycle.png (20 minutes)
	$(PY) benchmarks/upcycle.py $(ARGS)

$(XPK): requirements/xpk.txt | $(READY)
	$(PY) -m venv --clear $(XPK_VENV)
	@if $(PY) -m uv --version >/dev/null 2>&1; then \
	  $(PY) -m uv pip install --quiet --compile-bytecode --python $(XPK_VENV)/bin/python -r requirements/xpk.txt; \
	else \
	  $(XPK_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/xpk.txt; \
	fi
	@touch $@

submit: $(if $(filter xpk,$(LAUNCHER)),$(XPK))  ## submit CONFIG to CLUSTER, LAUNCHER=gcluster or xpk (docs/cluster.md)
xpk: $(XPK)  ## the same as submit LAUNCHER=xpk
xpk: override LAUNCHER := xpk

submit xpk: $(READY)
	$(foreach name,$(REQUEST),$(call refuse,$(name),',a single quote))
	$(foreach name,$(REQUEST) STEPS ARGS XPK_ARGS GCLUSTER_ARGS,$(call refuse,$(name),$$,a dollar sign))
	@ARGS="$${STEPS:+steps=$$STEPS }$$ARGS"; \
	$(PY) -m maxtext_mudd.cluster 'LAUNCHER=$(LAUNCHER)' 'XPK=$(XPK)' 'GCLUSTER=$(GCLUSTER)' 'CONFIG=$(CONFIG)' \
	  'CLUSTER=$(CLUSTER)' 'TPU_TYPE=$(TPU_TYPE)' 'NUM_SLICES=$(NUM_SLICES)' 'WORKLOAD=$(WORKLOAD)' 'OUTPUT=$(OUTPUT)' \
	  'MAX_RESTARTS=$(MAX_RESTARTS)' 'PROJECT=$(PROJECT)' 'ZONE=$(ZONE)' 'DOCKER_IMAGE=$(DOCKER_IMAGE)' \
	  'DRY_RUN=$(DRY_RUN)' 'MANIFEST=$(MANIFEST)' "ARGS=$$ARGS" "XPK_ARGS=$$XPK_ARGS" "GCLUSTER_ARGS=$$GCLUSTER_ARGS"

image:  ## build DOCKER_IMAGE for clusters, and push it (docs/cluster.md)
	@case '$(DOCKER_IMAGE)' in \
	  *-dirty) echo 'make: $(DOCKER_IMAGE) would be named after a commit that it is not; commit the changes first.' >&2; exit 2;; \
	  */your-project/*) echo 'make: PROJECT is not set and gcloud has none; set it: make image PROJECT=my-project' >&2; exit 2;; \
	esac
	docker build --platform linux/amd64 --tag '$(DOCKER_IMAGE)' .
	docker push '$(DOCKER_IMAGE)'

# Compiling takes most of the time, and the models are tiny. It changes rounding: the slow tests go without.
QUICK = --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true

test: $(READY) $(XPK)  ## run the fast tests, two files at a time
	XLA_FLAGS="$${XLA_FLAGS:-$(QUICK)}" $(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

test-slow: $(READY)  ## run the slow tests, or with SHARD=2/6 the second of six parts; some compile for TPUs (installs libtpu)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/tpu.txt
	$(PY) -m pytest -q -m slow $(if $(SHARD),'--shard=$(SHARD)')

# PyTorch's models in two versions of transformers, on models that JAX made.
HF_PYTHON ?= $(firstword $(foreach python,python3.11 python3.12,$(shell command -v $(python))))
HF_READY := .venv-hf4/.ready .venv-hf5/.ready
HF_MODELS := build/hf-models

.venv-hf%/.ready: requirements/hf%.txt
	@if [ -z '$(HF_PYTHON)' ]; then \
	  echo 'make: Python 3.11 or 3.12 was not found; install it, or name one: make test-hf HF_PYTHON=/path/to/python3.11' >&2; exit 2; \
	fi
	$(HF_PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

test-hf: $(READY) $(HF_READY)  ## test exported models in PyTorch, with the oldest and the newest transformers
	rm -rf $(HF_MODELS)
	$(PY) -m tests.native_models $(HF_MODELS)
	for ready in $(HF_READY); do \
	  MODELS=$(HF_MODELS) $${ready%/.ready}/bin/python -m pytest -q --confcutdir=tests/hf tests/hf || exit 1; \
	done

aot: $(READY)  ## compile the paper's models for their pods (installs libtpu; half an hour or more on two cores)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements/tpu.txt
	$(PY) benchmarks/aot.py --output $(STAMP)-aot $(ARGS)

lint: $(READY)  ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(READY)  ## format and sort imports
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

lock: $(READY)  ## pin requirements/*.in again
	cd requirements && for name in runtime dev tpu cuda xpk; do \
	  ../$(PY) -m uv pip compile --quiet --no-annotate --no-header --python-version 3.12 \
	    --python-platform x86_64-manylinux_2_31 -c constraints.txt $$name.in -o $$name.txt; done

wheel: $(READY)  ## build dist/maxtext_mudd-*.whl
	$(PY) -m uv build --quiet --wheel --out-dir $(WHEEL_DIR) .

clean:  ## remove .venv, .venv-xpk, caches and built files; runs and corpus stay
	rm -rf $(VENV) $(XPK_VENV) .venv-hf4 .venv-hf5 .cache build dist .pytest_cache .ruff_cache
