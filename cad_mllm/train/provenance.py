"""Where a checkpoint comes from: code, packages, hardware. For the record, never read back by training."""

import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cad_mllm import __version__
from cad_mllm.train.distributed import World

_PACKAGES = ("torch", "deepspeed", "transformers", "peft", "flash-attn", "safetensors", "tokenizers", "numpy")


def provenance(world: World, deepspeed_config: Mapping[str, object] | None) -> dict[str, object]:
    """What a person wants to know of a checkpoint a year later."""
    return {
        "cad_mllm": __version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": {name: v for name in _PACKAGES if (v := _version(name)) is not None},
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device)
        if world.device.type == "cuda"
        else platform.machine(),
        "cuda": torch.version.cuda,
        "deepspeed_config": deepspeed_config,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """The commit of the source tree this runs from; None for an installed package or without git."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
