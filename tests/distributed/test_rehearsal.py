"""The largest batch, computed before the first step, leaves no trace in the run."""

from pathlib import Path

import pytest
import torch

from tests.distributed.jobs import train_with_and_without_rehearsal
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS = 2

pytestmark = pytest.mark.distributed


def run_flags(data: Path, output_dir: Path, zero: str | None, ranks: int) -> list[str]:
    """A step of text, then one with everything: the projectors do not train in the step that is rehearsed."""
    epochs = {"stage1_epochs": 1, "stage2_epochs": 0, "stage3_epochs": 1}
    rates = {"stage1_lr": 1e-3, "stage3_lr": 1e-3}
    # Of the micro-batches of a step the rehearsal computes two, and leaves two out.
    batch = {"batch_size": 2 // ranks, "gradient_accumulation_steps": 4}
    return flags(data, output_dir, ranks=ranks, zero=zero, **epochs, **rates, **batch)


@pytest.mark.parametrize(
    ("ranks", "engines"),
    [
        (1, [None]),
        (2, ["zero2_config", "zero3_config"]),
        pytest.param(2, ["zero3_offload"], marks=pytest.mark.slow),
    ],
    ids=["plain", "sharded", "offload"],
)
def test_a_run_after_a_rehearsal_is_the_same_bit_for_bit(
    ranks: int, engines: list[str | None], data: Path, tmp_path: Path
) -> None:
    folders = [(tmp_path / f"straight-{engine}", tmp_path / f"rehearsed-{engine}") for engine in engines]
    pairs = [
        [run_flags(data, folder, engine, ranks) for folder in pair]
        for engine, pair in zip(engines, folders, strict=True)
    ]
    if ranks == 1:
        codes = [train_with_and_without_rehearsal(pairs)]
    else:
        codes = run_ranks(JOBS, "train_with_and_without_rehearsal", pairs, world_size=ranks)
    assert codes == [[0] * 2 * len(engines)] * ranks
    for straight, rehearsed in folders:
        assert len(losses(straight)) == STEPS
        assert losses(rehearsed) == losses(straight)
        assert not any("OVERFLOW" in log.read_text() for log in rehearsed.glob("deepspeed_rank*.log"))
        ours, theirs = weights(rehearsed, STEPS), weights(straight, STEPS)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
