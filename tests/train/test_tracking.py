"""What a run tells: the metrics file always, W&B if asked, and nothing from the other ranks."""

import json
from pathlib import Path

import pytest

from cad_mllm.config import RunConfig
from cad_mllm.train.tracking import RunTracker, StepMetrics


def step(number: int) -> StepMetrics:
    return StepMetrics(
        step=number,
        stage=1,
        loss=5.0 / number,
        grad_norm=1.0,
        lr={"lm": 1e-3, "point_projector": 0.0},
        tokens=100,
        seconds=0.5,
        gpu_memory_gb=None,
    )


def tell(config: RunConfig, *, resumed_step: int = 0, steps: range = range(1, 4)) -> None:
    tracker = RunTracker(config, run_config={"seed": 1}, resumed_step=resumed_step)
    tracker.start_stage("stage 1 (text)", 3, resumed_step)
    for number in steps:
        tracker.log_step(step(number))
    tracker.log_validation(step=steps[-1], stage=1, losses={"text": 2.5})
    tracker.close()


def records(config: RunConfig) -> list[dict[str, object]]:
    return [json.loads(line) for line in (config.output_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_metrics_file_holds_every_logged_step_and_the_validation(tmp_path: Path) -> None:
    config = RunConfig(output_dir=tmp_path, logging_steps=1)
    tell(config)
    *steps, validation = records(config)
    assert [record["step"] for record in steps] == [1, 2, 3]
    assert steps[1]["loss"] == 2.5 and steps[1]["lr/lm"] == 1e-3 and steps[1]["tokens_per_second"] == 200
    assert validation["val_loss"] == {"text": 2.5}


def test_a_resumed_run_repeats_no_line_and_drops_one_that_a_kill_cut(tmp_path: Path) -> None:
    config = RunConfig(output_dir=tmp_path, logging_steps=1)
    tell(config)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    tell(config, resumed_step=1, steps=range(2, 4))
    assert [record["step"] for record in records(config) if "loss" in record] == [1, 2, 3]


def test_wandb_works_offline_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tell(RunConfig(output_dir=tmp_path, logging_steps=1, use_wandb=True, wandb_run_name="test"))
    written = list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(written) == 1 and written[0].stat().st_size > 0
