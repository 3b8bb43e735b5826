"""Which files belong together: predictions and truth by id, what the model was given, what it was trained on.

An id is the path of a file below its folder, without suffix. Of a folder in the Omni-CAD layout, `json/` is
read; a sharded data set stands for the models of its val split, or of its train split if it has no other.
`generated.jsonl`, the list that generation leaves, may say beside its own keys what each prediction was made
from, one object a line:

    {"id": "0000/00000071_00005", "modalities": "text+points", "caption": "A plate", "points": "in/1.npz"}

All but the id may be missing; `points` and `image` are files, relative to the folder; `noise` and `dropped`
say how much worse the points were made than those. For what the modalities name and the line does not give,
the true data stand in: its caption (`txt/`), its cloud, its first view.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from cad_mllm.cad.shapefile import SUFFIXES
from cad_mllm.data.files import FloatArray
from cad_mllm.data.layout import CAPTION_KEY, JSON_FOLDER, TEXT_FOLDER, Source, id_fault
from cad_mllm.data.sequence import MODALITIES
from cad_mllm.data.shards import ShardedSplit, held_out, is_sharded
from cad_mllm.data.stores import Shards
from cad_mllm.errors import DataError

GENERATED_FILE = "generated.jsonl"
"""What `cad-mllm generate` writes for a folder."""
UNKNOWN_MODALITIES = "not stated"

_MAX_LINE = 100_000
_MAX_CAPTION = 2_000


@dataclass(frozen=True)
class Shapes:
    """The shape files below a folder."""

    folder: Path
    files: dict[str, Path]
    """Id -> the file that says most."""
    unreadable: list[str]
    """Folders and names that cannot be used, with the reason."""


@dataclass(frozen=True)
class Truths:
    """The true models."""

    files: Mapping[str, Path | bytes]
    """Id -> the file that says most, or Omni-CAD JSON."""
    unreadable: list[str]


@dataclass(frozen=True)
class InShard:
    """What a model in a sharded data set is made from."""

    split: ShardedSplit
    row: int

    def points(self) -> FloatArray:
        """The cloud (N, 6). UnusableFileError: it cannot be read."""
        return Shards(self.split).points("", self.row)

    def image(self) -> Image.Image:
        """The first view. UnusableFileError: there is none, or it cannot be read."""
        return Shards(self.split).image("", self.row, 0)


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a prediction was made from, as far as that is known."""

    modalities: str = UNKNOWN_MODALITIES
    caption: str = ""
    points: Path | InShard | None = None
    image: Path | InShard | None = None
    noise: float = 0.0
    """Standard deviation of what was added to the points, in half longest sides of their box."""
    dropped: float = 0.0
    """Share of the points that were left out."""


@dataclass
class Inputs:
    """What all predictions were made from."""

    given: dict[str, Given] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    def of(self, sample_id: str) -> Given:
        """What is known of one."""
        return self.given.get(sample_id, Given())


def find_shapes(root: Path, flag: str) -> Shapes:
    """All shape files below `root`. Raises DataError, naming the flag, if it cannot be read as a folder."""
    folder = root / JSON_FOLDER if (root / JSON_FOLDER).is_dir() else root
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise DataError(
            f"{flag} {root}: cannot be read ({error.strerror or error}); name a folder"
        ) from error
    files: dict[str, Path] = {}
    unreadable: list[str] = []
    for path in _walk(folder, unreadable):
        suffix = path.suffix.lower()
        if suffix not in SUFFIXES:
            continue
        name = path.relative_to(folder).as_posix()
        if fault := id_fault(name):
            unreadable.append(f"{name!a}: {fault}")
            continue
        key = name[: -len(suffix)]
        known = files.get(key)
        if known is None or SUFFIXES.index(suffix) < SUFFIXES.index(known.suffix.lower()):
            files[key] = path
    return Shapes(folder, files, unreadable)


def find_truths(root: Path) -> Truths:
    """All true models below `root`. Raises DataError if it cannot be read."""
    if not is_sharded(root):
        shapes = find_shapes(root, "--true")
        return Truths(shapes.files, shapes.unreadable)
    files: dict[str, Path | bytes] = {}
    for batch in held_out(root).batches(["id", "json"]):
        files |= {key: text.encode() for key, text in zip(batch["id"], batch["json"], strict=True)}
    return Truths(files, [])


def _walk(folder: Path, unreadable: list[str]) -> Iterator[Path]:
    """Every plain file, in the order of the names; hidden ones are none. What cannot be listed is noted."""

    def note(error: OSError) -> None:
        unreadable.append(f"{os.path.relpath(str(error.filename), folder)!a}: {error.strerror}")

    above = {os.path.realpath(folder)}
    for where, folders, names in os.walk(folder, onerror=note, followlinks=True):
        for name in list(folders):
            real = os.path.realpath(os.path.join(where, name))
            if name.startswith(".") or real in above:
                folders.remove(name)  # a folder is read once, whatever links lead to it
            above.add(real)
        folders.sort()
        for name in sorted(names):
            path = Path(where, name)
            if not name.startswith(".") and path.is_file():
                yield path


