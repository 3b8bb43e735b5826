"""Two GPUs read frozen shards and rows of a table out of each other's memory."""

from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks

JOBS = Path(__file__).with_name("jobs.py")


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_what_two_gpus_read_of_each_other_is_what_was_shared_out() -> None:
    for found in run_ranks(JOBS, "read_from_peers", 3, world_size=2, accelerator="cuda"):
        assert found == {"mapped": True, "weights": True, "rows": True, "forbidden": True}
