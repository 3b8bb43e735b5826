# Every command a person needs. `make` alone lists them.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# Variables to set on the command line:
#   PYTHON=python3.12     the Python that .venv is made with (3.11 or 3.12)
#   TORCH_INDEX=URL       another package index for torch alone, such as that of its CPU builds
#   NUM_GPUS=4  ARGS=...  for `make train`
#   IMAGE=  TAG=          the image's name; the one for the CPU is IMAGE:TAG-cpu
PYTHON ?=
TORCH_INDEX ?=
NUM_GPUS ?= 4
ARGS ?=
export PYTHON
IMAGE ?= cad-mllm
TAG ?= latest

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

.PHONY: help demo test test-slow lint train k8s-image clean

help:  ## list the commands
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/installed  ## train all three stages on this machine and draw what was learned: outputs/demo/
	@$(UNLOCK)
	@$(ON_CPU) .venv/bin/python -m cad_mllm.demo

test: .venv/installed  ## the test suite (at most 12 minutes on 2 cores)
	@$(UNLOCK)
	$(ON_CPU) .venv/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: .venv/installed  ## the long tests, too long for every change
	@$(UNLOCK)
	$(ON_CPU) .venv/bin/python -m pytest -m slow $(ARGS)

lint: .venv/installed  ## ruff (rules and format) and mypy
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

train: .venv/installed  ## full training on NUM_GPUS GPUs; ARGS="--train_data_path ... --point_encoder ..."
	.venv/bin/deepspeed --num_gpus=$(NUM_GPUS) cad_mllm/train_curriculum.py \
	    --config configs/train/qwen3-8b-lora.yaml --output_dir outputs_curriculum_distributed $(ARGS)

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
