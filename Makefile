# Every command a person needs. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Variables to set on the command line:
#   PYTHON=python3.12     the Python that .venv is made with (3.11 or 3.12)
#   TORCH_INDEX=URL       another package index for torch alone, such as that of its CPU builds
#   NUM_GPUS=4  ARGS=...  for `make train`
#   DOCKER=docker         what builds and pushes images: docker, podman or buildah
#   IMAGE=  TAG=          the image's name; the one for the CPU is IMAGE:TAG-cpu
#   CUDA_VERSION=         of the base images; TORCH_VERSION= and TORCH_INDEX= must go with it
#   BUILD_BASE=  RUNTIME_BASE=  other base images, both of one distribution
#   IMAGE_PIP_CONFIG=FILE pip's configuration while the image is built (an index, credentials): no layer keeps it
#   BUILD_OPTIONS=        anything else for the build, such as "--build-arg FLASH_ATTN_CUDA_ARCHS=80;90"
PYTHON ?=
TORCH_INDEX ?=
NUM_GPUS ?= 4
ARGS ?=
export PYTHON
DOCKER ?= docker
IMAGE ?= cad-mllm
TAG ?= latest
CUDA_VERSION ?= 13.0.2
TORCH_VERSION ?=
BUILD_BASE ?=
RUNTIME_BASE ?=
IMAGE_PIP_CONFIG ?=
BUILD_OPTIONS ?=

# Nothing is cached outside the clone, unless the environment says where.
CACHE := $(CURDIR)/.cache
export HF_HOME ?= $(CACHE)/huggingface
export MPLCONFIGDIR ?= $(CACHE)/matplotlib
export TORCH_EXTENSIONS_DIR ?= $(CACHE)/torch_extensions
export TORCHINDUCTOR_CACHE_DIR ?= $(CACHE)/torchinductor
export TRITON_CACHE_DIR ?= $(CACHE)/triton
export WANDB_CACHE_DIR ?= $(CACHE)/wandb
export WANDB_CONFIG_DIR ?= $(CACHE)/wandb
export XDG_CACHE_HOME ?= $(CACHE)
# DeepSpeed looks for ninja on the PATH.
export PATH := $(CURDIR)/.venv/bin:$(PATH)

PIP_INSTALL := .venv/bin/python -m pip install --no-cache-dir --disable-pip-version-check -c constraints.txt
# One line for each package that is fetched, instead of pip's three.
PIP_LINES := grep --line-buffered -E '^ *(Downloading|Building wheel)' || true

# DeepSpeed compiles C++ ops at their first use: done at installation, so that no run waits for it.
COMPILE_OPS := from deepspeed.accelerator import get_accelerator; \
    [get_accelerator().create_op_builder(name).load() for name in ("ShareMemCommBuilder", "CPUAdamBuilder")]
