"""Packed training: the same steps and weights for every engine, any number of ranks, and a resume."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
RESUMED = "zero3_config-resumed"
RUNS = ("zero2_config", "zero3_config", RESUMED)
TUNING = {"lora": True, "full": False}
STEPS, STOP = 6, 3

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(600)]


def run_flags(data: Path, output_dir: Path, tuning: str, *, ranks: int, zero: str | None) -> list[str]:
    # Stage 3 alone: all combinations of modalities, so ranks differ in what their packs hold.
    more = {"start_from_stage": 3, "stage3_epochs": 16, "stage3_lr": 1e-3 if TUNING[tuning] else 5e-4}
    packs = {"max_seq_length": 512, "pack_tokens": 768, "use_gradient_checkpointing": True}
    fixed = {"projector_lr_multiplier": 1.0, "save_steps": STOP, "use_lora": TUNING[tuning]}
    return flags(
        data, output_dir, ranks=ranks, zero=zero, resume_from_ckpt="auto",
        keep_last_n_checkpoints=0, **more, **packs, **fixed,
    )  # fmt: skip


def resumed_from(straight: Path, output_dir: Path) -> Path:
    """A copy of a run as it stood after STOP steps."""
    shutil.copytree(straight, output_dir)
    for folder in (output_dir / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > STOP:
            shutil.rmtree(folder)
    return output_dir


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def outputs(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain on one rank; ZeRO on two, from the start, and ZeRO-3 from the plain run's checkpoint too."""
    root, tuning = tmp_path_factory.mktemp("packed"), str(request.param)
    plain = run_flags(data, root / "plain", tuning, ranks=1, zero=None)
    assert run_ranks(JOBS, "train_all", [plain], world_size=1) == [[0]]
    resumed_from(root / "plain", root / RESUMED)
    double = [
        run_flags(data, root / name, tuning, ranks=2, zero=name.removesuffix("-resumed")) for name in RUNS
    ]
    assert run_ranks(JOBS, "train_all", double, world_size=2, seconds=500) == [[0] * len(double)] * 2
    return root


def test_the_reference_learns(outputs: Path) -> None:
    curve = losses(outputs / "plain")
    assert len(curve) == STEPS
    assert curve[-1] < 0.85 * curve[0]


@pytest.mark.parametrize("run", RUNS)
def test_zero_on_two_ranks_agrees_with_plain_on_one(outputs: Path, run: str) -> None:
    ours, reference = outputs / run, outputs / "plain"
    assert losses(ours) == pytest.approx(losses(reference), rel=1e-5)
    assert distance(weights(ours, STEPS), weights(reference, STEPS)) < 1e-5
