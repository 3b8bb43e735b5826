"""Worker processes: limits hold per item, and one bad item costs nothing but itself."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cad_mllm.cad.worker import on_one_core, peak_memory_mb, run_in_order, run_limited
from cad_mllm.errors import CadError


def misbehave(how: str) -> str:
    match how:
        case "sleep":
            time.sleep(60)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "exit":
            os._exit(3)
        case "allocate":
            return str(len(bytearray(3 * 2**30)))
        case "refuse":
            raise CadError("this model is bad")
        case "bug":
            raise ZeroDivisionError("a bug")
    return how.upper()


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_each_item_has_its_own_limits_and_the_others_are_fine() -> None:
    items = ["a", "sleep", "b", "kill", "c", "allocate", "d", "exit", "e", "refuse", "f"]
    results = dict(run_limited(misbehave, items, workers=2, seconds=2, memory_mb=1024))
    errors = {items[i]: str(r) for i, r in results.items() if isinstance(r, CadError)}
    assert {results[i] for i, item in enumerate(items) if len(item) == 1} == set("ABCDEF")
    assert errors == {
        "sleep": "the model took longer than 2 s",
        "kill": "the worker died on the model (signal 9: SIGKILL)",
        "allocate": "the model needs more than 1024 MB",
        "exit": "the worker died on the model (exit code 3)",
        "refuse": "this model is bad",
    }


@pytest.mark.parametrize("batch", [4, 100])
def test_limits_hold_per_item_when_they_come_in_batches(batch: int) -> None:
    items = ["a", "sleep", "b", "kill", "c", "allocate", "refuse", "exit", *"defghijklm"]
    outcomes = list(run_limited(misbehave, items, workers=2, seconds=2, memory_mb=1024, batch=batch))
    results = dict(outcomes)
    assert sorted(index for index, _ in outcomes) == list(range(len(items)))
    assert {items[i]: str(r) for i, r in results.items() if isinstance(r, CadError)} == {
        "sleep": "the model took longer than 2 s",
        "kill": "the worker died on the model (signal 9: SIGKILL)",
        "allocate": "the model needs more than 1024 MB",
        "exit": "the worker died on the model (exit code 3)",
        "refuse": "this model is bad",
    }
    assert {results[i] for i, item in enumerate(items) if len(item) == 1} == set("ABCDEFGHIJKLM")


def test_a_bug_in_a_batch_is_raised() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(run_limited(misbehave, ["a", "refuse", "bug", "b"], workers=1, seconds=10, batch=4))
    assert not multiprocessing.active_children()


def test_a_bug_is_raised_not_set_aside() -> None:
    with pytest.raises(ZeroDivisionError, match="a bug"):
        list(run_limited(misbehave, ["a", "bug"], workers=1, seconds=10))
    assert not multiprocessing.active_children()


def test_results_stream_and_leaving_early_ends_the_workers() -> None:
    started = time.monotonic()
    results = run_limited(pid_after, [0.0, 60.0, 60.0], workers=2, seconds=100)
    index, pid = next(results)
    assert index == 0 and isinstance(pid, int)
    results.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 30
    assert not multiprocessing.active_children()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_that_are_still_starting_end_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    """They find the pool's locks by name, and the names go when the pool is stopped."""
    for _ in range(3):
        results = run_limited(pid_after, [0.0] * 8, workers=8, seconds=10)
        next(results)
        results.close()
    assert capfd.readouterr().err == ""


def test_no_more_workers_are_started_than_there_are_items() -> None:
    results = run_limited(pid_after, iter([0.0, 60.0]), workers=8, seconds=100)
    next(results)
    assert len(multiprocessing.active_children()) <= 2
    results.close()


def test_workers_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "from cad_mllm.cad.worker import on_one_core, peak_memory_mb, run_in_order, run_limited\n"
        "from tests.cad.test_worker import pid_after\n"
        "if __name__ == '__main__':\n"
        "    for _, pid in run_limited(pid_after, [0.0, 60.0, 60.0], workers=1, seconds=100):\n"
        "        print(pid, flush=True)\n"
    )
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        assert int(parent.stdout.readline()) != parent.pid
        parent.kill()
        parent.wait()
        killed = time.monotonic()
        assert parent.stdout.read() == ""  # ends when the last process that could write is gone
    assert time.monotonic() - killed < 30


def test_a_long_iterable_is_read_only_as_far_as_needed() -> None:
    read = []

    def items():  # type: ignore[no-untyped-def]
        for i in range(10**6):
            read.append(i)
            yield 0.0

    results = run_limited(pid_after, items(), workers=1, seconds=10)
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert len(read) < 20


def test_no_items_no_results() -> None:
    assert list(run_limited(misbehave, [], workers=2, seconds=1)) == []


def slow_first(item: int) -> tuple[int, int]:
    """The first takes longest, so that the others are finished before it."""
    time.sleep(1.0 if item == 0 else 0.0)
    if item == 2:
        raise CadError("this model is bad")
    return item, peak_memory_mb()


def test_results_come_in_the_order_of_the_items_if_asked_for() -> None:
    ballast = bytearray(300 * 2**20)  # of the parent, which is no memory of the workers
    found = list(run_in_order(slow_first, iter(range(5)), workers=2, seconds=10))
    assert [item for item, _ in found] == [0, 1, 2, 3, 4]
    assert isinstance(found[2][1], CadError)
    for item, outcome in found[:2] + found[3:]:
        assert not isinstance(outcome, CadError)
        assert outcome[0] == item
        assert 5 < outcome[1] < 300
    assert len(ballast) == 300 * 2**20


def test_leaving_early_in_order_ends_the_workers_too() -> None:
    stream = run_in_order(slow_first, range(1, 100), workers=2, seconds=10)
    next(stream)
    stream.close()
    assert not multiprocessing.active_children()


def test_one_core_is_all_there_is_within_the_block() -> None:
    before = os.sched_getaffinity(0)
    with on_one_core():
        assert len(os.sched_getaffinity(0)) == 1
    assert os.sched_getaffinity(0) == before
