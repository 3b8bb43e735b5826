"""Features on disk: whole or not there, and an error that says what is wrong."""

from pathlib import Path
from typing import NoReturn

import pytest
import torch

from cad_mllm.data.features import FeatureFolder
from cad_mllm.data.files import UnusableFileError


@pytest.fixture
def folder(tmp_path: Path) -> FeatureFolder:
    return FeatureFolder(folders={"image": tmp_path / "image", "points": tmp_path / "points"})


def test_what_is_saved_is_read_in_its_type(folder: FeatureFolder) -> None:
    one, other = torch.randn(5, 4).bfloat16(), torch.randn(5, 4)
    folder.save(one, "image", "0000/00000001_00001", view=3)
    folder.save(other, "points", "0000/00000001_00001")
    assert torch.equal(folder.load("image", "0000/00000001_00001", lambda: None, view=3), one)
    assert torch.equal(folder.load("points", "0000/00000001_00001", lambda: None), other)


def test_part_of_a_batch_is_saved_alone(folder: FeatureFolder) -> None:
    both_NKD = torch.randn(2, 5, 4)
    folder.save(both_NKD[1], "image", "a")
    assert torch.equal(folder.load("image", "a", lambda: None), both_NKD[1])
    assert folder.file("image", "a").stat().st_size < 200 + both_NKD[1].numel() * 4


@pytest.mark.parametrize("content", [None, b"", b"torn", b"\0" * 100])
def test_missing_or_damaged_ones_name_the_file(folder: FeatureFolder, content: bytes | None) -> None:
    path = folder.file("image", "a")
    if content is not None:
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with pytest.raises(UnusableFileError, match="no features") as caught:
        folder.load("image", "a", lambda: None)
    assert caught.value.path == path


def test_the_reason_is_the_pictures_own_where_that_cannot_be_read(folder: FeatureFolder) -> None:
    def original() -> NoReturn:
        raise UnusableFileError(Path("img/a.png"), "truncated")

    with pytest.raises(UnusableFileError, match="truncated"):
        folder.load("image", "a", original)
