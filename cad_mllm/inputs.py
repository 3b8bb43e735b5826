"""What programs are generated from: one input, or a folder of them."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from cad_mllm.data.check import read_candidates
from cad_mllm.data.files import FloatArray, UnusableFileError, load_image, load_points
from cad_mllm.data.layout import JSON_FOLDER, POINT_SUFFIXES, TEXT_FOLDER, Source, walk_files
from cad_mllm.data.order import stable_hash
from cad_mllm.data.sequence import MODALITIES, Combo
from cad_mllm.data.shards import ShardedSplit, held_out, is_sharded
from cad_mllm.data.stores import Shards
from cad_mllm.errors import DataError

CAPTION_SUFFIX = ".txt"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

Given = Literal["text", "points", "image"]
EVERYTHING: frozenset[Given] = frozenset({"text", "points", "image"})


@dataclass(frozen=True, kw_only=True)
class Input:
    """What to make a program from. An absent modality is not in the sequence."""

    caption: str = ""
    points_NC: FloatArray | None = None
    """(N, 6) coordinates and unit normals, at any scale; N >= 1, finite."""
    image: Image.Image | None = None
    start: str = ""
    """Command text that the program begins with."""

    @property
    def combo(self) -> Combo:
        """What is given, as training calls it."""
        points, image = self.points_NC is not None, self.image is not None
        given = {name for name, there in (("points", points), ("image", image)) if there}
        return next(combo for combo, modalities in MODALITIES.items() if modalities == given)


@dataclass(frozen=True, kw_only=True)
class Worse:
    """How much worse points are made before a model sees them, to test how robust it is.

    The model sees the cloud as it then is: scaled by the box of the noisy points, as a scan would be.
    """

    noise: float = 0.0
    """Standard deviation of what is added to coordinates, in half longest sides of the box of the cloud."""
    dropped: float = 0.0
    """Share of the points that are left out, below 1; one is always kept."""

    def of(self, given: Input, seed: int, sample_id: str) -> Input:
        """The input with such points, always the same ones for seed and id; normals stay as they are.

        A higher share leaves out what a lower one does, more noise points the same way as less.
        """
        if given.points_NC is None or (self.noise, self.dropped) == (0.0, 0.0):
            return given
        points_NC = given.points_NC
        rng = np.random.default_rng(stable_hash("worse", seed, sample_id))
        order_N = rng.permutation(len(points_NC))
        half_side = np.ptp(points_NC[:, :3], axis=0).max() / 2
        xyz = points_NC[:, :3] + self.noise * half_side * rng.standard_normal((len(points_NC), 3))
        kept_P = np.sort(order_N[: max(1, round(len(points_NC) * (1 - self.dropped)))])
        worse_NC = np.concatenate([xyz, points_NC[:, 3:]], axis=1, dtype=np.float32)
        return replace(given, points_NC=worse_NC[kept_P])


@dataclass(frozen=True, kw_only=True)
class InputFiles:
    """An input whose files are not read yet."""

    caption: str
    points: Path | None
    image: Path | None
    start: str = ""

    def read(self) -> Input:
        """Read points and picture; UnusableFileError: they cannot be."""
        points_NC = None if self.points is None else load_points(self.points)
        image = None if self.image is None else load_image(self.image)
        return Input(caption=self.caption, points_NC=points_NC, image=image, start=self.start)


@dataclass(frozen=True, kw_only=True)
class InputRow:
    """An input from a row of a sharded data set, not read yet."""

    caption: str
    split: ShardedSplit
    row: int
    modalities: Set[Given]

    def read(self) -> Input:
        """Read points and first view; UnusableFileError: they cannot be."""
        store, place = Shards(self.split), ("", self.row)
        has_view = "image" in self.modalities and self.split.num_views(self.row) > 0
        return Input(
            caption=self.caption,
            points_NC=store.points(*place) if "points" in self.modalities else None,
            image=store.image(*place, 0) if has_view else None,
        )


Unread = InputFiles | InputRow


def read_folder(root: Path, modalities: Set[Given] = EVERYTHING) -> Mapping[str, Unread]:
    """The inputs of a folder by name, sorted.

    A data set gives captions, clouds and first views by sample id: one in the Omni-CAD layout all that it
    holds, a sharded one its val split, or its train split if it has no other. Any other folder
    gives an input for each stem that it holds: NAME.txt is a caption, NAME.npz or .npy a cloud, NAME.png,
    .jpg or .webp a picture. What is not in `modalities` is left out.
    DataError: there is nothing.
    """
    if not root.is_dir():
        raise DataError(f"--folder {root} is not a folder")
    if is_sharded(root):
        return _of_shards(root, modalities)
    is_data_set = (root / TEXT_FOLDER).is_dir() and (root / JSON_FOLDER).is_dir()
    found = _of_data_set(Source.from_folder(root)) if is_data_set else _of_files(root)
    used = {
        name: InputFiles(
            caption=one.caption if "text" in modalities else "",
            points=one.points if "points" in modalities else None,
            image=one.image if "image" in modalities else None,
        )
        for name, one in sorted(found.items())
    }
    inputs = {name: one for name, one in used.items() if one.caption or one.points or one.image}
    if not inputs:
        raise DataError(
            f"--folder {root} holds nothing to generate from: it takes NAME.txt (caption), NAME.npz "
            "(points), NAME.png (picture), or a data set in the Omni-CAD layout"
        )
    return inputs


def _of_data_set(source: Source) -> Mapping[str, InputFiles]:
    candidates, _ = read_candidates(source)
    return {
        one.id: InputFiles(
            caption=one.caption,
            points=source.points_file(one.id),
            image=next(iter(source.image_files(one.id)), None),
        )
        for one in candidates
    }


def _of_shards(root: Path, modalities: Set[Given]) -> Mapping[str, InputRow]:
    split = held_out(root)
    captions = split.column("caption") if "text" in modalities else [""] * len(split)
    return {
        sample_id: InputRow(caption=caption, split=split, row=row, modalities=modalities)
        for row, (sample_id, caption) in enumerate(zip(split.ids, captions, strict=True))
        if caption or modalities & {"points", "image"}
    }


def _of_files(root: Path) -> Mapping[str, InputFiles]:
    names: dict[str, dict[str, Path]] = {}
    for name, _ in walk_files(root):
        path = root / name
        names.setdefault(str(Path(name).with_suffix("")), {})[path.suffix.lower()] = path
    return {
        name: InputFiles(
            caption=_caption(files.get(CAPTION_SUFFIX)),
            points=next((files[suffix] for suffix in POINT_SUFFIXES if suffix in files), None),
            image=next((files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files), None),
        )
        for name, files in names.items()
    }


def _caption(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UnusableFileError(path, f"unreadable caption: {error}") from error
