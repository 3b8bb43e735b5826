"""Paths and names of the Omni-CAD layout on disk.

A sample is named "<group>/<name>", e.g. `0000/00000071_00005`:
`json/<id>.json`, `txt/<group>.json` = `[{"id": ..., "text caption": ...}, ...]`, `pcd/<id>.npz` or `.npy`
(or `pointcloud/<id>.npz`; key `points` or `xyz`), `img/<id>_000.png`, `img/<id>_001.png`, ...
Ids come from outside: `id_fault` must have been asked before an id becomes a path.
"""

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from cad_mllm.config import DataConfig
from cad_mllm.errors import ConfigError, DataError

Split = Literal["train", "val"]

CAPTION_KEY = "text caption"
DEFAULT_ROOT = Path("data/Omni-CAD")
"""Where the legacy quick start expects the data set if no path is given."""

JSON_FOLDER, TEXT_FOLDER, IMAGE_FOLDER = "json", "txt", "img"
POINT_FOLDERS = ("pcd", "pointcloud")
POINT_SUFFIXES = (".npz", ".npy")


def id_fault(sample_id: str) -> str | None:
    """Why this id is refused as a path below a root, or None where it is safe."""
    try:
        sample_id.encode()
    except UnicodeEncodeError:
        return "id is not valid text"
    if (
        "\0" in sample_id
        or "\\" in sample_id
        or any(part in ("", ".", "..") for part in sample_id.split("/"))
    ):
        return "id leaves the data folder"
    return None


def view_path(image_root: Path, sample_id: str, view: int) -> Path:
    """File of one rendered view."""
    return image_root / f"{sample_id}_{view:03d}.png"


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is made of a model."""

    points: int = 10_000
    views: int = 8
    size: int = 224
    """Height and width of a view in pixels."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """The folders of one split. None: not given, for runs that do not need it."""

    text: Path
    json: Path
    points: Path | None
    images: Path | None

    @classmethod
    def from_folder(cls, root: Path) -> "Source":
        """The four folders of the Omni-CAD layout below `root`."""
        points = next(
            (root / name for name in POINT_FOLDERS if (root / name).is_dir()), root / POINT_FOLDERS[0]
        )
        return cls(
            text=root / TEXT_FOLDER, json=root / JSON_FOLDER, points=points, images=root / IMAGE_FOLDER
        )

    @classmethod
    def from_config(cls, config: DataConfig, split: Split) -> "Source | None":
        """The folders that the flags name; None for a validation split that is not given.

        An `--omnicad_*` path (training only) wins over the same folder below `--train_data_path`.
        Raises ConfigError where no path is given, DataError where one does not exist, naming the flag.
        """
        if split == "val":
            return (
                None
                if config.val_data_path is None
                else cls._below(Path(config.val_data_path), "--val_data_path")
            )
        given = {
            "text": _existing(config.omnicad_txt_path, "--omnicad_txt_path"),
            "json": _existing(config.omnicad_json_root, "--omnicad_json_root"),
            "points": _existing(config.omnicad_pc_root, "--omnicad_pc_root"),
            "images": _existing(config.omnicad_img_root, "--omnicad_img_root"),
        }
        single = {name: path for name, path in given.items() if path is not None}
        if config.train_data_path is not None:
            return replace(cls._below(Path(config.train_data_path), "--train_data_path"), **single)
        if not single:
            return cls._default()
        for name, flag in (
            ("text", "--omnicad_txt_path (captions)"),
            ("json", "--omnicad_json_root (CAD JSON)"),
        ):
            if name not in single:
                raise ConfigError(f"{flag} is not given: give it, or --train_data_path with all four folders")
        return cls(text=single["text"], json=single["json"], points=given["points"], images=given["images"])

    @classmethod
    def _below(cls, root: Path, flag: str) -> "Source":
        try:
            return cls.existing(root)
        except DataError as error:
            raise DataError(f"{flag} {error}") from error

    @classmethod
    def existing(cls, root: Path) -> "Source":
        """`from_folder`, but DataError where the folders without which there is no data set are missing."""
        for name in (TEXT_FOLDER, JSON_FOLDER):
            if not (root / name).is_dir():
                raise DataError(
                    f"{root}: there is no folder {root / name}; the Omni-CAD layout has txt/ and json/"
                    ", a sharded data set has dataset.json"
                )
        return cls.from_folder(root)

    @classmethod
    def _default(cls) -> "Source":
        if not all((DEFAULT_ROOT / name).is_dir() for name in (TEXT_FOLDER, JSON_FOLDER)):
            raise ConfigError(
                "no training data: give --train_data_path FOLDER (Omni-CAD layout), the --omnicad_* paths, "
                f"or --create_dummy_data ({DEFAULT_ROOT} does not exist here)"
            )
        return cls.from_folder(DEFAULT_ROOT)

    def json_file(self, sample_id: str) -> Path:
        """The CAD JSON of a sample."""
        return self.json / f"{sample_id}.json"

    def points_file(self, sample_id: str) -> Path | None:
        """The point cloud of a sample, if there is one."""
        if self.points is None:
            return None
        candidates = (self.points / f"{sample_id}{suffix}" for suffix in POINT_SUFFIXES)
        return next((path for path in candidates if path.is_file()), None)

    def image_files(self, sample_id: str) -> list[Path]:
        """The views of a sample: 000, 001, ... up to the first that is missing."""
        if self.images is None:
            return []
        views = (view_path(self.images, sample_id, view) for view in itertools.count())
        return list(itertools.takewhile(Path.is_file, views))


def _existing(path: Path | None, flag: str) -> Path | None:
    if path is not None and not path.exists():
        raise DataError(f"{flag} {path} does not exist")
    return path


def walk_files(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every file below `root` (or `root` itself, if it is one): path relative to it, stat; sorted.

    Hidden files (begun by a writer that was killed, or made by an operating system) are none of them.

    Raises DataError for a folder that cannot be read, and for a link to a folder above it.
    """
    if root.is_file():
        yield root.name, root.stat()
        return

    def walk(folder: Path, prefix: str, above: tuple[str, ...]) -> Iterator[tuple[str, os.stat_result]]:
        real = os.path.realpath(folder)
        if real in above:
            raise DataError(f"{folder} is a link to a folder above it: remove the link")
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
            for entry in listed:
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    yield from walk(Path(entry.path), f"{prefix}{entry.name}/", (*above, real))
                elif entry.is_file():
                    yield prefix + entry.name, entry.stat()
        except OSError as error:
            raise DataError(f"cannot read {folder}: {error.strerror or error}") from error

    yield from walk(root, "", ())
