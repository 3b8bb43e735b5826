"""Every YAML and JSON that is shipped can be read by the code that reads it."""

import json
from pathlib import Path

import pytest

from cad_mllm.settings import parse_train_args, read_yaml

ROOT = Path(__file__).resolve().parent.parent
TRAIN = sorted((ROOT / "configs/train").rglob("*.yaml"))
DEEPSPEED = sorted((ROOT / "configs/deepspeed").rglob("*.json"))
ALL = [path for path in (ROOT / "configs").rglob("*") if path.is_file()]


def test_the_search_found_the_files_and_left_none_out() -> None:
    assert {"tiny.yaml", "demo.yaml", "qwen3-8b-lora.yaml", "qwen3-8b-full.yaml"} <= {p.name for p in TRAIN}
    assert {"ds_zero2_config.json", "ds_zero3_config.json", "ds_zero3_offload.json"} <= {
        p.name for p in DEEPSPEED
    }
    # The last one makes ConfigMaps of the others: tests/k8s.
    assert set(ALL) == {*TRAIN, *DEEPSPEED, ROOT / "configs/kustomization.yaml"}


@pytest.mark.parametrize("path", TRAIN, ids=lambda path: path.name)
def test_a_training_config_is_accepted_as_config_flag(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert parse_train_args(["--config", str(path)], prog="test") == read_yaml(path)


@pytest.mark.parametrize("path", DEEPSPEED, ids=lambda path: path.name)
def test_a_deepspeed_config_leaves_to_the_flags_what_the_flags_say(path: Path) -> None:
    config = json.loads(path.read_text())
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    assert config["bf16"]["enabled"] == "auto"
    assert config["optimizer"]["params"]["lr"] == "auto"
    assert config["comms_logger"]["enabled"] is True


@pytest.mark.parametrize(
    ("name", "stage", "offload"),
    [
        ("ds_zero2_config.json", 2, False),
        ("ds_zero3_config.json", 3, False),
        ("ds_zero3_offload.json", 3, True),
    ],
)
def test_the_three_variants_are_what_their_names_say(name: str, stage: int, offload: bool) -> None:
    zero = json.loads((ROOT / "configs/deepspeed" / name).read_text())["zero_optimization"]
    assert zero["stage"] == stage
    assert ("offload_optimizer" in zero and "offload_param" in zero) == offload
    if offload:
        assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"
