"""Trained weights on disk: they come back exactly, and other tools load them."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cad_mllm.config import ModelConfig
from cad_mllm.errors import CheckpointError
from cad_mllm.model import presets
from cad_mllm.model.build import Built, build_model
from cad_mllm.model.export import export_weights, load_exported
from cad_mllm.model.multimodal import parameter_groups
from cad_mllm.model.names import stored_name
from tests.model.conftest import CPU, Case, loss_of, shake, tiny_config

SEQUENCE = {"target_format": "command", "quantization_bits": 8, "max_seq_length": 512}
TOKENS = torch.arange(40).view(2, 20)


def _export(folder: Path, config: ModelConfig, built: Built | None = None) -> Built:
    if built is None:
        built = build_model(config, seed=3, device=CPU)
        shake(built.model)
    groups = parameter_groups(built.model).values()
    tensors = {n: p.detach().float().clone() for group in groups for n, p in group}
    folder.mkdir(exist_ok=True)
    export_weights(folder, built, config, SEQUENCE, tensors)
    built.model.eval()
    return built


@pytest.fixture(scope="module")
def lora_export(tmp_path_factory: pytest.TempPathFactory, built: Built) -> Path:
    folder = tmp_path_factory.mktemp("lora-export")
    _export(folder, tiny_config(), built)
    return folder


@pytest.mark.parametrize("use_lora", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("encoders", [False, True], ids=["frozen encoders", "trained encoders"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_comes_back_computes_the_same(
    tmp_path: Path, use_lora: bool, encoders: bool, dtype: str
) -> None:
    trained = _export(tmp_path, tiny_config(use_lora=use_lora, train_encoders=encoders, dtype=dtype))
    back = load_exported(tmp_path, CPU)
    cases = [Case(1, points=True), Case(2, image=True)]
    with torch.no_grad():
        assert torch.equal(loss_of(back.built, cases), loss_of(trained, cases))
        assert torch.equal(
            back.built.model.lm(input_ids=TOKENS).logits, trained.model.lm(input_ids=TOKENS).logits
        )
    assert back.sequence == SEQUENCE
    assert back.config.vision_model_name == back.config.point_encoder == "tiny"
    assert not back.built.model.training


def _as_transformers_5_23_says(name: str) -> str:
    for published, said in (
        ("attention.attention.query.", "attention.q_proj."),
        ("attention.attention.key.", "attention.k_proj."),
        ("attention.attention.value.", "attention.v_proj."),
        ("attention.output.dense.", "attention.o_proj."),
    ):
        name = name.replace(published, said)
    return name


def test_a_trained_image_encoder_is_stored_under_the_names_it_is_published_with(tmp_path: Path) -> None:
    """Which transformers itself writes, whatever version it is."""
    trained = _export(tmp_path / "export", tiny_config(train_encoders=True))
    trained.model.image_projector.encoder.dinov2.save_pretrained(tmp_path / "published")
    published = load_file(tmp_path / "published" / "model.safetensors").keys()
    prefix = "image_projector.encoder.dinov2."
    stored = {n for n in load_file(tmp_path / "export" / "projectors.safetensors") if n.startswith(prefix)}
    # The mask token does not train.
    assert stored == {prefix + name for name in published} - {f"{prefix}embeddings.mask_token"}
    assert "image_projector.encoder.dinov2.encoder.layer.0.attention.attention.query.weight" in stored


def test_a_trained_image_encoder_is_read_under_the_names_of_any_transformers(tmp_path: Path) -> None:
    trained = _export(tmp_path, tiny_config(train_encoders=True))
    weights = load_file(tmp_path / "projectors.safetensors")
    renamed = {_as_transformers_5_23_says(name): value for name, value in weights.items()}
    assert len(renamed.keys() - weights.keys()) == 2 * 2 * 4, "weight and bias, 2 layers, 4 projections"
    save_file(renamed, tmp_path / "projectors.safetensors")
    back = load_exported(tmp_path, CPU)
    cases = [Case(2, image=True)]
    with torch.no_grad():
        assert torch.equal(loss_of(back.built, cases), loss_of(trained, cases))


@pytest.mark.parametrize(
    "name",
    [
        "dinov2.encoder.layer.11.attention.attention.key.bias",
        "dinov2.encoder.layer.11.attention.output.dense.weight",
        "image_projector.encoder.dinov2.encoder.layer.0.attention.attention.value.weight",
        "image_projector.encoder.dinov2.encoder.layer.0.mlp.fc1.weight",
    ],
)
def test_a_weight_has_one_stored_name(name: str) -> None:
    assert stored_name(name) == name == stored_name(_as_transformers_5_23_says(name))


@pytest.mark.parametrize(
    "name", ["lm.model.layers.0.self_attn.q_proj.weight", "lm.layer.0.attention.q_proj.lora_A.weight"]
)
def test_the_weights_of_the_language_model_keep_their_names(name: str) -> None:
    assert stored_name(name) == name


def test_plain_peft_loads_the_adapter(lora_export: Path, built: Built) -> None:
    base = presets.on_the_spot("tiny", torch.float32, "sdpa")
    adapted = PeftModel.from_pretrained(base, str(lora_export / "adapter"))
    loaded, trained = (get_peft_model_state_dict(lm) for lm in (adapted, built.model.lm))
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    as_peft = build_model(tiny_config(), seed=3, device=CPU, fused=False)
    as_peft.model.load_state_dict(built.model.state_dict())
    as_peft.model.eval()
    with torch.no_grad():
        logits = adapted(input_ids=TOKENS).logits
        assert torch.equal(logits, as_peft.model.lm(input_ids=TOKENS).logits)
        # Ours computes base and adapter in one sum: whether the last bits differ is up to the processor.
        torch.testing.assert_close(logits, built.model.lm(input_ids=TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_plain_transformers_loads_a_fully_trained_model_and_the_tokenizer(tmp_path: Path) -> None:
    trained = _export(tmp_path, tiny_config(use_lora=False))
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm", dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(lm(input_ids=TOKENS).logits, trained.model.lm(input_ids=TOKENS).logits)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert tokenizer("S1;é").input_ids == trained.tokenizer("S1;é").input_ids


def test_the_exported_weights_are_those_given_not_the_live_ones(tmp_path: Path) -> None:
    config = tiny_config()
    built = build_model(config, seed=3, device=CPU)
    given = {n: torch.full(p.shape, 0.25) for n, p in built.model.named_parameters() if p.requires_grad}
    export_weights(tmp_path, built, config, SEQUENCE, given)
    back = load_exported(tmp_path, CPU).built
    assert all((p == 0.25).all() for p in back.model.parameters() if p.requires_grad)


def _edit_manifest(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / "cad_mllm.json").read_text())
    (folder / "cad_mllm.json").write_text(json.dumps(manifest | changes))


def _drop_from(path: Path) -> str:
    weights = load_file(path)
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, path)
    return name


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "cad_mllm.json").unlink(), r"cad_mllm\.json is missing"),
        (lambda f: (f / "cad_mllm.json").write_text("{"), r"cad_mllm\.json is damaged"),
        (lambda f: _edit_manifest(f, version=99), "version 99"),
        (lambda f: _edit_manifest(f, model={"no_such_field": 1}), "damaged.*no_such_field"),
        (lambda f: _edit_manifest(f, random_digests={"lm": "0" * 64}), "`lm` are other ones here"),
        (lambda f: (f / "projectors.safetensors").unlink(), r"projectors\.safetensors is missing"),
        (lambda f: (f / "adapter" / "adapter_model.safetensors").write_bytes(b"x"), "missing or damaged"),
        (lambda f: _drop_from(f / "adapter" / "adapter_model.safetensors"), "lacks weight.*lora_A"),
        (lambda f: _drop_from(f / "projectors.safetensors"), "lacks weight image_projector"),
    ],
    ids=[
        "no manifest",
        "broken manifest",
        "other version",
        "unknown setting",
        "other random base",
        "no projectors",
        "broken adapter",
        "adapter lacks a weight",
        "projectors lack a weight",
    ],
)
def test_a_damaged_export_is_refused(tmp_path: Path, lora_export: Path, damage, message: str) -> None:
    for path in lora_export.rglob("*"):
        target = tmp_path / path.relative_to(lora_export)
        if path.is_dir():
            target.mkdir()
        else:
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        load_exported(tmp_path, CPU)


def test_adapters_of_another_rank_are_refused(tmp_path: Path, lora_export: Path) -> None:
    other = tmp_path / "other"
    _export(other, tiny_config(lora_r=8))
    (other / "adapter" / "adapter_model.safetensors").write_bytes(
        (lora_export / "adapter" / "adapter_model.safetensors").read_bytes()
    )
    with pytest.raises(CheckpointError, match=r"shape \(4, "):
        load_exported(other, CPU)
