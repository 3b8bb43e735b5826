"""Samples lost on the way are listed once, and too many of them end the run."""

import json
from pathlib import Path

import pytest
import torch

from cad_mllm.data.batches import Lost
from cad_mllm.errors import DataError
from cad_mllm.train.distributed import World
from cad_mllm.train.lost import LostSamples

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), control=None)


def lost(number: int) -> Lost:
    return Lost(id=f"0000/{number}", file=f"pcd/{number}.npz", reason="unreadable: torn", num_target_tokens=7)


def test_each_is_told_and_listed_once_and_the_tokens_are_counted_each_time(tmp_path: Path) -> None:
    said: list[str] = []
    samples = LostSamples(
        world=ALONE, output_dir=tmp_path, num_samples=100, max_fraction=0.05, say=said.append
    )
    assert samples.note((), "train") == 0
    assert samples.note((lost(1), lost(2)), "train") == 14
    assert samples.note((lost(1),), "train") == 7  # the next epoch
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0000/1", "0000/2"]
    assert lines[0] == {"split": "train", "id": "0000/1", "file": "pcd/1.npz", "reason": "unreadable: torn"}
    assert len(said) == 2 and "pcd/1.npz" in said[0]


def test_more_than_the_allowed_share_is_an_error(tmp_path: Path) -> None:
    samples = LostSamples(world=ALONE, output_dir=tmp_path, num_samples=40, max_fraction=0.05, say=print)
    samples.note((lost(1), lost(2)), "train")
    with pytest.raises(DataError, match=r"3 of 40 samples became unreadable.*--max_skipped_fraction"):
        samples.note((lost(3),), "train")
