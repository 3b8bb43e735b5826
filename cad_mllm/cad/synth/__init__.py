"""Procedural mechanical parts with captions: the dummy data, made of the same types as the real ones.

The way of a part: `draw` (one seed's choices) -> `families` (simple parts), `varied` (a few large features of
free dimensions), or `compose` (features on the faces of a base, of `shapes`, following a model of `real`)
-> `make` (millimetres, axis, captions).
"""

from cad_mllm.cad.synth.make import Complexity, Model, make_model, make_program

__all__ = ["Complexity", "Model", "make_model", "make_program"]
