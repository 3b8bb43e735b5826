"""Twenty steps straight are nine, a stop, and eleven more, bit for bit; across the border of a stage."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS, STOP = 20, 9

pytestmark = pytest.mark.distributed


def run_flags(data: Path, output_dir: Path, *, ranks: int, zero: str | None, **more: object) -> list[str]:
    # 16 samples, global batch 8: stages of 6, 6 and 8 steps; the stop is in stage 2, so that the point
    # projector resumes in the middle of its first stage and the image projector enters after the resume.
    stages = {f"stage{n}_epochs": e for n, e in ((1, 3), (2, 3), (3, 4))} | {
        f"stage{n}_lr": 3e-3 for n in (1, 2, 3)
    }
    return flags(data, output_dir, ranks=ranks, zero=zero, **stages, save_steps=STOP, **more)


def half_done(straight: Path, output_dir: Path) -> Path:
    """An output folder as a run leaves it that was killed after its checkpoint at STOP."""
    shutil.copytree(straight, output_dir)
    for folder in (output_dir / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > STOP:
            shutil.rmtree(folder)
    return output_dir


@pytest.mark.parametrize(
    ("zero", "ranks"), [(None, 1), ("zero2_config", 2), ("zero3_config", 2), ("zero3_offload", 2)]
)
def test_resume_is_exact(data: Path, tmp_path: Path, zero: str | None, ranks: int) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    assert (
        run_ranks(JOBS, "train_all", [run_flags(data, straight, ranks=ranks, zero=zero)], world_size=ranks)
        == [[0]] * ranks
    )
    half_done(straight, resumed)
    again = run_flags(data, resumed, ranks=ranks, zero=zero, resume_from_ckpt="auto")
    assert run_ranks(JOBS, "train_all", [again], world_size=ranks) == [[0]] * ranks
    curve, resumed_curve = losses(straight), losses(resumed)
    assert len(curve) == STEPS
    end, resumed_end = weights(straight, STEPS), weights(resumed, STEPS)
    if zero == "zero3_offload":  # the compiled CPU Adam is not exact itself
        assert resumed_curve == pytest.approx(curve, rel=1e-5)
        assert distance(resumed_end, end) < 1e-5
    else:
        assert resumed_curve == curve
        assert all(torch.equal(resumed_end[name], end[name]) for name in end)


def test_a_checkpoint_goes_on_under_another_zero_stage_and_world_size(data: Path, tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_ranks(JOBS, "train_all", [run_flags(data, straight, ranks=2, zero="zero2_config")], world_size=2)
    half_done(straight, resumed)
    again = run_flags(data, resumed, ranks=1, zero=None, resume_from_ckpt="auto")
    assert run_ranks(JOBS, "train_all", [again], world_size=1) == [[0]]
    assert losses(resumed) == pytest.approx(losses(straight), rel=1e-4)
    assert distance(weights(resumed, STEPS), weights(straight, STEPS)) < 1e-4
