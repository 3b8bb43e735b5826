"""Exit codes and signals: the launcher as it is, over processes that stand in for the trainer."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cad_mllm.launch.supervise import Ended, verdict
from tests.launch.launchers import Launcher, environment, is_running, pod, send, start, wait_until

pytestmark = pytest.mark.distributed
TWO = {"PET_NNODES": 1, "PET_NPROC_PER_NODE": 2}


def two_ranks(folder: Path, *words: str, **variables: object) -> Launcher:
    return start(folder, *words, env=environment(**TWO, **variables))


# --- what the ranks see ----------------------------------------------------------------------------


def test_each_rank_gets_its_own_environment_and_the_flags(tmp_path: Path) -> None:
    env = pod(1, nnodes=2, nproc=2, port=23456, CAD_MLLM_WORLD_SIZE=4, HF_HOME="/scratch/hf")
    run = start(tmp_path, "2=exit:0", "3=exit:0", env=env)
    code, output = run.end()
    assert code == 0, output
    for rank, local_rank in ((2, 0), (3, 1)):
        seen = run.seen_by(rank)
        expected = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "WORLD_SIZE": "4",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": "23456",
            "HF_HOME": "/scratch/hf",
            "PYTHONUNBUFFERED": "1",
        }
        assert {name: seen.get(name) for name in expected} == expected
    assert "world size 4 (pod 1 of 2, 2 processes each), 2 of them here, meeting at localhost:23456" in output


# --- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6])
def test_a_mistake_of_the_user_on_one_rank_is_the_code_of_all(code: int, tmp_path: Path) -> None:
    run = two_ranks(tmp_path, "0=wait", f"1=exit:{code}")
    ended, output = run.end()
    assert ended == code, output
    assert not is_running(run.pid_of(0))
    assert f"rank 1 ended with exit code {code}: ending the others" in output


def test_a_mistake_wins_over_a_peer_that_fell_before_it_was_told(tmp_path: Path) -> None:
    code, output = two_ranks(tmp_path, "0=exit:170", "1=late:4").end()
    assert code == 4, output


def test_a_bug_on_one_rank_is_not_retried(tmp_path: Path) -> None:
    code, output = two_ranks(tmp_path, "0=late:170", "1=exit:1").end()
    assert code == 1, output


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_rank_that_is_killed_ends_all_within_seconds(number: signal.Signals, tmp_path: Path) -> None:
    run = two_ranks(tmp_path, "0=stubborn", "1=parent")
    pids = [run.pid_of(0), run.pid_of(1), run.pid_of(1, "worker")]
    started = time.monotonic()
    send(run.pid_of(1), number)
    code, output = run.end()
    assert code == 128 + number, output
    assert time.monotonic() - started < 15
    assert f"rank 1 was ended by {number.name} (exit code {128 + number})" in output
    wait_until(lambda: not any(map(is_running, pids)), "ranks and their workers are gone")


def test_a_lost_peer_elsewhere_is_retried(tmp_path: Path) -> None:
    code, output = two_ranks(tmp_path, "0=exit:170", "1=exit:170").end()
    assert code == 170, output


def test_killing_the_launcher_leaves_no_rank_behind(tmp_path: Path) -> None:
    run = two_ranks(tmp_path, "0=stubborn", "1=stubborn")
    pids = [run.pid_of(0), run.pid_of(1)]
    run.process.kill()
    wait_until(lambda: not any(map(is_running, pids)), "the ranks are gone")
    assert run.end()[0] == -signal.SIGKILL


# --- signals ---------------------------------------------------------------------------------------


def test_sigterm_reaches_all_ranks_at_once_and_ends_with_143(tmp_path: Path) -> None:
    run = two_ranks(tmp_path)
    pids = [run.pid_of(0), run.pid_of(1)]
    run.process.terminate()
    code, output = run.end()
    assert code == 143, output
    (first, first_at), (second, second_at) = *run.signals_of(0), *run.signals_of(1)
    assert first == second == "SIGTERM"
    assert abs(first_at - second_at) < 2
    assert not any(map(is_running, pids))


def test_sigterm_after_one_rank_is_done_is_143_and_after_all_are_done_0(tmp_path: Path) -> None:
    run = two_ranks(tmp_path, "0=exit:0")
    run.pid_of(1)
    run.process.terminate()
    assert run.end()[0] == 143
    assert verdict([Ended(name="a", code=0, consequence=False)]) == 0


def test_a_rank_that_was_stopped_alone_has_the_others_stopped_too(tmp_path: Path) -> None:
    run = two_ranks(tmp_path)
    run.pid_of(0)
    send(run.pid_of(1), signal.SIGTERM)
    code, output = run.end()
    assert code == 143, output
    assert [name for name, _ in run.signals_of(0)] == ["SIGTERM"]


def test_every_sigint_is_passed_on(tmp_path: Path) -> None:
    run = two_ranks(tmp_path)
    for count in (1, 2):
        for rank in (0, 1):
            run.pid_of(rank)
        run.process.send_signal(signal.SIGINT)
        for rank in (0, 1):
            wait_until(lambda r=rank, n=count: len(run.signals_of(r)) == n, "the rank has the signal")  # type: ignore[misc]
    code, output = run.end()
    assert code == 130, output


def test_ranks_that_do_not_stop_in_time_are_killed_and_it_is_said(tmp_path: Path) -> None:
    run = two_ranks(tmp_path, "0=stubborn", CAD_MLLM_GRACE_SECONDS="1")
    pids = [run.pid_of(0), run.pid_of(1)]
    run.process.terminate()
    code, output = run.end()
    assert code == 137, output
    assert "killing rank 0: time is up" in output
    assert not any(map(is_running, pids))


def test_as_pid_1_it_passes_signals_on_and_reaps_orphans(tmp_path: Path) -> None:
    prefix = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespaces here (unshare --pid needs privileges)")
    run = start(tmp_path, "0=orphan", env=environment(**TWO), prefix=prefix)
    assert run.pid_of(0) < 20 and run.pid_of(1) < 20  # inside the namespace
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 1, "unshare has its child")
    init = int(children.read_text())
    of_init = Path(f"/proc/{init}/task/{init}/children")
    wait_until(lambda: len(of_init.read_text().split()) == 2, "only the two ranks are left")
    send(init, signal.SIGTERM)
    code, output = run.end()
    assert code == 143, output


# --- before the ranks are there --------------------------------------------------------------------


def test_another_world_size_than_the_expected_one_is_refused(tmp_path: Path) -> None:
    code, output = two_ranks(tmp_path, CAD_MLLM_WORLD_SIZE=4).end()
    assert code == 5
    assert output.count("\n") == 1 and "world size 2" in output and "CAD_MLLM_WORLD_SIZE says 4" in output
    assert list(tmp_path.iterdir()) == []


UNKNOWN = "cad-mllm-zero3-master-0.invalid"


def test_the_wait_for_the_master_is_bounded_and_says_what_to_check(tmp_path: Path) -> None:
    env = pod(1, nnodes=2, nproc=1, port=1, PET_MASTER_ADDR=UNKNOWN, CAD_MLLM_DNS_SECONDS="1.5")
    started = time.monotonic()
    code, output = start(tmp_path, env=env).end()
    assert code == 5
    assert time.monotonic() - started < 10
    assert f"waiting for the name {UNKNOWN}" in output
    assert f"waited 1.5 s (CAD_MLLM_DNS_SECONDS) for DNS to know {UNKNOWN}" in output
    assert "kubectl get pods" in output and "NetworkPolicy" in output


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_during_the_wait_is_prompt(number: signal.Signals, expected: int, tmp_path: Path) -> None:
    env = pod(1, nnodes=2, nproc=1, port=1, PET_MASTER_ADDR=UNKNOWN)
    run = start(tmp_path, env=env)
    assert run.process.stdout is not None
    assert "waiting for the name" in run.process.stdout.readline()
    started = time.monotonic()
    run.process.send_signal(number)
    code, output = run.end()
    assert code == expected, output
    assert time.monotonic() - started < 10
    assert f"stopped by {number.name} before the ranks were started" in output


def test_a_stop_that_came_before_the_ranks_starts_none(tmp_path: Path) -> None:
    """Signals that are pending when the launcher begins, as in a pod that is deleted while it starts."""
    blocked = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM]);"
        "os.kill(os.getpid(), signal.SIGTERM); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    stub = Path(__file__).with_name("stub.py")
    done = subprocess.run(
        [sys.executable, "-c", blocked, str(stub), "launcher", json.dumps({}), "--output_dir", str(tmp_path)],
        env=environment(**TWO),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 143, done.stderr
    assert list(tmp_path.iterdir()) == []


# --- the rule --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codes", "expected"),
    [
        ([0, 0], 0),
        ([0, 143], 143),
        ([170, 170, 2], 2),
        ([1, 3], 3),
        ([170, 1], 1),
        ([137, 143, 170], 137),
        ([170, 134], 134),
        ([143, 170], 170),
        ([143, 130], 130),
        ([4, 3], 4),
        ([143, -137], 143),
        ([139, -137, -143], 139),
        ([2, -137], 2),
    ],
)
def test_the_code_is_that_of_the_cause(codes: list[int], expected: int) -> None:
    """In the order of ending; negative: ended by the launcher because another one had failed."""
    ended = [Ended(name=str(n), code=abs(code), consequence=code < 0) for n, code in enumerate(codes)]
    assert verdict(ended) == expected
