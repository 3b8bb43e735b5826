"""At build time: is the torch that was installed one for the accelerator that the image is for?"""

import sys

import torch


def complaint(accelerator: str, cuda_version: str) -> str | None:
    """What is wrong with the installed torch, with the remedy; None if nothing is."""
    built = torch.version.cuda
    # DeepSpeed compiles its ops for no other minor version either.
    if accelerator == "cuda" and (built is None or built.split(".")[:2] != cuda_version.split(".")[:2]):
        target = f"CUDA {built}" if built else "the CPU"
        return (
            f"error: torch {torch.__version__} is for {target}, the base image has CUDA {cuda_version}: "
            f"give another TORCH_INDEX or CUDA_VERSION"
        )
    return None


if __name__ == "__main__":
    accelerator, cuda_version = sys.argv[1:]
    if accelerator == "cpu" and torch.version.cuda is not None:
        print("note: this torch brings CUDA along, several GB: TORCH_INDEX names an index of its CPU builds")
    sys.exit(complaint(accelerator, cuda_version))
