"""The loss whose head is never gathered is the loss of the whole head, and so is its gradient."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import flags, losses

JOBS = Path(__file__).with_name("jobs.py")


def test_ranks_with_different_numbers_of_positions_compute_what_each_would_alone() -> None:
    for found in run_ranks(JOBS, "spread_cross_entropy", 3, world_size=2, seconds=60):
        assert len(found["whole"]) > 80 and any(found["whole"][2:])
        assert found["spread"] == pytest.approx(found["whole"], rel=1e-5, abs=1e-6)


def test_a_head_that_is_the_embeddings_trains_as_without_zero(data: Path, tmp_path: Path) -> None:
    def run(name: str, job: str, ranks: int, zero: str | None) -> list[float]:
        words = flags(data, tmp_path / name, ranks=ranks, zero=zero, start_from_stage=3, stage3_epochs=2)
        run_ranks(JOBS, job, [words], world_size=ranks, seconds=120)
        return losses(tmp_path / name)

    alone = run("alone", "train_with_tied_head", 1, None)
    assert run("together", "train_with_tied_head", 2, "zero3_config") == pytest.approx(alone, rel=1e-5)
    assert run("untied", "train_all", 1, None)[0] != pytest.approx(alone[0], rel=1e-3)
