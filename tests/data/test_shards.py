"""The sharded data set: what is written comes back, the same every time; damage is found and named."""

import hashlib
import json
import multiprocessing
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from cad_mllm.data.shards import (
    COLUMNS,
    INDEX_FILE,
    ROWS_PER_BATCH,
    Manifest,
    ModelRow,
    Shard,
    ShardedSplit,
    ShardWriter,
    is_sharded,
    read_manifest,
    verify,
    write_manifest,
)
from cad_mllm.errors import ConfigError, DataError

POINTS = 16
ROWS = (ROWS_PER_BATCH + 3, 2, ROWS_PER_BATCH)


def model(number: int, points: int = POINTS) -> ModelRow:
    rng = np.random.default_rng(number)
    return ModelRow(
        id=f"0000/{number:08d}_00001",
        caption=f"a part, ∅ {number} mm" if number % 5 else "",
        caption_source="given" if number % 2 else "template",
        json=json.dumps({"number": number}),
        command_8="E1;" * (number % 4 + 1),
        command_10=None if number % 7 == 0 else "E10",
        points=rng.normal(size=(points, 6)).astype(np.float16),
        views=tuple(rng.bytes(number % 3 * 10) for _ in range(number % 4)),
        scale=number / 3,
        center=(0.1, -number, 1e-9),
        num_extrudes=number % 9,
        num_curves=number,
    )


def write(root: Path, rows: tuple[int, ...] = ROWS) -> list[ModelRow]:
    """A data set whose train split has shards of so many rows; a val split of two."""
    models, shards = [], []
    for number, size in enumerate(rows):
        with ShardWriter(root, f"train/{number:05d}.arrow", points=POINTS) as writer:
            for _ in range(size):
                models.append(model(len(models)))
                writer.add(models[-1])
        shards.append(writer.shard)
    with ShardWriter(root, "val/00000.arrow", points=POINTS) as writer:
        writer.add(model(1000))
        writer.add(model(1001))
    write_manifest(
        root,
        Manifest(settings={"points": POINTS}, splits={"train": tuple(shards), "val": (writer.shard,)}),
    )
    return models


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def bucket(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The data set as a URL of fsspec's file system in memory, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    memory = fsspec.filesystem("memory")
    memory.put(str(root), "/bucket/data", recursive=True)
    yield "memory://bucket/data"
    memory.rm("/bucket", recursive=True)


def same(one: ModelRow, other: ModelRow) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in COLUMNS)


def test_every_row_comes_back(tmp_path: Path) -> None:
    models = write(tmp_path)
    train = ShardedSplit(tmp_path, "train")
    assert len(train) == len(models)
    assert all(same(train.row(n), models[n]) for n in range(len(models)))
    assert list(train.ids) == [one.id for one in models]
    assert (train.ids[70], train.ids[3:5]) == (models[70].id, [models[3].id, models[4].id])
    assert list(train.column("command_10")) == [one.command_10 or "" for one in models]
    with pytest.raises(IndexError):
        train.row(len(models))


def test_columns_are_read_in_bounded_batches(root: Path) -> None:
    batches = list(ShardedSplit(root, "train").batches(["id", "num_curves"]))
    assert max(len(batch["id"]) for batch in batches) <= 256
    assert [n for batch in batches for n in batch["num_curves"]] == list(range(sum(ROWS)))


def test_a_split_that_is_absent_is_empty(root: Path) -> None:
    manifest = read_manifest(root)
    without = Manifest(settings={}, splits={"train": manifest.splits["train"]})
    assert len(ShardedSplit(root, "val", without)) == without.num_rows("val") == 0
    assert list(ShardedSplit(root, "val", without).ids) == []


def test_the_same_rows_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two")
    for path in sorted((tmp_path / "one").rglob("*.*")):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()
    manifest = read_manifest(tmp_path / "one")
    for shard in manifest.splits["train"]:
        content = (tmp_path / "one" / shard.file).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert [shard.rows for shard in manifest.splits["train"]] == list(ROWS)


def test_the_fingerprint_follows_the_rows(tmp_path: Path) -> None:
    write(tmp_path / "one")
    write(tmp_path / "two", (*ROWS[:2], ROWS[2] - 1))
    assert read_manifest(tmp_path / "one").fingerprint != read_manifest(tmp_path / "two").fingerprint


def test_a_shard_that_was_not_finished_is_not_there(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyError, match="stop"),
        ShardWriter(tmp_path, "train/00000.arrow", points=POINTS) as writer,
    ):
        for number in range(ROWS_PER_BATCH + 1):
            writer.add(model(number))
        raise KeyError("stop")
    assert list((tmp_path / "train").iterdir()) == []


def test_a_shard_may_hold_no_rows(tmp_path: Path) -> None:
    write(tmp_path, (0, 3))
    assert len(list(ShardedSplit(tmp_path, "train").ids)) == 3


def test_a_disk_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cad_mllm.data.shards._Hashed.write", full)
    with pytest.raises(DataError, match=r"train/00000.arrow cannot be written: No space left.*Free space"):
        write(tmp_path)
    assert not (tmp_path / INDEX_FILE).exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    "damage, complaint",
    [(flip, "changed or damaged"), (cut, "bytes, the index says"), (Path.unlink, "missing")],
)
def test_damage_is_found_and_named(damage: Callable[[Path], None], complaint: str, root: Path) -> None:
    manifest = read_manifest(root)
    verify(root, manifest)
    damage(root / "train/00001.arrow")
    with pytest.raises(DataError, match=rf"train/00001\.arrow.*{complaint}.*cad-mllm prepare"):
        verify(root, manifest)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_reader_names_the_shard_that_it_misses(damage: Callable[[Path], None], root: Path) -> None:
    damage(root / "train/00001.arrow")
    train = ShardedSplit(root, "train")
    assert train.ids[0]
    with pytest.raises(DataError, match=r"train/00001\.arrow"):
        train.row(ROWS[0])


