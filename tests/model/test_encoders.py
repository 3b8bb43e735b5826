"""Which frozen encoders a run gets, and that none is random by accident."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cad_mllm.errors import ConfigError
from cad_mllm.model.encoders import EncoderNames, build_encoders, describe, resolve_names
from cad_mllm.model.image_encoder import load_image_encoder, random_image_encoder, tiny_config
from cad_mllm.model.seeding import digest
from tests.model.conftest import tiny_config as tiny_model_config

REAL_LM = {"llm_model_name": "some/real-model"}


@pytest.mark.parametrize(
    ("changes", "allow_random", "expected"),
    [
        ({}, False, ("tiny", "tiny")),
        ({}, True, ("tiny", "tiny")),
        (REAL_LM, True, ("random", "random")),
        (REAL_LM | {"point_encoder": "m.ckpt"}, False, ("facebook/dinov2-large", "m.ckpt")),
        (REAL_LM | {"point_encoder": "m.ckpt"}, True, ("random", "m.ckpt")),
        (REAL_LM | {"vision_model_name": "dino", "point_encoder": "random"}, False, ("dino", "random")),
    ],
)
def test_unnamed_encoders(changes: dict[str, str], allow_random: bool, expected: tuple[str, str]) -> None:
    names = resolve_names(tiny_model_config(**changes), allow_random_encoders=allow_random)
    assert (names.image, names.point) == expected


def test_a_real_lm_without_a_point_encoder_is_an_error_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=r"--point_encoder.*neuralcarver/michelangelo"):
        resolve_names(tiny_model_config(**REAL_LM), allow_random_encoders=False)


def test_random_weights_are_announced() -> None:
    config = tiny_model_config(**REAL_LM, vision_model_name="some/dino")
    names = resolve_names(config, allow_random_encoders=True)
    image, point = describe(config, names)
    assert image == "image encoder: some/dino"
    assert "RANDOM" in point and "none was named" in point


@pytest.mark.parametrize("allow_random", [True, False])
def test_a_named_encoder_that_is_missing_is_never_replaced(tmp_path: Path, allow_random: bool) -> None:
    for changes in ({"vision_model_name": str(tmp_path)}, {"point_encoder": str(tmp_path / "no.ckpt")}):
        names = resolve_names(tiny_model_config(**changes), allow_random_encoders=allow_random)
        with pytest.raises(ConfigError, match=r"--(vision_model_name|point_encoder)"):
            build_encoders(names, torch.float32)


def test_an_image_gives_its_patch_tokens_without_the_class_token() -> None:
    encoder = random_image_encoder(tiny_config()).eval()
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = encoder(images)
        everything = encoder.dinov2(pixel_values=images).last_hidden_state
    assert tokens.shape == (2, 16, 64) and encoder.num_tokens == 16
    assert torch.equal(tokens, everything[:, 1:])


def test_a_local_dinov2_loads_and_an_incomplete_one_is_refused(tmp_path: Path) -> None:
    encoder = random_image_encoder(tiny_config())
    encoder.dinov2.save_pretrained(tmp_path)
    loaded = load_image_encoder(str(tmp_path))
    pairs = zip(loaded.parameters(), encoder.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)

    weights = load_file(tmp_path / "model.safetensors")
    del weights[next(name for name in weights if name.startswith("encoder.layer.0."))]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks weights.*layer\.0\."):
        load_image_encoder(str(tmp_path))


def test_an_empty_batch_has_no_features_and_frozen_weights_get_no_gradient() -> None:
    encoders = build_encoders(EncoderNames(image="tiny", point="tiny"), torch.bfloat16)
    images, points = (
        encoders.encode_images(torch.zeros(0, 3, 56, 56)),
        encoders.encode_points(torch.zeros(0, 256, 6)),
    )
    assert images.shape == (0, 16, 64) and points.shape == (0, 17, 64)
    features = encoders.encode_points(torch.rand(1, 256, 6))
    assert features.dtype == images.dtype == torch.bfloat16 and not features.requires_grad
    modules = (encoders.image, encoders.point)
    assert not any(p.requires_grad for module in modules for p in module.parameters())
    assert not any(module.training for module in modules)


def test_the_digest_of_random_weights_does_not_depend_on_what_transformers_calls_them() -> None:
    """Of a random encoder an export keeps the digest alone: another version would refuse it."""

    def module(*path: str) -> nn.Module:
        inner: nn.Module = nn.Linear(2, 2, bias=False)
        nn.init.ones_(inner.weight)
        for name in reversed(path):
            outer = nn.Module()
            outer.add_module(name, inner)
            inner = outer
        return inner

    layer = ("dinov2", "encoder", "layer", "0", "attention")
    published = digest(module(*layer, "attention", "query"))
    assert digest(module(*layer, "q_proj")) == published != digest(module(*layer, "k_proj"))
