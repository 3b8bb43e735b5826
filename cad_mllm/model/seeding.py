"""Random numbers that leave the global generators as they were, and random weights that can be rebuilt."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from cad_mllm.model.names import stored_name

FROZEN_SEED = 20241107
"""Seed of every random weight that is never trained: a later process rebuilds the same bits from it."""
_HALF_RANGE = 2**20
_CPU = torch.device("cpu")


@contextmanager
def private_rng(seed: int, device: torch.device = _CPU) -> Iterator[None]:
    """Seed torch's CPU generator, and that of `device` if it is a GPU, for the block alone."""
    # Naming the device keeps a rank from opening a context on every GPU of its host.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@torch.no_grad()
def redraw_(
    module: nn.Module,
    std: Callable[[str, Tensor], float],
    *,
    device: torch.device = _CPU,
    whole: Callable[[Tensor], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Fill every matrix of a module on `device` with uniform numbers of the given standard deviation.

    `std` gets the name and the parameter; vectors (norms, biases) keep what they have. The numbers are
    integers times one factor, so on the CPU they are equal bits on every processor, which normal draws are
    not. In the block `whole(parameter)` a parameter is there as a whole, wherever it rests.
    """
    generator = torch.Generator(device).manual_seed(FROZEN_SEED)
    for name, parameter in module.named_parameters():
        with whole(parameter):
            if parameter.dim() >= 2:
                steps = torch.randint(
                    -_HALF_RANGE, _HALF_RANGE + 1, parameter.shape, generator=generator, device=device
                )
                parameter.copy_(steps.float() * (std(name, parameter) * 3**0.5 / _HALF_RANGE))


def digest(module: nn.Module) -> str:
    """Hash the parameters of a module, names (those in files), types and bits: sha256."""
    sha = hashlib.sha256()
    for name, parameter in module.named_parameters():
        sha.update(f"{stored_name(name)} {parameter.dtype} {tuple(parameter.shape)}".encode())
        sha.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return sha.hexdigest()
