"""Ranks share the work of the encoders, and read what the others computed."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import flags, losses

JOBS = Path(__file__).with_name("jobs.py")


def test_two_ranks_learn_from_stored_features_what_one_learns(data: Path, tmp_path: Path) -> None:
    for ranks in (1, 2):
        words = flags(
            data, tmp_path / f"run-{ranks}", ranks=ranks, zero="zero2_config" if ranks == 2 else None,
            start_from_stage=3, stage3_epochs=2, encoder_features=tmp_path / f"features-{ranks}",
        )  # fmt: skip
        assert run_ranks(JOBS, "train_all", [words], world_size=ranks, seconds=120) == [[0]] * ranks
    assert losses(tmp_path / "run-2") == pytest.approx(losses(tmp_path / "run-1"), rel=1e-4)
    files = [sorted(p.name for p in (tmp_path / f"features-{n}").rglob("*.safetensors")) for n in (1, 2)]
    assert files[0] == files[1] and files[0]
