"""A rank that does not come back: every rank says where it stands, and ends with a code that is restarted."""

import time
from pathlib import Path

import pytest

from cad_mllm.errors import ExitCode
from tests.distributed.ranks import start_ranks
from tests.distributed.runs import flags

JOBS = Path(__file__).with_name("jobs.py")

pytestmark = pytest.mark.distributed


def test_a_rank_that_sleeps_ends_the_run_with_the_stacks_of_all(data: Path, tmp_path: Path) -> None:
    words = flags(data, tmp_path, ranks=2, zero="zero3_config", hang_timeout_minutes=0.2)
    stacks = [tmp_path / f"stacks-rank{rank}.txt" for rank in range(2)]
    with start_ranks(JOBS, "train_and_fall_asleep", {"flags": words}, world_size=2) as ranks:
        end = time.monotonic() + 200
        while time.monotonic() < end and not all(path.exists() for path in stacks):
            time.sleep(0.1)
        time.sleep(2.0)
        codes = ranks.wait(10)
        output = ranks.output()
    assert codes == [ExitCode.HUNG] * 2, output
    assert "falls_asleep" in stacks[1].read_text()
    assert "_train_step" in stacks[0].read_text()
    assert output.count("--hang_timeout_minutes") == 2
