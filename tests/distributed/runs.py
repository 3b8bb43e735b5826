"""Flags of test runs, and what a run leaves behind."""

import json
from pathlib import Path

from torch import Tensor

from cad_mllm.train.checkpoint import ShardReader, step_folder

ROOT = Path(__file__).resolve().parents[2]


def flags(data: Path, output_dir: Path, *, ranks: int, zero: str | None, **more: object) -> list[str]:
    """Flags of a tiny run with a global batch of 4; `zero` names a shipped DeepSpeed JSON."""
    values: dict[str, object] = {
        "llm_model_name": "tiny",
        "device": "cpu",
        "train_data_path": data,
        "output_dir": output_dir,
        "batch_size": 1,
        "gradient_accumulation_steps": 4 // ranks,
        "warmup_steps": 2,
        "logging_steps": 1,
        "num_workers": 0,
        "seed": 7,
        "dtype": "float32",
        **more,
    }
    if zero is not None:
        values["deepspeed_config"] = ROOT / "configs" / "deepspeed" / f"ds_{zero}.json"
        values["deepspeed"] = True
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def losses(output_dir: Path) -> list[float]:
    """Training loss of every step."""
    records = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


def weights(output_dir: Path, step: int) -> dict[str, Tensor]:
    """The fp32 masters of a checkpoint, by parameter name."""
    return dict(ShardReader(step_folder(output_dir, step) / "shards"))


def distance(ours: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """Relative L2 distance over all parameters together."""
    assert ours.keys() == reference.keys()
    gap = sum(float((ours[name] - reference[name]).double().square().sum()) for name in reference)
    size = sum(float(value.double().square().sum()) for value in reference.values())
    return float((gap / size) ** 0.5)
