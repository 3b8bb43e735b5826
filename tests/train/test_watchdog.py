"""A hang ends with the stacks of all threads and a code that a restart follows."""

import subprocess
import sys
import time
from pathlib import Path

from cad_mllm.errors import ExitCode
from cad_mllm.train.watchdog import Watchdog

HANGS = """
import sys, time
from pathlib import Path
from cad_mllm.train.watchdog import Watchdog

def waits_for_a_peer_that_is_gone():
    time.sleep(60)

with Watchdog(0.5, Path(sys.argv[1]), rank=3):
    waits_for_a_peer_that_is_gone()
"""


def test_a_process_that_makes_no_step_shows_its_stacks_and_ends(tmp_path: Path) -> None:
    started = time.monotonic()
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=50
    )
    assert time.monotonic() - started < 30
    assert ended.returncode == ExitCode.HUNG >= 128
    stacks = (tmp_path / "stacks-rank3.txt").read_text()
    assert "waits_for_a_peer_that_is_gone" in stacks and "waits_for_a_peer_that_is_gone" in ended.stderr
    assert "[rank 3] error: nothing was done for" in ended.stderr and "exit code 171" in ended.stderr


def test_steps_keep_it_quiet_and_so_does_the_end(tmp_path: Path) -> None:
    with Watchdog(0.4, tmp_path, rank=0) as watchdog:
        for _ in range(6):
            time.sleep(0.1)
            watchdog.beat()
    time.sleep(0.6)
    assert not list(tmp_path.iterdir())
