"""The two layouts behind one interface: loose files (`Source`) and shards.

What reads a sample does not know which it is. A store finds the samples and why some cannot be used, and
reads the points and views of those that can.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from cad_mllm.config import DataConfig
from cad_mllm.data.check import Checked, Requirements, Skipped, check_all, read_candidates
from cad_mllm.data.files import FloatArray, UnusableFileError, decode_image, load_image, load_points
from cad_mllm.data.layout import POINT_SUFFIXES, Source, Split, view_path, walk_files
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.sequence import Modality
from cad_mllm.data.shards import ShardedSplit, is_sharded, is_url, read_manifest, verify
from cad_mllm.errors import ConfigError, DataError


class Store(Protocol):
    """Where the samples of a split are read from. Picklable."""

    @property
    def identity(self) -> str:
        """What stands for contents that the checked samples do not show; "" if nothing does."""

    def describe(self) -> dict[str, Any]:
        """For `open_store`, as JSON."""

    def require(self, needs: frozenset[Modality]) -> None:
        """ConfigError or DataError if these modalities are not there at all."""

    def facts(self, needs: frozenset[Modality]) -> Iterator[str]:
        """Lines that change whenever what the samples are made of does. DataError for what is not there."""

    def check(self, requirements: Requirements, workers: int) -> Iterator[Checked | Skipped]:
        """Every sample, in the order of the ids, after those that have no place in it."""

    def place(self, sample_id: str, row: int) -> Path | str:
        """The file that stands for a sample where no single one is at fault."""

    def points(self, sample_id: str, row: int) -> FloatArray:
        """The cloud (N, 6). UnusableFileError if it cannot be read."""

    def image(self, sample_id: str, row: int, view: int) -> Image.Image:
        """One view in RGB. UnusableFileError if it cannot be read."""


class LooseFiles:
    """A file per model, cloud and view, in the Omni-CAD layout."""

    identity = ""  # the sizes of the samples' files are among what is checked

    def __init__(self, source: Source) -> None:
        self.source = source

    def describe(self) -> dict[str, Any]:
        """See `Store`."""
        roots = vars(self.source).items()
        return {name: None if root is None else str(root.absolute()) for name, root in roots}

    def require(self, needs: frozenset[Modality]) -> None:
        """See `Store`."""
        folders = {
            "points": (self.source.points, "--omnicad_pc_root (point clouds)"),
            "image": (self.source.images, "--omnicad_img_root (rendered views)"),
        }
        for modality in sorted(needs):
            folder, flag = folders[modality]
            if folder is None:
                raise ConfigError(f"a stage of this run uses {modality}, but {flag} is not given")
            if not folder.is_dir():
                raise DataError(
                    f"a stage of this run uses {modality}, but there is no folder {folder}: make it with "
                    f"`cad-mllm prepare`, or give {flag}"
                )

    def facts(self, needs: frozenset[Modality]) -> Iterator[str]:
        """See `Store`: path, size and time of every file."""
        source = self.source
        used = [source.text, source.json]
        used += [source.points] if "points" in needs and source.points else []
        used += [source.images] if "image" in needs and source.images else []
        with SlowProgress("Looking for changed files", len(used)) as progress:
            for root in used:
                yield f"\n{root.resolve()}\n"
                for name, stat in walk_files(root):
                    yield f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}\n"
                progress.advance()

    def check(self, requirements: Requirements, workers: int) -> Iterator[Checked | Skipped]:
        """See `Store`."""
        candidates, skipped = read_candidates(self.source)
        yield from skipped
        with SlowProgress("Checking samples", len(candidates)) as progress:
            for checked in check_all(self.source, requirements, candidates, workers):
                progress.advance()
                yield checked

    def place(self, sample_id: str, row: int) -> Path:
        """See `Store`."""
        return self.source.json_file(sample_id)

    def points(self, sample_id: str, row: int) -> FloatArray:
        """See `Store`."""
        assert self.source.points is not None, "the index was built for this combination"
        paths = [self.source.points / f"{sample_id}{suffix}" for suffix in POINT_SUFFIXES]
        path = next((path for path in paths if path.exists()), None)
        if path is None:
            raise UnusableFileError(paths[0], "no points")
        return load_points(path)

    def image(self, sample_id: str, row: int, view: int) -> Image.Image:
        """See `Store`."""
        assert self.source.images is not None, "the index was built for this combination"
        return load_image(view_path(self.source.images, sample_id, view))


class Shards:
    """A split of a sharded data set. Building an index checks its bytes against the checksums."""

    def __init__(self, split: ShardedSplit) -> None:
        self.split = split

    @property
    def identity(self) -> str:
        """See `Store`: the checksums stand for points and views."""
        return self.split.manifest.fingerprint

    def describe(self) -> dict[str, Any]:
        """See `Store`."""
        root = self.split.root if is_url(self.split.root) else str(Path(self.split.root).absolute())
        return {"sharded": root, "split": self.split.split}

    def require(self, needs: frozenset[Modality]) -> None:
        """See `Store`."""
        if "image" in needs and not self.split.manifest.settings.get("views", 1):
            raise DataError(
                f"a stage of this run uses image, but {self.split.root} was made without views: make it with "
                "`cad-mllm prepare --views 8`"
            )

    def facts(self, needs: frozenset[Modality]) -> Iterator[str]:
        """See `Store`: the checksums of the index; size and time of every shard in a folder."""
        yield f"{self.describe()}\n{self.identity}\n"
        for file, size, time in self.split.local_stats():
            yield f"{file}\t{size}\t{time}\n"

    def check(self, requirements: Requirements, workers: int) -> Iterator[Checked | Skipped]:
        """See `Store`. First the checksum of every shard of this split."""
        split = self.split
        with SlowProgress("Verifying shards", len(split.shards)) as progress:
            own = replace(split.manifest, splits={split.split: split.shards})
            verify(split.root, own, lambda shard: progress.advance())
        column = "json" if requirements.target_format == "json" else f"command_{requirements.bits}"
        row = 0
        with SlowProgress("Checking samples", len(split)) as progress:
            for batch in split.batches(["id", "caption", column]):
                for sample_id, caption, target in zip(*batch.values(), strict=True):
                    yield self._checked(requirements, sample_id, caption, target, row)
                    row += 1
                progress.advance(len(batch["id"]))

    def _checked(
        self, requirements: Requirements, sample_id: str, caption: str, target: str | None, row: int
    ) -> Checked | Skipped:
        views = self.split.num_views(row)
        fault = None
        if not caption.strip():
            fault = "no caption"
        elif target is None:
            fault = f"unusable model: it cannot be written at {requirements.bits} bits"
        elif "image" in requirements.needs and views == 0:
            fault = "no image"
        if fault is not None or target is None:
            return Skipped(sample_id, self.split.place(row), str(fault))
        return Checked(id=sample_id, caption=caption, target=target, row=row, views=views, sizes=())

    def place(self, sample_id: str, row: int) -> str:
        """See `Store`."""
        return self.split.place(row)

    def points(self, sample_id: str, row: int) -> FloatArray:
        """See `Store`."""
        with self._readable(row):
            return self.split.points(row).astype(np.float32)

    def image(self, sample_id: str, row: int, view: int) -> Image.Image:
        """See `Store`."""
        with self._readable(row):
            if view >= self.split.num_views(row):
                raise UnusableFileError(self.split.place(row), "no image")
            # numpy copies (and converts, above) without Python's lock: see `_offsets` in shards.py
            png = BytesIO(self.split.view(row, view).copy().data)
        return decode_image(png, self.split.place(row))

    @contextmanager
    def _readable(self, row: int) -> Iterator[None]:
        try:
            yield
        except UnusableFileError:
            raise
        except DataError as error:
            raise UnusableFileError(self.split.place(row), f"unreadable shard: {error}") from error


def open_store(description: dict[str, Any]) -> Store:
    """The store that `describe` described."""
    if "sharded" in description:
        return Shards(ShardedSplit(description["sharded"], description["split"]))
    roots = {name: None if root is None else Path(root) for name, root in description.items()}
    return LooseFiles(Source(**roots))  # type: ignore[arg-type]


def find_store(config: DataConfig, split: Split) -> Store | None:
    """Where the flags say that the samples of a split are; None for a validation split that is not given.

    `--val_data_path` of a sharded data set means its val split, or its train split if it has no other.
    Without it, the val split of a sharded `--train_data_path` is the validation split.
    Raises ConfigError where no path is given, DataError where one does not hold what it should.
    """
    root = config.train_data_path if split == "train" else config.val_data_path
    if root is not None and is_sharded(root):
        return _shards(config, root, split)
    train_root = config.train_data_path
    if split == "val" and root is None and train_root is not None and is_sharded(train_root):
        store = Shards(ShardedSplit(train_root, "val"))
        return store if len(store.split) else None
    source = Source.from_config(config, split)
    return None if source is None else LooseFiles(source)


def _shards(config: DataConfig, root: str | Path, split: Split) -> Shards:
    flag = "--train_data_path" if split == "train" else "--val_data_path"
    loose = {name: path for name, path in asdict(config).items() if name.startswith("omnicad_") and path}
    if split == "train" and loose:
        raise ConfigError(f"{flag} {root} is a sharded data set: leave out --{next(iter(loose))}")
    manifest = read_manifest(root)
    chosen: Split = split if manifest.num_rows(split) else "train"
    if not manifest.num_rows(chosen):
        raise DataError(f"{flag} {root} has no models in its {chosen} split")
    return Shards(ShardedSplit(root, chosen, manifest))
