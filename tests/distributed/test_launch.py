"""The training entry as people start it: deepspeed, torchrun, plain python; and how it ends."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cad_mllm.train import checkpoint
from tests.distributed.ranks import ROOT, free_port, run_ranks
from tests.distributed.runs import flags, losses

ENTRY = "cad_mllm/train_curriculum.py"
BIN = Path(sys.executable).parent
ZERO3 = "configs/deepspeed/ds_zero3_config.json"
# The quick test of the old manual on a CPU: tiny, sdpa, fp32 (bf16 is slow there), few samples and processes.
QUICK_TEST = [
    "--deepspeed", "--deepspeed_config", ZERO3, "--create_dummy_data", "--num_dummy_samples", "4",
    "--batch_size", "2", "--stage1_epochs", "1", "--stage2_epochs", "1", "--stage3_epochs", "1",
    "--use_gradient_checkpointing", "--attn_implementation", "sdpa", "--llm_model_name", "tiny",
    "--dtype", "float32", "--num_workers", "1",
]  # fmt: skip

pytestmark = pytest.mark.distributed


def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: "subprocess.Popen[str]", seconds: float = 240) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, output


@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(["deepspeed", "--num_gpus=2", "--master_port={port}"], id="deepspeed"),
        pytest.param(
            ["torchrun", "--nproc_per_node=2", "--master_port={port}"], id="torchrun", marks=pytest.mark.slow
        ),
        pytest.param(["python"], id="python"),
    ],
)
def test_the_quick_test_of_the_old_manual_runs(launcher: list[str], tmp_path: Path) -> None:
    words = [word.format(port=free_port()) for word in launcher]
    code, output = finish(
        start([str(BIN / words[0]), *words[1:], ENTRY, *QUICK_TEST, "--output_dir", str(tmp_path)])
    )
    assert code == 0, output
    assert len(losses(tmp_path)) == 3
    newest = checkpoint.find("auto", tmp_path, print)
    assert newest is not None and checkpoint.read_state(newest).position.stage == 3
    log = (tmp_path / "deepspeed_rank0.log").read_text()
    assert "communication of one micro-batch" in log and "reduce_scatter" in log
    assert (tmp_path / "dummy_data" / "train" / "txt" / "0000.json").is_file()


def start_and_wait_for_three_steps(data: Path, out: Path) -> "subprocess.Popen[str]":
    words = flags(data, out, ranks=1, zero=None, stage1_epochs=200, stage2_epochs=0, stage3_epochs=0)
    process = start([sys.executable, ENTRY, *words])
    metrics = out / "metrics.jsonl"
    end = time.monotonic() + 120
    while time.monotonic() < end and not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        time.sleep(0.1)
    return process


def test_a_crash_of_native_code_leaves_the_stacks(data: Path, tmp_path: Path) -> None:
    process = start_and_wait_for_three_steps(data, tmp_path)
    process.send_signal(signal.SIGSEGV)
    code, output = finish(process, 60)
    assert code == -signal.SIGSEGV, output
    assert "Fatal Python error: Segmentation fault" in output and "trainer.py" in output


def test_sigterm_ends_with_143_after_a_checkpoint_and_the_run_goes_on(data: Path, tmp_path: Path) -> None:
    process = start_and_wait_for_three_steps(data, tmp_path)
    metrics = tmp_path / "metrics.jsonl"
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 60)
    assert code == 143, output
    newest = checkpoint.find("auto", tmp_path, print)
    assert newest is not None
    at = checkpoint.read_state(newest).position
    assert at.global_step == len(losses(tmp_path)) >= 3
    again = flags(
        data,
        tmp_path,
        ranks=1,
        zero=None,
        stage1_epochs=200,
        stage2_epochs=0,
        stage3_epochs=0,
        resume_from_ckpt="auto",
    )
    process = start([sys.executable, ENTRY, *again])
    while process.poll() is None and len(losses(tmp_path)) < at.global_step + 2:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    code, output = finish(process, 60)
    assert code == 143 and f"resumed from {newest}" in output, output
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_a_stop_does_not_wait_for_the_end_of_validation(data: Path, tmp_path: Path) -> None:
    more = {"start_from_stage": 2, "stage2_epochs": 4, "stage3_epochs": 0, "save_steps": 3}
    words = flags(data, tmp_path, ranks=2, zero="zero2_config", val_data_path=data, **more)
    jobs = Path(__file__).with_name("jobs.py")
    # 8 samples with two mixes are 8 micro-batches for each rank: all leave after the first.
    answers = run_ranks(jobs, "train_and_stop_in_validation", {"flags": words}, world_size=2)
    assert answers == [[143, 1]] * 2
    newest = checkpoint.find("auto", tmp_path, print)
    assert newest is not None and checkpoint.read_state(newest).position.global_step == 3
    assert "val" not in (tmp_path / "metrics.jsonl").read_text()


def test_several_processes_without_deepspeed_are_refused(tmp_path: Path) -> None:
    launcher = [str(BIN / "torchrun"), "--nproc_per_node=2", f"--master_port={free_port()}"]
    code, output = finish(
        start([*launcher, ENTRY, "--llm_model_name", "tiny", "--output_dir", str(tmp_path)])
    )
    assert code != 0
    assert "add --deepspeed --deepspeed_config" in output and "exit code 2" in output
    assert "cad_mllm/cli.py" not in output  # torchrun shows a traceback of its own, we show none


def test_ranks_that_do_not_share_the_output_folder_are_refused(data: Path, tmp_path: Path) -> None:
    words = flags(data, tmp_path / "out", ranks=2, zero="zero2_config")
    answers = run_ranks(Path(__file__).with_name("jobs.py"), "refused_in_own_folders", words, world_size=2)
    for answer in answers:
        assert answer.startswith("5 configuration: --output_dir is ")
        assert "1 of 2 ranks do not see" in answer and "ReadWriteMany" in answer
