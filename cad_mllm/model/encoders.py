"""The encoders of a run: which ones, where their weights come from, and what is said about it.

Shapes: N images, M clouds, P points of C = 6, K tokens of D channels.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import Dinov2Config

from cad_mllm.config import ModelConfig
from cad_mllm.errors import ConfigError
from cad_mllm.model import image_encoder, point_encoder
from cad_mllm.model.image_encoder import ImageEncoder
from cad_mllm.model.point_encoder import PointEncoder, PointEncoderConfig
from cad_mllm.model.presets import ON_THE_SPOT, SMALL, TINY

RANDOM = "random"
SYNTHETIC = (*ON_THE_SPOT, RANDOM)
"""Encoders that are built from random numbers, the same in every process."""


class Encoders(Protocol):
    """What makes the inputs of `MultimodalLM` from those of a batch."""

    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images to what the model's image projector takes. N may be 0."""

    def encode_points(self, points_MPC: Tensor) -> Tensor:
        """(M, P, 6) clouds to what the model's point projector takes. M may be 0."""


class TrainedEncoders:
    """Hands the inputs on: encoders that train are part of the model, each before its projector."""

    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """The images themselves."""
        return images_NCHW

    def encode_points(self, points_MPC: Tensor) -> Tensor:
        """The clouds themselves."""
        return points_MPC


class StoredEncoders:
    """Hands on what frozen encoders have computed before the run.

    Of pictures and clouds themselves there are none then, or those of a rehearsal, whose features are zeros.
    """

    def __init__(self, encoders: "FrozenEncoders") -> None:
        self._image = (encoders.image.num_tokens, encoders.image_width)
        self._points = (encoders.point.config.num_tokens, encoders.point_width)
        self._dtype = encoders.dtype

    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """(N, K, D) as they are."""
        return self._handed_on(images_NCHW, self._image)

    def encode_points(self, points_MPC: Tensor) -> Tensor:
        """(M, K, D) as they are."""
        return self._handed_on(points_MPC, self._points)

    def _handed_on(self, given: Tensor, shape: tuple[int, int]) -> Tensor:
        if given.shape[1:] == shape:
            return given
        return given.new_zeros((given.shape[0], *shape), dtype=self._dtype)


class FrozenEncoders:
    """Both encoders, without gradients.

    Deliberately not an `nn.Module`: they stay outside of the module that a training engine shards, are
    whole on every rank, and so need no collective whatever a rank's batch holds.
    """

    def __init__(self, image: ImageEncoder, point: PointEncoder, dtype: torch.dtype) -> None:
        self.image = image.to(dtype).eval().requires_grad_(False)
        self.point = point.to(dtype).eval().requires_grad_(False)

    def to(self, device: torch.device) -> "FrozenEncoders":
        """Move both encoders; returns itself."""
        self.image.to(device)
        self.point.to(device)
        return self

    @property
    def dtype(self) -> torch.dtype:
        """Of the features."""
        return self.point.query.dtype

    @property
    def image_width(self) -> int:
        """D of an image token."""
        return self.image.width

    @property
    def point_width(self) -> int:
        """D of a point token."""
        return self.point.config.width

    @torch.no_grad()
    def encode_images(self, images_NCHW: Tensor) -> Tensor:
        """(N, 3, S, S) normalised images to (N, K, D). N may be 0."""
        if images_NCHW.shape[0] == 0:
            return images_NCHW.new_zeros((0, self.image.num_tokens, self.image_width), dtype=self.dtype)
        out: Tensor = self.image(images_NCHW)
        return out

    @torch.no_grad()
    def encode_points(self, points_MPC: Tensor) -> Tensor:
        """(M, P, 6) clouds to (M, K, D). M may be 0."""
        if points_MPC.shape[0] == 0:
            shape = (0, self.point.config.num_tokens, self.point_width)
            return points_MPC.new_zeros(shape, dtype=self.dtype)
        out: Tensor = self.point(points_MPC)
        return out


@dataclass(frozen=True, kw_only=True)
class EncoderNames:
    """Where the weights come from: a path, a hub name, `tiny` or `random`."""

    image: str
    point: str


def resolve_names(config: ModelConfig, *, allow_random_encoders: bool) -> EncoderNames:
    """Say which encoders the config means, also where it names none.

    ConfigError: no point encoder is named, and neither the LM's preset nor `allow_random_encoders` has one.
    """
    if config.llm_model_name in ON_THE_SPOT:
        image = point = config.llm_model_name
    elif allow_random_encoders:
        image = point = RANDOM
    else:
        image, point = image_encoder.DEFAULT_NAME, ""
    names = EncoderNames(image=config.vision_model_name or image, point=config.point_encoder or point)
    if not names.point:
        raise ConfigError(
            f"no point encoder is named (--point_encoder): {point_encoder.HOW_TO_GET_WEIGHTS}; "
            "`--point_encoder random` trains on random features, for trying things out; with "
            "--train_encoders they are learned"
        )
    return names


def build_encoders(names: EncoderNames, dtype: torch.dtype) -> FrozenEncoders:
    """Build both encoders on the CPU. ConfigError or CheckpointError: weights that cannot be had."""
    if names.image in SYNTHETIC:
        image = image_encoder.random_image_encoder(image_config(names.image))
    else:
        image = image_encoder.load_image_encoder(names.image)
    if names.point in SYNTHETIC:
        point = point_encoder.random_point_encoder(point_config(names.point))
    else:
        point = point_encoder.load_point_encoder(Path(names.point))
    return FrozenEncoders(image, point, dtype)


def image_config(name: str) -> Dinov2Config:
    """The shape of an image encoder of random weights; other names are taken to be as large as `random`."""
    shapes = {TINY: image_encoder.tiny_config, SMALL: image_encoder.small_config}
    return shapes.get(name, image_encoder.large_config)()


def point_config(name: str) -> PointEncoderConfig:
    """The shape of a point encoder of random weights; every other name is one of the full size."""
    return {TINY: point_encoder.TINY, SMALL: point_encoder.SMALL}.get(name, PointEncoderConfig())


def describe(config: ModelConfig, names: EncoderNames) -> tuple[str, ...]:
    """One line on each encoder, for the person who starts the run: which one it is, or that it is random."""
    trained = config.train_encoders
    return (
        _describe("image encoder", names.image, named=config.vision_model_name is not None, trained=trained),
        _describe("point encoder", names.point, named=config.point_encoder is not None, trained=trained),
    )


def _describe(what: str, name: str, *, named: bool, trained: bool) -> str:
    training = ", trains with its projector" if trained else ""
    if name not in SYNTHETIC:
        return f"{what}: {name}{training}"
    because = f"`{name}` was asked for" if named else "none was named"
    size = "full-size" if name == RANDOM else "small"
    return f"{what}: RANDOM weights, {size} ({because}){training}"
