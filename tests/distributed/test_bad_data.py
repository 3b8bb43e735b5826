"""A file that turns unreadable under way: its sample is set aside on all ranks, and the run goes on."""

import json
from pathlib import Path

import pytest

from tests.distributed.conftest import write_data
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS = 6

pytestmark = pytest.mark.distributed


def train(root: Path, zero: str | None) -> Path:
    """A run in which the points of two samples are damaged after the index was built."""
    data, out = write_data(root / "data"), root / "out"
    more = {"start_from_stage": 3, "stage3_epochs": 3, "stage3_lr": 1e-3, "projector_lr_multiplier": 1.0}
    ranks = 1 if zero is None else 2
    words = flags(data, out, ranks=ranks, zero=zero, max_skipped_fraction=0.3, num_workers=1, **more)
    torn = [str(path) for path in sorted(data.glob("pcd/0000/*.npz"))[2:4]]
    job = {"flags": words, "torn": torn}
    assert run_ranks(JOBS, "train_with_torn_files", job, world_size=ranks) == [[0]] * ranks
    return out


def test_the_ranks_stay_in_step_and_learn_what_one_process_learns(tmp_path: Path) -> None:
    plain, sharded = train(tmp_path / "plain", None), train(tmp_path / "zero3", "zero3_config")
    assert len(losses(plain)) == STEPS
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-5)
    assert distance(weights(sharded, STEPS), weights(plain, STEPS)) < 1e-5
    listed = [json.loads(line) for line in (sharded / "skipped.jsonl").read_text().splitlines()]
    assert {line["id"] for line in listed} == {"0000/00000002_00001", "0000/00000003_00001"}
    assert all("unreadable points" in line["reason"] for line in listed)