# A compilation that was interrupted leaves its lock, and every later run would wait on it for ever.
UNLOCK := rm -f $(TORCH_EXTENSIONS_DIR)/*/lock
ON_CPU := DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1

build_arg = $(if $($(1)),--build-arg $(1)="$($(1))")
# buildah keeps no layers for the next build unless it is told to.
BUILD_IMAGE = $(DOCKER) build $(if $(filter buildah,$(notdir $(DOCKER))),--layers) -f docker/Dockerfile \
    $(call build_arg,BUILD_BASE) $(call build_arg,RUNTIME_BASE) \
    $(call build_arg,TORCH_VERSION) $(call build_arg,TORCH_INDEX) \
    --build-arg REVISION="$$(git describe --always --dirty --abbrev=40 --exclude='*' 2>/dev/null || echo unknown)" \
    $(if $(IMAGE_PIP_CONFIG),--secret id=pip_config$(,)src=$(IMAGE_PIP_CONFIG)) $(BUILD_OPTIONS)
, := ,

.PHONY: help demo test test-slow test-image lint bench train image image-cpu push k8s-image clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed  ## train all three stages on this machine and draw what was learned: outputs/demo/
	@$(UNLOCK)
	@$(ON_CPU) .venv/bin/python -m cad_mllm.demo

test: .venv/installed  ## the test suite (at most 12 minutes on 2 cores)
	@$(UNLOCK)
	$(ON_CPU) .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: .venv/installed  ## the long tests, too long for every change, and new cases for the property tests
	@$(UNLOCK)
	$(ON_CPU) .venv/bin/python -m pytest -m "slow or hypothesis" --hypothesis-profile=explore $(ARGS)

test-image: .venv/installed  ## build the image for the CPU and try it: starts, trains in two containers, stops (root)
	bash .ci/test-image $(ARGS)

lint: .venv/installed  ## ruff (rules and format) and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/installed  ## time a step beside the original design and FSDP2 (ARGS="--workload A|B|C|D")
	@$(UNLOCK)
	.venv/bin/cad-mllm bench $(ARGS)

train: .venv/installed  ## full training on NUM_GPUS GPUs; ARGS="--train_data_path ... --point_encoder ..."
	.venv/bin/deepspeed --num_gpus=$(NUM_GPUS) cad_mllm/train_curriculum.py \
	    --config configs/train/qwen3-8b-lora.yaml --output_dir outputs_curriculum_distributed $(ARGS)

image:  ## the image for CUDA, IMAGE:TAG
	$(BUILD_IMAGE) --build-arg CUDA_VERSION=$(CUDA_VERSION) \
	    --build-arg MIN_DRIVER=$(if $(filter 12.%,$(CUDA_VERSION)),525,580) -t $(IMAGE):$(TAG) .

# The versions that constraints.txt holds were tested with Debian 12's Python.
image-cpu: BUILD_BASE := $(or $(BUILD_BASE),docker.io/library/debian:12-slim)
image-cpu: RUNTIME_BASE := $(or $(RUNTIME_BASE),$(BUILD_BASE))
image-cpu: TORCH_VERSION := $(or $(TORCH_VERSION),$(shell sed -n s/^torch==//p constraints.txt))
image-cpu:  ## the image for the CPU, IMAGE:TAG-cpu (TORCH_INDEX: torch's CPU builds, or it is several GB)
	$(BUILD_IMAGE) --build-arg ACCELERATOR=cpu --build-arg CUDA_VERSION= --build-arg MIN_DRIVER= \
	    -t $(IMAGE):$(TAG)-cpu .

push:  ## push IMAGE:TAG (TAG=...-cpu for the CPU)
	$(DOCKER) push $(IMAGE):$(TAG)

# One file for each variant of the image; every overlay uses one of them.
SET_IMAGE = sed -i.old -E -e 's|^( *newName:).*|\1 $(IMAGE)|' -e 's|^( *newTag:).*|\1 "$(1)"|'
k8s-image:  ## write IMAGE and TAG into the manifests in k8s/
	@cd k8s/components && $(call SET_IMAGE,$(TAG)) image/kustomization.yaml \
	    && $(call SET_IMAGE,$(TAG)-cpu) image-cpu/kustomization.yaml \
	    && rm image/kustomization.yaml.old image-cpu/kustomization.yaml.old
	@echo "k8s/ now uses $(IMAGE):$(TAG), and $(IMAGE):$(TAG)-cpu where there is no GPU"

clean:  ## remove .venv and caches (outputs stay)
	rm -rf .venv .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis cad_mllm.egg-info

.venv/installed: pyproject.toml constraints.txt
	@bash .ci/prerequisites
	@test -x .venv/bin/pip || { echo "Making .venv"; "$$(bash .ci/prerequisites --python)" -m venv .venv; }
	@echo "Installing torch (the largest download)"
	@$(PIP_INSTALL) --no-deps $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch | { $(PIP_LINES); }
	@echo "Installing everything else"
	@$(PIP_INSTALL) -e '.[dev]' | { $(PIP_LINES); }
	@echo "Compiling DeepSpeed's C++ ops for this CPU (a minute)"
	@mkdir -p $(CACHE); $(UNLOCK)
	@$(ON_CPU) .venv/bin/python -c '$(COMPILE_OPS)' > $(CACHE)/ops.log 2>&1 || { cat $(CACHE)/ops.log; exit 1; }
	@touch $@
