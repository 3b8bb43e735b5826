"""What stands in for a sample that cannot be read, and how long reading may take."""

import os
import time
from collections.abc import Callable

import pytest
import torch

from cad_mllm.data.batches import BatchBuilder, Item
from cad_mllm.data.collate import image_array
from cad_mllm.data.files import load_image
from cad_mllm.data.index import IndexReport, load_index
from cad_mllm.data.layout import view_path
from cad_mllm.data.sequence import TextTokenizer

from .conftest import SPEC, Folder


def builder_of(
    folder: Folder, build: Callable[..., IndexReport], tokenizer: TextTokenizer, seconds: float
) -> BatchBuilder:
    return BatchBuilder(load_index(build(folder).path), tokenizer, SPEC, seed=1, stage=3, seconds=seconds)


def test_a_mount_that_stalls_costs_the_time_limit_and_the_sample(
    make_folder: Callable[..., Folder], build: Callable[..., IndexReport], tokenizer: TextTokenizer
) -> None:
    folder = make_folder(2)
    builder = builder_of(folder, build, tokenizer, seconds=0.5)
    folder.file("pcd", 0).unlink()
    os.mkfifo(folder.file("pcd", 0))  # opening it for reading waits for ever
    started = time.monotonic()
    loaded = builder.build([Item(0, 0, "text+points"), Item(1, 0, "text+points")])
    assert 0.5 <= time.monotonic() - started < 10
    assert [(lost.id, lost.reason.partition(":")[0]) for lost in loaded.lost] == [(folder.ids[0], "stalled")]
    assert loaded.batch.combos == ("text", "text+points")


@pytest.mark.parametrize("combo", ["text", "text+points", "text+image"])
def test_only_what_a_combination_needs_is_missed(
    combo: str,
    make_folder: Callable[..., Folder],
    build: Callable[..., IndexReport],
    tokenizer: TextTokenizer,
) -> None:
    folder = make_folder(1)
    builder = builder_of(folder, build, tokenizer, seconds=30)
    folder.file("pcd", 0).unlink()
    loaded = builder.build([Item(0, 0, combo)])  # type: ignore[arg-type]
    assert bool(loaded.lost) == (combo == "text+points")


def test_a_sample_that_is_not_supervised_anyway_is_not_counted(
    make_folder: Callable[..., Folder], build: Callable[..., IndexReport], tokenizer: TextTokenizer
) -> None:
    folder = make_folder(1)
    builder = builder_of(folder, build, tokenizer, seconds=30)
    folder.file("pcd", 0).unlink()
    assert builder.build([Item(0, 0, "text+points", supervised=False)]).lost == ()


def test_reading_goes_on_after_a_sample_that_stalls(
    make_folder: Callable[..., Folder], build: Callable[..., IndexReport], tokenizer: TextTokenizer
) -> None:
    folder = make_folder(4)
    builder = builder_of(folder, build, tokenizer, seconds=0.3)
    for stalling in (0, 2):
        folder.file("pcd", stalling).unlink()
        os.mkfifo(folder.file("pcd", stalling))
    loaded = builder.build([Item(n, 0, "text+points") for n in range(4)])
    assert [lost.id for lost in loaded.lost] == [folder.ids[0], folder.ids[2]]
    assert loaded.batch.combos == ("text", "text+points", "text", "text+points")


def test_pictures_are_normalised_by_who_gets_them(
    make_folder: Callable[..., Folder], build: Callable[..., IndexReport], tokenizer: TextTokenizer
) -> None:
    folder = make_folder(2)
    loaded = builder_of(folder, build, tokenizer, seconds=30).build([Item(0, 0, "text+image")])
    assert loaded.batch.images_NCHW.dtype == torch.uint8
    views = [load_image(view_path(folder.root / "img", folder.ids[0], view)) for view in range(2)]
    (picture,) = loaded.finished().batch.images_NCHW
    assert any(torch.equal(picture, torch.from_numpy(image_array(view, SPEC))) for view in views)
    assert loaded.finished().finished().batch.images_NCHW.dtype == torch.float32
