"""The launcher pod of an MPIJob: the mpirun it composes, and the codes that come back."""

import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cad_mllm.errors import PreflightError
from cad_mllm.launch import mpi
from cad_mllm.launch.mpi import Host
from cad_mllm.launch.place import read_place
from tests.launch.launchers import Launcher, environment, is_running, send, start, wait_until

HOSTS = (Host(name="job-worker-0.job.ns.svc", slots=1), Host(name="job-worker-1.job.ns.svc", slots=1))
POD_ENV = {
    "PATH": "/opt/venv/bin:/usr/bin",
    "HOME": "/scratch/home",
    "TMPDIR": "/scratch/tmp",
    "TRITON_CACHE_DIR": "/scratch/triton",
    "XDG_CACHE_HOME": "/scratch/cache",
    "MPLCONFIGDIR": "/scratch/matplotlib",
    "HF_HOME": "/scratch/hf",
    "HF_TOKEN": "hf_secret",
    "WANDB_API_KEY": "wandb-secret",
    "NCCL_DEBUG": "INFO",
    "CUDA_VISIBLE_DEVICES": "",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
    "NVIDIA_VISIBLE_DEVICES": "",
    "KUBERNETES_SERVICE_HOST": "10.0.0.1",
    "CAD_MLLM_MIN_SHM_GB": "8",
    "https_proxy": "http://proxy:3128",
    "HOSTNAME": "job-launcher-x",
}


def test_mpirun_is_composed_from_the_hostfile_and_the_environment() -> None:
    env = mpi.ranks_environment(POD_ENV, HOSTS)
    command = mpi.mpirun_command(HOSTS, env, ["python", "-m", "cad_mllm.launch"], hostfile=Path("/h"))
    assert command == [
        "mpirun", "--hostfile", "/h", "-n", "2", "-N", "1", "--bind-to", "none",
        "-x", "CAD_MLLM_MIN_SHM_GB",
        "-x", "CAD_MLLM_WORLD_SIZE",
        "-x", "CUDA_DEVICE_MAX_CONNECTIONS",
        "-x", "HF_HOME",
        "-x", "HF_TOKEN",
        "-x", "HOME",
        "-x", "MASTER_ADDR",
        "-x", "MASTER_PORT",
        "-x", "MPLCONFIGDIR",
        "-x", "NCCL_DEBUG",
        "-x", "PATH",
        "-x", "TMPDIR",
        "-x", "TRITON_CACHE_DIR",
        "-x", "WANDB_API_KEY",
        "-x", "XDG_CACHE_HOME",
        "-x", "https_proxy",
        "python", "-m", "cad_mllm.launch",
    ]  # fmt: skip
    assert not any("secret" in word for word in command)
    assert env["MASTER_ADDR"] == "job-worker-0.job.ns.svc"
    assert env["CAD_MLLM_WORLD_SIZE"] == "2"


def test_workers_of_different_size_are_filled_by_their_slots() -> None:
    hosts = (Host(name="a", slots=4), Host(name="b", slots=2))
    command = mpi.mpirun_command(hosts, {}, ["x"], hostfile=Path("/h"))
    assert command[:5] == ["mpirun", "--hostfile", "/h", "-n", "6"]
    assert "-N" not in command


