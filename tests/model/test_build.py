"""Models from a configuration: presets, local folders, and mistakes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cad_mllm.errors import ConfigError
from cad_mllm.model import build, presets
from cad_mllm.model.build import Built, build_model, lm_shape
from tests.model.conftest import CPU, tiny_config

ENCODERS = {"vision_model_name": "tiny", "point_encoder": "tiny"}


@pytest.fixture(scope="module")
def local_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 of two megabytes as a folder in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("local-lm")
    presets.on_the_spot("tiny", torch.float32, "sdpa").save_pretrained(folder)
    presets.byte_tokenizer().save_pretrained(folder)
    return folder


def _weights(built: Built) -> dict[str, torch.Tensor]:
    return dict(built.model.named_parameters())


def test_the_same_seed_gives_the_same_weights_and_another_one_others() -> None:
    torch.manual_seed(1)
    first = _weights(build_model(tiny_config(), seed=3, device=CPU))
    drawn = torch.rand(2)
    torch.manual_seed(2)
    again = _weights(build_model(tiny_config(), seed=3, device=CPU))
    other = _weights(build_model(tiny_config(), seed=4, device=CPU))
    torch.manual_seed(1)
    assert torch.equal(torch.rand(2), drawn), "the global generator was disturbed"
    assert all(torch.equal(first[name], again[name]) for name in first)
    differing = {name for name in first if not torch.equal(first[name], other[name])}
    trained = {name for name in first if first[name].requires_grad}
    assert differing and differing <= trained
    assert any("lora_A" in name for name in differing) and any(
        "image_projector" in name for name in differing
    )


def test_fresh_adapters_change_nothing_and_sit_on_every_linear_layer_but_the_head() -> None:
    with_lora = build_model(tiny_config(), seed=3, device=CPU)
    without = build_model(tiny_config(use_lora=False), seed=3, device=CPU)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(
            with_lora.model.lm(input_ids=tokens).logits, without.model.lm(input_ids=tokens).logits
        )
    adapted = {n.split(".lora_A")[0].split(".")[-1] for n in _weights(with_lora) if "lora_A" in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_bfloat16_weights_are_the_rounded_float32_ones() -> None:
    for use_lora in (True, False):
        exact = build_model(tiny_config(use_lora=use_lora), seed=3, device=CPU)
        rounded = build_model(tiny_config(use_lora=use_lora, dtype="bfloat16"), seed=3, device=CPU)
        for name, value in _weights(rounded).items():
            assert torch.equal(value, _weights(exact)[name].to(torch.bfloat16)), name
        # Rounding the rotary frequencies would change every position.
        buffers = dict(exact.model.named_buffers())
        assert all(torch.equal(value, buffers[name]) for name, value in rounded.model.named_buffers())


def test_a_local_folder_is_the_model_that_was_saved_there(local_lm: Path) -> None:
    config = tiny_config(llm_model_name=str(local_lm), **ENCODERS)
    loaded, preset = (build_model(c, seed=3, device=CPU) for c in (config, tiny_config()))
    assert all(torch.equal(value, _weights(preset)[name]) for name, value in _weights(loaded).items())
    assert lm_shape(config) == lm_shape(tiny_config()) == (128, 384)
    assert loaded.tokenizer("aé").input_ids == [97, 195, 169]


def test_the_data_is_told_what_the_model_needs(built: Built) -> None:
    assert (built.image_size, built.image_tokens, built.point_tokens, built.num_points) == (56, 16, 17, 256)
    assert built.vocab_size >= len(built.tokenizer) == 258
    assert len(built.notes) == 3 and all("RANDOM" in note for note in built.notes)


def test_the_byte_tokenizer_keeps_every_text() -> None:
    tokenizer = presets.byte_tokenizer()
    text = "S14,0;L221,0;\n Ein Würfel, 3 mm   breit ∅\t<eos"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id) == (256, 257, None)


def test_the_timing_preset_has_the_shape_of_qwen3_8b() -> None:
    config = presets.lm_config(presets.QWEN3_8B_RANDOM)
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        lm = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in lm.parameters()) == 8_190_735_360
    assert config.rope_parameters["rope_theta"] == 1e6


def _break_nothing(folder: Path) -> None:
    (folder / "config.json").unlink()


def _drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _cut_the_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def _shrink_the_vocabulary(folder: Path) -> None:
    presets.byte_tokenizer().save_pretrained(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    extra = [dict(tokenizer["added_tokens"][0], id=258 + i, content=f"<extra{i}>") for i in range(100)]
    tokenizer["added_tokens"] += extra
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_break_nothing, "cannot be loaded"),
        (_drop_a_weight, r"lacks weights.*layers\.1\.mlp\.up_proj"),
        (_cut_the_weights, "cannot be loaded"),
        (_shrink_the_vocabulary, "do not belong together"),
    ],
    ids=["no config", "a weight missing", "weights cut off", "tokenizer too large"],
)
def test_a_damaged_folder_is_a_config_error(tmp_path: Path, local_lm: Path, damage, message: str) -> None:
    for path in local_lm.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(ConfigError, match=message):
        build_model(tiny_config(llm_model_name=str(tmp_path), **ENCODERS), seed=3, device=CPU)


def test_an_unknown_model_name_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = tiny_config(llm_model_name="no-such-owner/no-such-model", **ENCODERS)
    with pytest.raises(ConfigError, match=r"no-such-owner/no-such-model.*local folder"):
        build_model(config, seed=3, device=CPU)
    with pytest.raises(ConfigError, match="no-such-owner/no-such-model"):
        lm_shape(config)


def test_flash_attention_without_a_gpu_or_without_the_package_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny_config(attn_implementation="flash_attention_2", dtype="bfloat16")
    with pytest.raises(ConfigError, match="--attn_implementation sdpa"):
        build_model(config, seed=3, device=CPU)
    monkeypatch.setattr(build, "is_flash_attn_2_available", lambda: False)
    with pytest.raises(ConfigError, match=r"--attn_implementation sdpa.*pip install \.\[gpu\]"):
        build_model(config, seed=3, device=torch.device("cuda"))


@pytest.mark.parametrize(
    ("wanted", "recomputed"),
    [(None, [0, 1, 2, 3]), (0, []), (1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3])],
)
def test_recomputed_layers_are_spread_over_the_lm(wanted: int | None, recomputed: list[int]) -> None:
    config = tiny_config(use_gradient_checkpointing=True)
    built = build_model(config, seed=3, device=CPU, recomputed_layers=wanted)
    layers = built.model.lm.get_base_model().model.layers
    assert [n for n, layer in enumerate(layers) if layer.gradient_checkpointing] == recomputed
    assert f"gradient checkpointing: {len(recomputed)} of 4 layers are recomputed" in built.notes
