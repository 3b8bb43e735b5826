"""DINOv2 through transformers: images to patch tokens.

Shapes: N images, C = 3 channels, H = W pixels, K patch tokens, D hidden channels.
"""

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, Dinov2Config, Dinov2Model

from cad_mllm.errors import ConfigError
from cad_mllm.model.seeding import FROZEN_SEED, private_rng, redraw_

DEFAULT_NAME = "facebook/dinov2-large"
IMAGE_SIZE = 224
"""Pixels of an image side; DINOv2's 37 x 37 position embeddings are interpolated to the 16 x 16 patches."""
IMAGE_MEAN = (0.485, 0.456, 0.406)
"""ImageNet's, as in DINOv2's own preprocessing."""
IMAGE_STD = (0.229, 0.224, 0.225)

_REMEDY = (
    "give --vision_model_name a folder with a DINOv2 model (config.json, model.safetensors), or a hub name "
    f"such as {DEFAULT_NAME} on a machine with network access or a filled hub cache"
)


class ImageEncoder(nn.Module):
    """A DINOv2 whose patch tokens are the output."""

    def __init__(self, dinov2: Dinov2Model) -> None:
        super().__init__()
        self.dinov2 = dinov2
        self.image_size = min(IMAGE_SIZE, int(dinov2.config.image_size))
        self.num_tokens = (self.image_size // int(dinov2.config.patch_size)) ** 2
        self.width = int(dinov2.config.hidden_size)

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Encode (N, 3, S, S), normalised by IMAGE_MEAN and IMAGE_STD, to (N, K, D) without the CLS token."""
        hidden: Tensor = self.dinov2(pixel_values=images_NCHW.to(self.dinov2.dtype)).last_hidden_state
        return hidden[:, 1:]


def unfreeze(encoder: ImageEncoder) -> ImageEncoder:
    """Let its weights train; the mask token is for DINOv2's own pretraining, no step here uses it."""
    encoder.requires_grad_()
    encoder.dinov2.embeddings.mask_token.requires_grad_(False)
    return encoder


def random_image_encoder(config: Dinov2Config) -> ImageEncoder:
    """Build an encoder with random weights, the same bits in every process."""
    with private_rng(FROZEN_SEED):
        model = Dinov2Model(config)
    redraw_(model, lambda name, matrix: float(config.initializer_range))
    return ImageEncoder(model)


def tiny_config() -> Dinov2Config:
    """56 px, 16 tokens of 64 channels: for tests and the demo."""
    return Dinov2Config(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14
    )


def small_config() -> Dinov2Config:
    """112 px, 64 tokens of 256 channels: to be trained from scratch with the small LM."""
    return Dinov2Config(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, image_size=112, patch_size=14
    )


def large_config() -> Dinov2Config:
    """The shape of facebook/dinov2-large."""
    return Dinov2Config(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, image_size=518, patch_size=14
    )


def load_image_encoder(name: str) -> ImageEncoder:
    """Load a DINOv2 from a local folder or the hub. ConfigError where there is none, or an incomplete one."""
    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "dinov2":
            raise ConfigError(f"--vision_model_name {name} is a {config.model_type} model; {_REMEDY}")
        model, info = Dinov2Model.from_pretrained(
            name, config=config, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise ConfigError(f"--vision_model_name {name} cannot be loaded ({first_line}); {_REMEDY}") from error
    # transformers fills what a file lacks with random numbers; a frozen encoder must never be that.
    if info["missing_keys"]:
        missing = ", ".join(sorted(info["missing_keys"])[:5])
        raise ConfigError(f"--vision_model_name {name} lacks weights, first {missing}; {_REMEDY}")
    return ImageEncoder(model)