def test_the_hostfile_is_read_as_the_operator_writes_it(tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text("# workers\njob-worker-0.job.ns.svc slots=2\n\njob-worker-1.job.ns.svc\n")
    assert mpi.read_hostfile(path) == (
        Host(name="job-worker-0.job.ns.svc", slots=2),
        Host(name="job-worker-1.job.ns.svc", slots=1),
    )


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("", "lists no worker"), ("a slots=0\n", "expected `name slots=N`"), ("a:2 b c\n", "expected `name")],
)
def test_a_hostfile_of_another_form_is_refused(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "hostfile"
    path.write_text(text)
    with pytest.raises(PreflightError, match=complaint):
        mpi.read_hostfile(path)


def test_a_rank_that_finds_another_world_than_the_hostfile_is_refused() -> None:
    """As with Open MPI 5, which ignores the operator's hostfile setting and reports success."""
    env = mpi.ranks_environment(POD_ENV, HOSTS)
    numbers = {"RANK": "0", "SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    alone = {f"OMPI_COMM_WORLD_{name}": value for name, value in numbers.items()}
    with pytest.raises(PreflightError, match=r"world size 1 .* CAD_MLLM_WORLD_SIZE says 2"):
        read_place({**env, **alone}, gpus=1)


def test_a_hostfile_that_contradicts_the_expected_world_is_refused() -> None:
    with pytest.raises(PreflightError, match=r"world size 2 .* CAD_MLLM_WORLD_SIZE says 4"):
        mpi.ranks_environment({"CAD_MLLM_WORLD_SIZE": "4"}, HOSTS)


@pytest.mark.parametrize(
    ("says", "complaint"),
    [
        ("mpirun (Open MPI) 5.0.3", "version 5 ignores"),
        ("HYDRA build details", "an MPIJob needs Open MPI 4.1"),
        (None, "no mpirun in this image"),
    ],
)
def test_only_open_mpi_4_is_accepted(says: str | None, complaint: str, tmp_path: Path) -> None:
    if says is not None:
        program = tmp_path / "mpirun"
        program.write_text(f"#!/bin/sh\necho '{says}'\n")
        program.chmod(0o755)
    with pytest.raises(PreflightError, match=re.escape(complaint)):
        mpi.check_version({"PATH": str(tmp_path)})


@pytest.mark.parametrize(
    ("of_mpirun", "of_the_job"),
    [
        (0, 0), (2, 2), (4, 4), (5, 5), (6, 6),
        (125, 1),  # a rank's bug
        (143, 143), (137, 137), (134, 134), (170, 170),
        (1, 170), (205, 170), (255, 170),  # mpirun's own: a worker cannot be reached, or is lost
        (138, 143), (140, 130),  # the request to stop came before mpirun could pass it on
    ],
)  # fmt: skip
def test_what_the_code_of_mpirun_means(of_mpirun: int, of_the_job: int) -> None:
    stops = {signal.SIGUSR1: signal.SIGTERM, signal.SIGUSR2: signal.SIGINT}
    assert mpi.code_of_mpirun(of_mpirun, ended_by=stops) == of_the_job


# --- mpirun itself ---------------------------------------------------------------------------------

needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="no mpirun here (apt-get install openmpi-bin); the image has one"
)
Job = Callable[..., Launcher]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Starts a launcher pod whose one worker, with two slots, is this machine."""
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("localhost slots=2\n")
    folder = tmp_path / "out"
    folder.mkdir()
    return lambda *words, **variables: start(
        folder, *words, env=environment(**variables), hostfile=str(hostfile)
    )


@needs_mpirun
@pytest.mark.distributed
def test_mpirun_starts_the_ranks_and_each_knows_its_place(job: Job) -> None:
    run = job("0=exit:0", "1=exit:0", WANDB_API_KEY="wandb-secret", CAD_MLLM_OVERLAY="mpi-zero3")
    code, output = run.end()
    assert code == 0, output
    assert "wandb-secret" not in output
    for rank in (0, 1):
        seen = run.seen_by(rank)
        assert (seen["RANK"], seen["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (seen["WORLD_SIZE"], seen["LOCAL_WORLD_SIZE"]) == ("2", "2")
        assert (seen["MASTER_ADDR"], seen["MASTER_PORT"]) == ("localhost", "29500")
        assert (seen["WANDB_API_KEY"], seen["CAD_MLLM_OVERLAY"]) == ("wandb-secret", "mpi-zero3")


@needs_mpirun
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["1=exit:4"], 4),
        (["1=exit:1"], 1),
        (["0=exit:170", "1=late:4"], 4),
        (["1=signal:9"], 137),
        (["0=exit:170", "1=exit:170"], 170),
    ],
)
def test_mpirun_hands_the_code_of_the_cause_on(job: Job, words: list[str], expected: int) -> None:
    run = job(*words)
    code, output = run.end()
    assert code == expected, output
    wait_until(lambda: not any(is_running(run.pid_of(rank)) for rank in (0, 1)), "the ranks are gone")


@needs_mpirun
@pytest.mark.distributed
def test_through_mpirun_the_ranks_get_time_for_a_checkpoint(job: Job) -> None:
    """mpirun itself would kill them two seconds after a SIGTERM, and return 1."""
    run = job()
    for rank in (0, 1):
        run.pid_of(rank)
    run.process.terminate()
    code, output = run.end()
    assert code == 143, output
    for rank in (0, 1):
        assert [name for name, _ in run.signals_of(rank)] == ["SIGTERM"]


@needs_mpirun
@pytest.mark.distributed
def test_a_launcher_pod_that_is_killed_leaves_no_rank_behind(job: Job) -> None:
    run = job("0=stubborn", "1=stubborn")
    pids = [run.pid_of(rank) for rank in (0, 1)]
    started = time.monotonic()
    send(run.process.pid, signal.SIGKILL)
    wait_until(lambda: not any(map(is_running, pids)), "the ranks are gone")
    assert time.monotonic() - started < 10
    run.end()
