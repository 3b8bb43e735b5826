"""A loss that is not finite on one rank: all ranks skip the step, and too many in a row end the run."""

import json
from pathlib import Path

import pytest
import torch

from cad_mllm.train import checkpoint
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS = 8
BAD = [2, 3, 6]
ENGINES = ("zero2_config", "zero3_config", "zero3_offload")

pytestmark = pytest.mark.distributed


def run_flags(data: Path, output_dir: Path, zero: str | None, **more: object) -> list[str]:
    stage = {"start_from_stage": 3, "stage3_epochs": 4, "stage3_lr": 1e-3, "projector_lr_multiplier": 1.0}
    return flags(data, output_dir, ranks=1 if zero is None else 2, zero=zero, **stage, **more)


@pytest.fixture(scope="module")
def outputs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("nan")
    plain = {"rank": 0, "steps": BAD, "runs": [run_flags(data, root / "plain", None)]}
    assert run_ranks(JOBS, "train_with_nan", plain, world_size=1) == [[0]]
    runs = [run_flags(data, root / zero, zero) for zero in ENGINES]
    sharded = {"rank": 1, "steps": BAD, "runs": runs}
    assert run_ranks(JOBS, "train_with_nan", sharded, world_size=2) == [[0] * len(ENGINES)] * 2
    return root


@pytest.mark.parametrize("zero", ENGINES)
def test_a_nan_on_one_rank_is_skipped_by_all_and_by_every_engine_alike(outputs: Path, zero: str) -> None:
    lines = (outputs / zero / "metrics.jsonl").read_text().splitlines()
    skipped = [json.loads(line)["step"] - 1 for line in lines if json.loads(line)["loss"] is None]
    assert skipped == BAD
    ours, theirs = losses(outputs / zero), losses(outputs / "plain")
    assert len(ours) == STEPS
    assert [loss for loss in ours if loss is not None] == pytest.approx(
        [loss for loss in theirs if loss is not None], rel=1e-5
    )
    end = weights(outputs / zero, STEPS)
    assert all(bool(torch.isfinite(value).all()) for value in end.values())
    assert distance(end, weights(outputs / "plain", STEPS)) < 1e-5


def test_in_bf16_zero2_skips_without_the_host_what_zero3_skips_by_it(data: Path, tmp_path: Path) -> None:
    def run(zero: str) -> Path:
        words = run_flags(data, tmp_path / zero, zero, dtype="bfloat16", save_steps=1)
        job = {"rank": 1, "steps": BAD, "runs": [[*words, "--keep_last_n_checkpoints", "0"]]}
        assert run_ranks(JOBS, "train_with_nan", job, world_size=2) == [[0], [0]]
        return tmp_path / zero

    ours, theirs = run("zero2_config"), run("zero3_config")
    assert [loss is None for loss in losses(ours)] == [step in BAD for step in range(STEPS)]
    begin, after, end = (weights(ours, step) for step in (1, 5, STEPS))
    assert distance(after, weights(theirs, 5)) < 0.1 * distance(after, begin)
    assert distance(end, weights(theirs, STEPS)) < 0.1 * distance(end, begin)


def test_five_in_a_row_end_the_run_with_the_state_before_them(data: Path, tmp_path: Path) -> None:
    words = run_flags(data, tmp_path / "out", "zero2_config", save_steps=3)
    job = {"rank": 1, "steps": [2, 3, 4, 5, 6], "runs": [words]}
    assert run_ranks(JOBS, "train_with_nan", job, world_size=2) == [[2], [2]]
    newest = checkpoint.find("auto", tmp_path / "out", print)
    assert newest is not None
    assert checkpoint.read_state(newest).position.global_step == 2