def read_inputs(predicted: Path, true: Path) -> Inputs:
    """What the predictions below `predicted` were made from; files and lines that are wrong are noted."""
    inputs = Inputs()
    data = _Sharded(held_out(true)) if is_sharded(true) else _Loose(true)
    captions = data.captions(inputs.unreadable)
    inputs.given = {key: Given(caption=caption) for key, caption in captions.items()}
    path = predicted / GENERATED_FILE
    if not path.is_file():
        return inputs
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            while line := lines.readline(_MAX_LINE):
                if line.strip():
                    _add_given(inputs, line, predicted, data)
    except OSError as error:
        inputs.unreadable.append(f"{GENERATED_FILE}: {error.strerror or error}")
    return inputs


class _Loose:
    """What a folder in the Omni-CAD layout says beside its models."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._source = Source.from_folder(root)

    def captions(self, unreadable: list[str]) -> dict[str, str]:
        return _captions(self._root / TEXT_FOLDER, unreadable)

    def points(self, sample_id: str) -> Path | None:
        return self._source.points_file(sample_id)

    def image(self, sample_id: str) -> Path | None:
        return next(iter(self._source.image_files(sample_id)), None)


class _Sharded:
    """The same of a sharded data set."""

    def __init__(self, split: ShardedSplit) -> None:
        self._split = split
        self._rows = {sample_id: row for row, sample_id in enumerate(split.ids)}

    def captions(self, unreadable: list[str]) -> dict[str, str]:
        texts = dict(zip(self._rows, self._split.column("caption"), strict=True))
        return {key: text[:_MAX_CAPTION] for key, text in texts.items() if text}

    def points(self, sample_id: str) -> InShard | None:
        return InShard(self._split, self._rows[sample_id]) if sample_id in self._rows else None

    def image(self, sample_id: str) -> InShard | None:
        there = sample_id in self._rows and self._split.num_views(self._rows[sample_id]) > 0
        return InShard(self._split, self._rows[sample_id]) if there else None


def _add_given(inputs: Inputs, line: str, predicted: Path, data: _Loose | _Sharded) -> None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        entry = None
    sample_id = entry.get("id") if isinstance(entry, dict) else None
    if not isinstance(sample_id, str) or id_fault(sample_id):
        inputs.unreadable.append(f"{GENERATED_FILE}: {line[:60]!a} is no object with an id")
        return
    assert isinstance(entry, dict)
    modalities = _modalities(inputs, entry)
    caption = _text(entry, "caption") or inputs.of(sample_id).caption
    named = modalities.split("+")
    inputs.given[sample_id] = Given(
        modalities=modalities,
        caption=caption,
        points=_file(inputs, entry, "points", predicted)
        or (data.points(sample_id) if "points" in named else None),
        image=_file(inputs, entry, "image", predicted)
        or (data.image(sample_id) if "image" in named else None),
        noise=_level(entry, "noise"),
        dropped=_level(entry, "dropped"),
    )


def _modalities(inputs: Inputs, entry: Mapping[str, object]) -> str:
    """What a line says was given: one of the combinations that there are."""
    stated = _text(entry, "modalities")
    if stated in MODALITIES:
        return stated
    if stated:
        inputs.unreadable.append(f"{GENERATED_FILE}: {stated[:60]!a} is none of {', '.join(MODALITIES)}")
    return UNKNOWN_MODALITIES


def _file(inputs: Inputs, entry: Mapping[str, object], key: str, folder: Path) -> Path | None:
    """The file that a line names, if it is one and below the folder."""
    name = _text(entry, key)
    if not name:
        return None
    if id_fault(name):
        inputs.unreadable.append(f"{GENERATED_FILE}: {name[:60]!a} leaves the folder")
        return None
    return folder / name if (folder / name).is_file() else None


def _level(entry: Mapping[str, object], key: str) -> float:
    value = entry.get(key)
    return float(value) if isinstance(value, float) and 0 <= value <= 1 else 0.0


def _text(entry: Mapping[str, object], key: str) -> str:
    value = entry.get(key)
    # JSON can spell half a character, which no file can hold.
    return value[:_MAX_CAPTION].encode(errors="replace").decode() if isinstance(value, str) else ""


def _captions(folder: Path, unreadable: list[str]) -> dict[str, str]:
    """Id -> caption, from the caption files of the Omni-CAD layout; none if there is no such folder."""
    captions: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else []:
        try:
            entries = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            unreadable.append(f"{TEXT_FOLDER}/{path.name}: {error}")
            continue
        for entry in entries if isinstance(entries, list) else []:
            if isinstance(entry, dict) and isinstance(entry.get("id"), str) and _text(entry, CAPTION_KEY):
                captions[entry["id"]] = _text(entry, CAPTION_KEY)
    return captions
