"""Twelve steps straight are six, a stop, and six more, bit for bit; across the border of a stage."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS, STOP = 12, 6
# Two ranks under each ZeRO configuration, one process without DeepSpeed.
RANKS = {"plain": 1, "zero2_config": 2, "zero3_config": 2, "zero3_offload": 2}

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(1100)]


def run_flags(data: Path, output_dir: Path, engine: str, **more: object) -> list[str]:
    # 8 samples, global batch 4: stages of 4 steps each; the stop is in stage 2, so that the point
    # projector resumes in the middle of its first stage and the image projector enters after the resume.
    stages = {f"stage{n}_epochs": 2 for n in (1, 2, 3)}
    rates = {f"stage{n}_lr": 3e-3 for n in (1, 2, 3)}
    zero = None if engine == "plain" else engine
    return flags(data, output_dir, ranks=RANKS[engine], zero=zero, **stages, **rates, save_steps=STOP, **more)


def half_done(straight: Path, output_dir: Path) -> Path:
    """An output folder as a run leaves it that was killed after its checkpoint at STOP."""
    shutil.copytree(straight, output_dir)
    for folder in (output_dir / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > STOP:
            shutil.rmtree(folder)
    return output_dir


def train(runs: list[list[str]], ranks: int) -> None:
    assert run_ranks(JOBS, "train_all", runs, world_size=ranks, seconds=500) == [[0] * len(runs)] * ranks


@pytest.fixture(scope="module")
def outputs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Straight runs, the same resumed in new processes, and a ZeRO-2 checkpoint resumed without DeepSpeed."""
    root = tmp_path_factory.mktemp("resume")
    for ranks in (1, 2):
        engines = [engine for engine, size in RANKS.items() if size == ranks]
        train([run_flags(data, root / engine, engine) for engine in engines], ranks)
    for ranks in (1, 2):
        resumed = []
        for engine in (engine for engine, size in RANKS.items() if size == ranks):
            half_done(root / engine, root / f"{engine}-resumed")
            resumed.append(run_flags(data, root / f"{engine}-resumed", engine, resume_from_ckpt="auto"))
        if ranks == 1:
            half_done(root / "zero2_config", root / "moved")
            resumed.append(run_flags(data, root / "moved", "plain", resume_from_ckpt="auto"))
        train(resumed, ranks)
    return root


@pytest.mark.parametrize("engine", RANKS)
def test_resume_is_bit_for_bit(outputs: Path, engine: str) -> None:
    straight, resumed = outputs / engine, outputs / f"{engine}-resumed"
    assert len(losses(straight)) == STEPS
    assert losses(resumed) == losses(straight)
    end, resumed_end = weights(straight, STEPS), weights(resumed, STEPS)
    assert end.keys() == resumed_end.keys()
    assert all(torch.equal(resumed_end[name], end[name]) for name in end)


def test_a_zero2_checkpoint_of_two_ranks_goes_on_in_one_process_without_deepspeed(outputs: Path) -> None:
    straight, moved = outputs / "zero2_config", outputs / "moved"
    assert losses(moved)[:STOP] == losses(straight)[:STOP]
    assert losses(moved) == pytest.approx(losses(straight), rel=1e-4)
    assert distance(weights(moved, STEPS), weights(straight, STEPS)) < 1e-4
