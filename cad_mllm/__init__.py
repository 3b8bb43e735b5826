"""CAD-MLLM: train a language model to write parametric CAD from text, images and point clouds."""

__version__ = "0.1.0"
