"""Shards and loose files give the same samples; which of them the flags mean; what is found wrong."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
import torch

from cad_mllm.config import DataConfig
from cad_mllm.data.batches import BatchBuilder, Item
from cad_mllm.data.collate import Batch
from cad_mllm.data.index import Index, IndexReport, load_index
from cad_mllm.data.loader import StepLoader
from cad_mllm.data.sequence import Mix, TextTokenizer
from cad_mllm.data.shards import ShardedSplit, read_manifest
from cad_mllm.data.stores import LooseFiles, Shards, find_store
from cad_mllm.errors import ConfigError, DataError

from .conftest import SPEC, Folder
from .sharding import shard_folder

MakeFolder = Callable[..., Folder]
Build = Callable[..., IndexReport]

MIX: Mix = {"text": 0.2, "text+points": 0.3, "text+image": 0.2, "text+points+image": 0.3}


@pytest.fixture
def folder(make_folder: MakeFolder) -> Folder:
    return make_folder(11)


@pytest.fixture
def root(folder: Folder, tmp_path: Path) -> Path:
    return shard_folder(folder.root, tmp_path / "shards")


@pytest.fixture
def build_shards(build: Build, folder: Folder, tmp_path: Path) -> Callable[..., IndexReport]:
    def build_with(root: Path | str, **changes: object) -> IndexReport:
        store = Shards(ShardedSplit(root, "train"))
        return build(folder, **({"store": store, "output_dir": tmp_path / "out-shards"} | changes))

    return build_with


@pytest.fixture
def bucket(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/store/data", recursive=True)
    yield "memory://store/data"
    memory.rm("/store", recursive=True)


def batches(index: Index, tokenizer: TextTokenizer, num_workers: int = 0) -> list[Batch]:
    loader = StepLoader(
        index,
        tokenizer,
        SPEC,
        seed=3,
        stage=3,
        mix=MIX,
        batch_size=4,
        accumulation=1,
        rank=0,
        world_size=1,
        num_workers=num_workers,
        start_step=0,
        num_steps=6,
    )
    steps = list(loader)
    assert not any(step.lost for step in steps)
    return [batch for step in steps for batch in step.micro_batches]


def same(one: Batch, other: Batch) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(other).values(), strict=True)
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_shards_give_the_batches_of_the_loose_files(
    num_workers: int,
    folder: Folder,
    root: Path,
    build: Build,
    build_shards: Build,
    tokenizer: TextTokenizer,
) -> None:
    loose, sharded = load_index(build(folder).path), load_index(build_shards(root).path)
    assert list(loose.ids) == list(sharded.ids)
    assert [loose.record(n) for n in range(11)] == [sharded.record(n) for n in range(11)]
    for one, other in zip(batches(loose, tokenizer), batches(sharded, tokenizer, num_workers), strict=True):
        assert same(one, other)


@pytest.mark.parametrize("changes", [{"bits": 10}, {"target_format": "json"}])
def test_every_target_of_the_loose_files_is_in_the_shards(
    changes: dict[str, object], folder: Folder, root: Path, build: Build, build_shards: Build
) -> None:
    loose, sharded = load_index(build(folder, **changes).path), load_index(build_shards(root, **changes).path)
    assert [loose.record(n) for n in range(11)] == [sharded.record(n) for n in range(11)]


def test_a_url_gives_the_same_batches(
    bucket: str, root: Path, build_shards: Build, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    here = load_index(build_shards(root).path)
    there = load_index(build_shards(bucket, output_dir=tmp_path / "out-url").path)
    assert here.fingerprint == there.fingerprint
    assert all(same(a, b) for a, b in zip(batches(here, tokenizer), batches(there, tokenizer), strict=True))


def test_samples_that_cannot_be_used_are_set_aside(
    folder: Folder, build_shards: Build, tmp_path: Path
) -> None:
    captions = folder.captions()
    captions[4]["text caption"] = ""
    folder.write_captions(captions)
    root = shard_folder(folder.root, tmp_path / "uncaptioned")
    report = build_shards(root)
    assert (report.num_usable, report.reasons) == (10, {"no caption": 1})
    line = (tmp_path / "out-shards" / "skipped.jsonl").read_text()
    assert folder.ids[4] in line and "train/00001.arrow row 0" in line


def test_the_index_is_used_again_until_a_shard_changes(root: Path, build_shards: Build) -> None:
    assert not build_shards(root).reused
    assert build_shards(root).reused
    os.utime(root / "train/00001.arrow", ns=(1, 1))
    assert not build_shards(root).reused


def test_the_fingerprint_covers_points_and_views(
    folder: Folder, root: Path, build_shards: Build, tmp_path: Path
) -> None:
    first = load_index(build_shards(root).path).fingerprint
    folder.file("img", 3).write_bytes(folder.file("img", 4).read_bytes())
    other = shard_folder(folder.root, tmp_path / "other")
    assert load_index(build_shards(other).path).fingerprint != first


def test_a_flipped_byte_ends_the_run_before_it_starts(root: Path, build_shards: Build) -> None:
    path = root / "train/00001.arrow"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"train/00001\.arrow was changed or damaged"):
        build_shards(root)


def test_a_cut_shard_is_noticed_even_if_there_is_an_index(root: Path, build_shards: Build) -> None:
    build_shards(root)
    path = root / "train/00002.arrow"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"train/00002\.arrow has .* bytes, the index says"):
        build_shards(root)


def test_a_shard_that_goes_away_under_way_costs_its_samples(
    root: Path, build_shards: Build, tokenizer: TextTokenizer
) -> None:
    index = load_index(build_shards(root).path)
    (root / "train/00001.arrow").unlink()
    builder = BatchBuilder(index, tokenizer, SPEC, seed=1, stage=3, seconds=30)
    loaded = builder.build([Item(0, 0, "text+points"), Item(5, 0, "text+image"), Item(6, 0, "text")])
    assert [(lost.id, lost.reason.partition(":")[0]) for lost in loaded.lost] == [
        (index.ids[5], "unreadable shard")
    ]
    assert "train/00001.arrow row 1" in loaded.lost[0].file
    assert loaded.batch.combos == ("text+points", "text", "text")


def test_a_data_set_without_views_is_refused_where_views_are_needed(root: Path, build_shards: Build) -> None:
    path = root / "dataset.json"
    path.write_text(path.read_text().replace('"views": 2', '"views": 0'))
    with pytest.raises(DataError, match="made without views"):
        build_shards(root)
    assert build_shards(root, needs=frozenset({"points"})).num_usable == 11


def split_of(config: DataConfig, split: str) -> tuple[str, str, int] | None:
    store = find_store(config, split)  # type: ignore[arg-type]
    if store is None:
        return None
    assert isinstance(store, Shards)
    return Path(store.split.root).name, store.split.split, len(store.split)


def test_the_flags_choose_the_splits(folder: Folder, tmp_path: Path) -> None:
    one, two = (
        shard_folder(folder.root, tmp_path / "one", num_val=3),
        shard_folder(folder.root, tmp_path / "two"),
    )
    assert split_of(DataConfig(train_data_path=str(one)), "train") == ("one", "train", 8)
    assert split_of(DataConfig(train_data_path=str(one)), "val") == ("one", "val", 3)
    assert split_of(DataConfig(train_data_path=str(two)), "val") is None
    both = DataConfig(train_data_path=str(one), val_data_path=str(two))
    assert split_of(both, "val") == ("two", "train", 11)
    swapped = DataConfig(train_data_path=str(two), val_data_path=str(one))
    assert split_of(swapped, "val") == ("one", "val", 3)


def test_the_two_layouts_may_be_mixed(folder: Folder, root: Path) -> None:
    config = DataConfig(train_data_path=str(root), val_data_path=str(folder.root))
    assert isinstance(find_store(config, "train"), Shards)
    assert isinstance(find_store(config, "val"), LooseFiles)
    assert find_store(DataConfig(train_data_path=str(folder.root)), "val") is None


def test_loose_folders_beside_a_sharded_data_set_are_refused(folder: Folder, root: Path) -> None:
    config = DataConfig(train_data_path=str(root), omnicad_img_root=folder.root / "img")
    with pytest.raises(ConfigError, match="leave out --omnicad_img_root"):
        find_store(config, "train")


def test_a_data_set_without_models_is_refused(tmp_path: Path, make_folder: MakeFolder) -> None:
    root = shard_folder(make_folder(0, "empty").root, tmp_path / "none")
    assert read_manifest(root).num_rows("train") == 0
    with pytest.raises(DataError, match="no models in its train split"):
        find_store(DataConfig(train_data_path=str(root)), "train")


def test_a_url_that_is_not_there_is_named() -> None:
    with pytest.raises(DataError, match=r"memory://nowhere/dataset\.json is missing"):
        find_store(DataConfig(train_data_path="memory://nowhere"), "train")