def test_a_file_that_is_no_shard_is_refused(root: Path) -> None:
    manifest = read_manifest(root)
    first = manifest.splits["train"][0]
    (root / first.file).write_bytes(b"x" * first.bytes)
    with pytest.raises(DataError, match=r"train/00000\.arrow cannot be read"):
        ShardedSplit(root, "train").row(0)
    (root / first.file).write_bytes((root / "val/00000.arrow").read_bytes())
    wrong = Shard(file=first.file, rows=first.rows, bytes=(root / first.file).stat().st_size, sha256="")
    with pytest.raises(DataError, match=f"has 2 rows in 1 parts, not {first.rows}"):
        ShardedSplit(root, "train", replace(manifest, splits={"train": (wrong,)})).row(0)


@pytest.mark.parametrize(
    "change, complaint",
    [
        (lambda text: text[:40], "damaged"),
        (lambda text: "[]", "damaged"),
        (lambda text: "{}", "damaged"),
        (lambda text: text.replace("shards-1", "shards-9"), "format 'cad-mllm-shards-9'"),
        (lambda text: text.replace('"sha256": "', '"sha256": "0', 1), "fingerprint"),
        (lambda text: text.replace("train/00000", "../00000"), "outside its folder"),
        (lambda text: text.replace("train/00000", "/etc/00000"), "outside its folder"),
    ],
)
def test_a_bad_index_is_refused(change: Callable[[str], str], complaint: str, root: Path) -> None:
    path = root / INDEX_FILE
    path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=complaint) as error:
        read_manifest(root)
    assert INDEX_FILE in str(error.value)


def test_an_index_that_is_missing_is_named(tmp_path: Path) -> None:
    assert not is_sharded(tmp_path)
    with pytest.raises(DataError, match=r"dataset\.json is missing"):
        read_manifest(tmp_path)


def test_a_url_is_read_through_the_cache(bucket: str, root: Path, tmp_path: Path) -> None:
    assert is_sharded(bucket)
    assert read_manifest(bucket) == read_manifest(root)
    here, there = ShardedSplit(root, "train"), ShardedSplit(bucket, "train")
    assert same(here.row(5), there.row(5))
    kept = list((tmp_path / "cache").rglob("*.arrow"))
    assert [path.stem for path in kept] == [here.manifest.splits["train"][0].sha256]
    assert all(same(here.row(n), there.row(n)) for n in range(len(here)))


@pytest.mark.parametrize("damage, complaint", [(flip, "changed or damaged"), (cut, "bytes, the index says")])
def test_damage_behind_a_url_never_comes_into_the_cache(
    damage: Callable[[Path], None], complaint: str, bucket: str, root: Path, tmp_path: Path
) -> None:
    damage(root / "train/00001.arrow")
    fsspec.filesystem("memory").put(str(root / "train/00001.arrow"), "/bucket/data/train/00001.arrow")
    with pytest.raises(DataError, match=rf"{bucket}/train/00001\.arrow.*{complaint}"):
        verify(bucket, read_manifest(bucket))
    assert len(list((tmp_path / "cache").rglob("*.arrow"))) == 1  # the shard before it


def test_a_shard_that_a_url_lacks_is_named(bucket: str) -> None:
    fsspec.filesystem("memory").rm("/bucket/data/train/00000.arrow")
    with pytest.raises(DataError, match=rf"{bucket}/train/00000\.arrow is missing"):
        ShardedSplit(bucket, "train").row(0)


def test_a_url_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises((DataError, ConfigError), match=r"nosuchprotocol://x/dataset\.json"):
        read_manifest("nosuchprotocol://x")


def test_a_split_travels_to_spawned_and_forked_processes(root: Path) -> None:
    train = ShardedSplit(root, "train")
    first = train.ids[0]  # opened here
    assert pickle.loads(pickle.dumps(train)).ids[0] == first
    assert len(pickle.dumps(train)) < 2000
    results = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(
        target=lambda: results.put([train.ids[n] for n in (0, ROWS[0], len(train) - 1)])
    )
    child.start()
    assert results.get(timeout=30) == [train.ids[n] for n in (0, ROWS[0], len(train) - 1)]
    child.join()


def test_reading_maps_the_file_and_copies_nothing(tmp_path: Path) -> None:
    """A megabyte of points read out of a hundred: what this process owns itself grows by less than ten."""
    points = 8192
    with ShardWriter(tmp_path, "train/00000.arrow", points=points) as writer:
        for number in range(1000):
            writer.add(replace(model(0, points=1), id=f"{number:04d}", points=np.zeros((points, 6), "f2")))
    assert writer.shard.bytes > 95e6
    write_manifest(tmp_path, Manifest(settings={}, splits={"train": (writer.shard,)}))
    train = ShardedSplit(tmp_path, "train")
    train.points(0)
    before = own_memory()
    clouds = [train.points(n) for n in range(1000)]
    assert sum(float(cloud[0, 0]) for cloud in clouds) == 0
    assert not clouds[0].flags.owndata and not clouds[0].flags.writeable
    assert own_memory() - before < 10e6


def test_shards_that_are_read_are_no_open_files(root: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    train = ShardedSplit(root, "train")
    clouds = [train.points(n) for n in range(len(train))]
    assert len(train._opened) == len(ROWS)
    assert len(os.listdir("/proc/self/fd")) == before
    assert same(train.row(0), model(0)) and np.array_equal(clouds[-1], model(len(train) - 1).points)


def own_memory() -> int:
    """Bytes of this process that no file stands behind."""
    lines = Path(f"/proc/{os.getpid()}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024
