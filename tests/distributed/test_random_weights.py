"""Networks that are built sharded have the weights and the frequencies of those that are built whole."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks

JOBS = Path(__file__).with_name("jobs.py")


@pytest.mark.distributed
def test_all_peers_of_the_benchmark_begin_alike(tmp_path: Path) -> None:
    found = set()
    for peer in ("zero3", "zero2", "fsdp2"):
        job = {"peer": peer, "folder": str(tmp_path)}
        found |= set(run_ranks(JOBS, "digest_of_random_weights", job, world_size=2, seconds=100))
    assert len(found) == 1
