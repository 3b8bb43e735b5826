"""One run on four ranks, then on two under another ZeRO stage, then on one: the loss goes on unchanged."""

import shutil
from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS = 20
# (first step that it trains, ranks, engine); the borders of the stages are at 6 and 12.
PARTS = ((0, 4, "zero2_config"), (7, 2, "zero3_config"), (14, 1, None))
TUNING = {"lora": True, "full": False}

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(900)]


def run_flags(data: Path, output_dir: Path, tuning: str, ranks: int, zero: str | None) -> list[str]:
    stages = {f"stage{n}_epochs": e for n, e in ((1, 3), (2, 3), (3, 4))}
    rates = {f"stage{n}_lr": 1e-3 for n in (1, 2, 3)}
    more = {"use_lora": TUNING[tuning], "save_steps": 7, "keep_last_n_checkpoints": 0}
    return flags(data, output_dir, ranks=ranks, zero=zero, resume_from_ckpt="auto", **stages, **rates, **more)


def cut(straight: Path, output_dir: Path, step: int) -> None:
    """Leave `output_dir` as a run that was stopped after `step` steps does."""
    if not output_dir.exists():
        shutil.copytree(straight, output_dir)
    for folder in (output_dir / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)


@pytest.fixture(scope="module")
def outputs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("resize")
    for start, ranks, zero in PARTS:
        runs = []
        for tuning in TUNING:
            straight, resized = root / f"{tuning}-straight", root / f"{tuning}-resized"
            if start:
                cut(straight, resized, start)
            runs.append(run_flags(data, resized if start else straight, tuning, ranks, zero))
        codes = run_ranks(JOBS, "train_all", runs, world_size=ranks, seconds=400)
        assert codes == [[0] * len(runs)] * ranks
    return root


@pytest.mark.parametrize("tuning", TUNING)
def test_the_loss_goes_on_whatever_the_ranks_and_the_engine(outputs: Path, tuning: str) -> None:
    straight, resized = outputs / f"{tuning}-straight", outputs / f"{tuning}-resized"
    assert len(losses(straight)) == STEPS
    assert losses(resized) == pytest.approx(losses(straight), rel=1e-3)
    assert losses(resized)[PARTS[1][0] :] != losses(straight)[PARTS[1][0] :]  # they were computed, not copied
    assert distance(weights(resized, STEPS), weights(straight, STEPS)) < 1e-3
