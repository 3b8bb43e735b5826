"""Two pods of one rank each, with the trainer itself: they lose one of them, and go on to the end."""

import re
import signal
import sys
from pathlib import Path

import pytest

from cad_mllm.errors import ExitCode
from cad_mllm.launch.main import HELP
from tests.distributed.ranks import ROOT, free_port
from tests.distributed.runs import losses
from tests.launch.launchers import Launcher, environment, is_running, pod, start, start_command, wait_until

pytestmark = pytest.mark.distributed
FLAGS = [
    "--config", "configs/train/tiny.yaml", "--deepspeed",
    "--deepspeed_config", "configs/deepspeed/ds_zero2_config.json",
    "--save_steps", "2", "--resume_from_ckpt", "auto",
]  # fmt: skip
STAGES, BATCH = 3, 2 * 2


def start_pods(output_dir: Path, *, samples: int) -> list[Launcher]:
    port = free_port()
    words = [*FLAGS, "--num_dummy_samples", str(samples), "--output_dir", str(output_dir)]
    command = [sys.executable, "-m", "cad_mllm.launch", *words]
    envs = [pod(n, nnodes=2, nproc=1, port=port, CAD_MLLM_WORLD_SIZE=2) for n in (0, 1)]
    return [start_command(command, output_dir, env) for env in envs]


def child_of(launcher: Launcher) -> int:
    pid = launcher.process.pid
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def test_two_pods_train_together_to_the_end(tmp_path: Path) -> None:
    ended = [launcher.end(280) for launcher in start_pods(tmp_path, samples=4)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert f"done: {STAGES} steps" in ended[0][1]
    assert (tmp_path / "checkpoints" / f"step-{STAGES:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_pods_lose_one_of_them_and_go_on_to_the_end(tmp_path: Path) -> None:
    samples = 16
    steps = STAGES * samples // BATCH
    metrics = tmp_path / "metrics.jsonl"
    first, second = start_pods(tmp_path, samples=samples)
    wait_until(lambda: metrics.exists() and len(losses(tmp_path)) >= 3, "three steps are done", 300)
    rank = child_of(second)
    second.process.kill()
    wait_until(lambda: not is_running(rank), "the rank is gone with its launcher", 10)
    code, output = first.end()
    assert code == ExitCode.PEER_LOST >= 128, output
    assert "[rank 0] error: another rank was lost, or the network to it" in output
    assert "--resume_from_ckpt auto" in output and "Traceback" not in output
    assert second.end()[0] == -signal.SIGKILL

    ended = [launcher.end(300) for launcher in start_pods(tmp_path, samples=samples)]
    assert [code for code, _ in ended] == [0, 0], ended
    assert re.search(r"resumed from .*step-\d+", ended[0][1])
    assert f"done: {steps} steps" in ended[0][1]
    assert len(losses(tmp_path)) == steps


def test_a_pod_that_loses_its_peer_ends_so_that_it_is_restarted(tmp_path: Path) -> None:
    """The same without the trainer: torch.distributed and the error handling of the trainer's ranks."""
    port = free_port()
    envs = [pod(n, nnodes=2, nproc=1, port=port) for n in (0, 1)]
    first, second = (start(tmp_path, "0=collectives", "1=collectives", env=env) for env in envs)
    for rank, launcher in enumerate((first, second)):
        launcher.pid_of(rank, "met")
    second.process.kill()
    code, output = first.end()
    assert code == ExitCode.PEER_LOST >= 128, output
    assert "[rank 0] error: another rank was lost, or the network to it" in output


def test_help_names_every_variable_and_every_exit_code() -> None:
    sources = "".join(p.read_text() for p in (ROOT / "cad_mllm" / "launch").glob("*.py"))
    read = set(re.findall(r'"((?:CAD_MLLM|PET)_[A-Z_]+)"', sources))
    assert len(read) > 8
    assert {name for name in read if name not in HELP} == set()
    of_training = set(ExitCode) - {ExitCode.CLUSTER, ExitCode.JOB}
    assert {code for code in of_training if not re.search(rf"(?<!\d){int(code)} ", HELP)} == set()
    assert max(map(len, HELP.splitlines())) <= 110


def test_help_is_what_the_image_shows_by_default(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cad_mllm.launch", "--help"]
    assert start_command(command, tmp_path, environment()).end() == (0, HELP)
