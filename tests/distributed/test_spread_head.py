"""The loss whose head is never gathered is the loss of the whole head, and so is its gradient."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

JOBS = Path(__file__).with_name("jobs.py")


def test_ranks_with_different_numbers_of_positions_compute_what_each_would_alone() -> None:
    for found in run_ranks(JOBS, "spread_cross_entropy", 3, world_size=2, seconds=60):
        assert len(found["whole"]) > 80 and any(found["whole"][2:])
        assert found["spread"] == pytest.approx(found["whole"], rel=1e-5, abs=1e-6)
