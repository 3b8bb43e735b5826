"""Items made ahead by processes that hold nothing of the process that trains, and go when it goes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cad_mllm.data.prefetch import prefetched
from cad_mllm.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
MB = 2**20


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


class Calls:
    """Items that are what `call` gives for their number; -1 stands for one that cannot be made."""

    def __init__(self, call: Callable[[int], int], length: int = 6) -> None:
        self._call = call
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, number: int) -> int:
        return self._call(number)

    def without(self, number: int, reason: str) -> int:
        return -1


def memory_of_a_worker(number: int) -> int:
    return own_memory()


def die_of_the_third(number: int) -> int:
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def bear_ctrl_c(number: int) -> int:
    os.kill(os.getpid(), signal.SIGINT)
    return number


def tell_process(number: int) -> int:
    return os.getpid()


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_items_come_in_their_order(num_workers: int) -> None:
    assert list(prefetched(Calls(int), num_workers, pin_memory=False)) == list(range(6))


def test_a_worker_keeps_no_memory_of_the_process_that_reads_from_it() -> None:
    """What a fork keeps, an optimiser in host memory has to write anew with each update."""
    state = np.ones(600 * MB, np.uint8)
    assert own_memory() > 600 * MB
    for found in prefetched(Calls(memory_of_a_worker), 2, pin_memory=False):
        assert found < 300 * MB
    assert state[-1] == 1


@pytest.mark.usefixtures("deaths_noticed_soon")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_item_of_which_a_worker_dies_is_lost_alone(num_workers: int) -> None:
    found = list(prefetched(Calls(die_of_the_third), num_workers, pin_memory=False))
    assert found == [0, 1, -1, 3, 4, 5]


def test_ctrl_c_is_not_for_the_workers() -> None:
    assert list(prefetched(Calls(bear_ctrl_c), 2, pin_memory=False)) == list(range(6))


def test_a_folder_too_long_for_sockets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/" + 75 * "x")
    assert len(list(prefetched(Calls(int), 0, pin_memory=False))) == 6
    with pytest.raises(ConfigError, match=r"/x+ is too long .* export TMPDIR=/tmp"):
        list(prefetched(Calls(int), 1, pin_memory=False))


def test_workers_end_with_a_reader_that_was_killed() -> None:
    reading = subprocess.Popen(
        [sys.executable, __file__], cwd=ROOT, stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert reading.stdout is not None
    worker = int(reading.stdout.readline())
    reading.kill()
    reading.wait()
    for _ in range(300):
        if not Path(f"/proc/{worker}").exists():
            break
        time.sleep(0.1)
    else:
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker lives on")


if __name__ == "__main__":
    for item in prefetched(Calls(tell_process, 1000), 1, pin_memory=False):
        print(item, flush=True)
        time.sleep(60)
