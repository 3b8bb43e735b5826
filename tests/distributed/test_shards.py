"""Shards, augmented, captions dropped: begun on one rank and gone on with on two, it stays the same run."""

import json
import shutil
from pathlib import Path

import pytest

from tests.data.sharding import shard_folder
from tests.distributed.conftest import write_data
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS = 6
STOP = 3

pytestmark = pytest.mark.distributed


def run_flags(data: Path, output_dir: Path, ranks: int) -> list[str]:
    more = {"start_from_stage": 3, "stage3_epochs": 4, "stage3_lr": 1e-3, "save_steps": STOP}
    augmented = {"augment_prefix": 0.4, "augment_removal": 0.3, "caption_dropout": 0.5, "num_workers": 1}
    zero = None if ranks == 1 else "zero2_config"
    return flags(data, output_dir, ranks=ranks, zero=zero, resume_from_ckpt="auto", **more, **augmented)


def test_ranks_and_resuming_change_nothing(tmp_path: Path) -> None:
    data = shard_folder(write_data(tmp_path / "loose"), tmp_path / "shards", rows=3, num_val=2)
    alone, resumed = tmp_path / "alone", tmp_path / "resumed"
    assert run_ranks(JOBS, "train_all", [run_flags(data, alone, 1)], world_size=1) == [[0]]
    shutil.copytree(alone, resumed)
    for folder in (resumed / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > STOP:
            shutil.rmtree(folder)
    assert run_ranks(JOBS, "train_all", [run_flags(data, resumed, 2)], world_size=2) == [[0]] * 2
    assert len(losses(alone)) == STEPS
    assert losses(resumed) == pytest.approx(losses(alone), rel=1e-4)
    assert losses(resumed)[STOP:] != losses(alone)[STOP:]  # they were computed, not copied
    assert distance(weights(resumed, STEPS), weights(alone, STEPS)) < 1e-4
    records = [json.loads(line) for line in (alone / "metrics.jsonl").read_text().splitlines()]
    assert any("val" in name for record in records for name in record)  # of the data set's val split
