"""The downloaded Omni-CAD data set, as its zip file or as a folder: models, captions, splits.

Nothing is unpacked to disk: members of a zip file are read one by one, and none is larger in memory than its
limit. All of it is outside data: what is wrong with a member is the reason to leave that member out, and only
what leaves nothing to work on (no zip file, no models) is an error.
"""

import hashlib
import json
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from cad_mllm.cad.jsonfile import check_size
from cad_mllm.data.captions import GIVEN, PROCEDURAL, SOURCE_KEY, TEMPLATE
from cad_mllm.data.layout import CAPTION_KEY, JSON_FOLDER, TEXT_FOLDER, Split, id_fault, walk_files
from cad_mllm.errors import CadError, DataError

MAX_TEXT_BYTES = 2**26
"""Largest file of captions, or of splits, that is read."""

SPLIT_NAMES: Mapping[str, Split] = {"train": "train", "val": "val", "validation": "val", "test": "val"}
"""Keys of a split file, and the split of a prepared data set that their models go to."""

_SYSTEM_FOLDER = "__MACOSX/"
_JSON = ".json"


@dataclass(frozen=True)
class Member:
    """A file of the data set, where it stands and what it was when it was listed."""

    name: str
    """Relative to the folder `json` or `txt`, with its suffix."""
    size: int
    """Bytes, unpacked."""
    version: int
    """CRC-32 in a zip file, time of change (ns) in a folder."""
    source: Any
    """For the reader."""
    fault: str | None = None
    """Why it is not read."""


class Tree(Protocol):
    """Where members come from."""

    def models(self) -> Iterable[Member]:
        """JSON files below `json`, and those of a zip file that stand nowhere."""

    def captions(self) -> Iterable[Member]:
        """JSON files below `txt`."""

    def read(self, member: Member) -> bytes:
        """Raises CadError for one that cannot be read."""


class FolderTree:
    """Files in folders."""

    def __init__(self, json_root: Path, txt_root: Path | None) -> None:
        self._json_root = json_root
        self._txt_root = txt_root

    def models(self) -> Iterable[Member]:
        """In the order of their names. Raises DataError for a folder that cannot be read."""
        return _below(self._json_root)

    def captions(self) -> Iterable[Member]:
        """In the order of their names."""
        return [] if self._txt_root is None else _below(self._txt_root)

    def read(self, member: Member) -> bytes:
        """A link is not followed: it may lead anywhere."""
        try:
            with open(os.open(member.source, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
                content = file.read(member.size + 1)
        except OSError as error:
            if Path(member.source).is_symlink():
                raise CadError("is a link: put the file itself there") from error
            raise CadError(f"cannot be read: {error.strerror or error}") from error
        if len(content) != member.size:
            raise CadError("was changed while it was read")
        return content


def _below(root: Path) -> Iterator[Member]:
    for name, found in walk_files(root):
        if name.endswith(_JSON):
            yield Member(name, found.st_size, found.st_mtime_ns, root / name)


class ZipTree:
    """Members of a zip file that holds `json/` and `txt/`, at its top or below one folder."""

    def __init__(self, path: Path) -> None:
        """Raises DataError for what is no zip file, or one without models."""
        try:
            self._zip = zipfile.ZipFile(path)
        except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(
                f"--archive {path} is neither a folder nor a zip file that can be read ({error}): "
                "download it again"
            ) from error
        self._members = [info for info in self._zip.infolist() if not info.is_dir()]
        names = [info.filename for info in self._members if id_fault(info.filename) is None]
        roots = {found[0] for name in names if (found := re.match(r"(?:.*?/)?(?=json/)", name)) is not None}
        roots = {root for root in roots if not root.startswith(_SYSTEM_FOLDER)}
        if not roots:
            raise DataError(f"--archive {path} has no folder json/ with models in it")
        self._root = min(roots, key=lambda root: (len(root), root))

    def models(self) -> Iterator[Member]:
        """Names that lead out of the archive are among them, with the fault."""
        yield from self._below(f"{self._root}{JSON_FOLDER}/")
        for info in self._members:
            fault = id_fault(info.filename)
            if fault is not None and info.filename.endswith(_JSON):
                yield Member(info.filename, info.file_size, info.CRC, info, fault)

    def captions(self) -> Iterator[Member]:
        """In the order of the archive's directory."""
        return self._below(f"{self._root}{TEXT_FOLDER}/")

    def _below(self, folder: str) -> Iterator[Member]:
        for info in self._members:
            name = info.filename.removeprefix(folder)
            hidden = any(part.startswith(".") for part in name.split("/"))
            if name == info.filename or not name.endswith(_JSON) or hidden or id_fault(info.filename):
                continue
            fault = "is a link: put the file itself there" if stat.S_ISLNK(info.external_attr >> 16) else None
            yield Member(name, info.file_size, info.CRC, info, fault)

    def read(self, member: Member) -> bytes:
        """At most as many bytes as the directory says, so that a bomb does not go off."""
        try:
            with self._zip.open(member.source) as file:
                return file.read(member.size)
        except (OSError, RuntimeError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            # RuntimeError: encrypted, or (NotImplementedError) packed in a way that Python does not know
            raise CadError(f"cannot be read from the archive: {error}") from error


@dataclass(frozen=True)
class Rejected:
    """A model that is left out of the data set."""

    id: str
    stage: str
    """Where it failed: `archive`, `split`, `parse`, `duplicate`, `build`."""
    reason: str


class Archive:
    """The models of a data set by their ids."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._models: dict[str, Member] = {}
        rejected: dict[str, Rejected] = {}
        for member in tree.models():
            sample_id = member.name.removesuffix(_JSON)
            fault = member.fault or id_fault(sample_id)
            if sample_id in self._models:
                fault = "the archive holds this id twice"
            if fault is not None:
                rejected[sample_id] = Rejected(sample_id, "archive", fault)
            else:
                self._models[sample_id] = member
        for sample_id in rejected:
            self._models.pop(sample_id, None)
        self.ids = tuple(sorted(self._models))
        """Of the models that can be read, sorted."""
        self.rejected = tuple(rejected[sample_id] for sample_id in sorted(rejected))
        """Names that are no model's."""
        self._captions = sorted(tree.captions(), key=lambda member: member.name)

    @property
    def fingerprint(self) -> str:
        """sha256 over names, sizes and versions of all members."""
        digest = hashlib.sha256()
        for member in (*(self._models[sample_id] for sample_id in self.ids), *self._captions):
            digest.update(json.dumps([member.name, member.size, member.version]).encode())
        return digest.hexdigest()

    def read(self, sample_id: str) -> bytes:
        """The JSON file of a model, its size checked before. Raises CadError if it cannot be read."""
        member = self._models[sample_id]
        check_size(member.size)
        return self._tree.read(member)

    def captions(self) -> "Captions":
        """All captions. What is wrong with one of them, or with a whole file, is among their faults."""
        captions = Captions()
        for member in self._captions:
            where = f"{TEXT_FOLDER}/{member.name}"
            try:
                if member.fault is not None:
                    raise CadError(member.fault)
                if member.size > MAX_TEXT_BYTES:
                    raise CadError(
                        f"{member.size:,} bytes are more than the {MAX_TEXT_BYTES:,} that are read"
                    )
                entries = _parsed(self._tree.read(member))
                if not isinstance(entries, list):
                    raise CadError("is not a list")
            except CadError as error:
                captions.faults.append(f"{where}: {error}")
                continue
            for number, entry in enumerate(entries):
                captions.add(entry, f"{where}, entry {number + 1}", self._models)
        return captions


@dataclass(frozen=True)
class Caption:
    """What a model is called."""

    text: str
    source: str
    """`given`, `template`, `procedural`."""


@dataclass
class Captions:
    """Captions by the ids of their models."""

    by_id: dict[str, Caption] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    """Files and entries that are not used, and why."""
    orphans: set[str] = field(default_factory=set)
    """Ids that have a caption and no model."""

    def add(self, entry: object, where: str, models: Mapping[str, object]) -> None:
        """Take an entry of a file over, or note what is wrong with it. The first caption of an id stays."""
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            self.faults.append(f"{where}: has no id")
            return
        sample_id, text = entry["id"], entry.get(CAPTION_KEY)
        if sample_id not in models:
            self.orphans.add(sample_id.encode(errors="replace").decode())
        elif not isinstance(text, str) or not text.strip() or not is_text(text):
            self.faults.append(f'{where}: {sample_id} has no "{CAPTION_KEY}" that is a text')
        else:
            label = entry.get(SOURCE_KEY)
            caption = Caption(text, label if label in (TEMPLATE, PROCEDURAL) else GIVEN)
            if self.by_id.setdefault(sample_id, caption) != caption:
                self.faults.append(f"{where}: {sample_id} has another caption already, which stays")


def is_text(text: str) -> bool:
    """Whether it can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _parsed(content: bytes) -> object:
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise CadError(f"is not UTF-8 text: byte {error.start} is wrong") from error
    except RecursionError as error:
        raise CadError("is nested too deep") from error
    except ValueError as error:
        raise CadError(f"is not valid JSON: {error}") from error


def open_archive(path: Path) -> Archive:
    """The data set in a zip file, or in a folder with `json/` and (if there are captions) `txt/`.

    Raises DataError if there is none, or no model in it.
    """
    if not path.is_dir():
        return _with_models(Archive(ZipTree(path)), f"--archive {path}")
    if not (path / JSON_FOLDER).is_dir():
        raise DataError(f"--archive {path} has no folder {JSON_FOLDER}/: name the folder that holds it")
    texts = path / TEXT_FOLDER
    return _with_models(
        Archive(FolderTree(path / JSON_FOLDER, texts if texts.is_dir() else None)), f"--archive {path}"
    )


def open_folders(json_root: Path, txt_root: Path | None) -> Archive:
    """The data set in two folders that are named one by one. Raises DataError for one that is not there."""
    for flag, folder in (("--json_root", json_root), ("--txt_root", txt_root)):
        if folder is not None and not folder.is_dir():
            raise DataError(f"{flag} {folder} is not a folder")
    return _with_models(Archive(FolderTree(json_root, txt_root)), f"--json_root {json_root}")


def _with_models(archive: Archive, where: str) -> Archive:
    if not archive.ids and not archive.rejected:
        raise DataError(f"{where} holds no model (a .json file below {JSON_FOLDER}/)")
    return archive


class Splits:
    """Which split a model belongs to."""

    def __init__(self, path: Path | None) -> None:
        """Read a file such as `raw_train_test_split.json`: base ids by the names of their splits.

        None: all models are for training. Raises DataError for a file that says something else.
        """
        self._splits: dict[str, Split] | None = None
        self.fingerprint: str | None = None
        """sha256 of the file."""
        if path is None:
            return
        try:
            if (size := path.stat().st_size) > MAX_TEXT_BYTES:
                raise CadError(f"{size:,} bytes are more than the {MAX_TEXT_BYTES:,} that are read")
            text = path.read_bytes()
            content = _parsed(text)
        except OSError as error:
            raise DataError(f"--split_file {path} cannot be read: {error.strerror or error}") from error
        except CadError as error:
            raise DataError(f"--split_file {path} {error}") from error
        if not isinstance(content, dict) or not content.keys() <= SPLIT_NAMES.keys():
            raise DataError(
                f"--split_file {path} must be an object with lists of base ids under {', '.join(SPLIT_NAMES)}"
            )
        self.fingerprint = hashlib.sha256(text).hexdigest()
        self._splits = {}
        for name, bases in content.items():
            if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
                raise DataError(f"--split_file {path}: {name} must be a list of base ids")
            for base in bases:
                if self._splits.setdefault(base, SPLIT_NAMES[name]) != SPLIT_NAMES[name]:
                    raise DataError(
                        f"--split_file {path}: {base} is in two splits, so that the validation would see "
                        "what was trained on: leave it in one"
                    )

    def of(self, sample_id: str) -> Split | None:
        """By the id itself, or by what is before its last underscore; None for one that is not listed."""
        if self._splits is None:
            return "train"
        return self._splits.get(sample_id) or self._splits.get(sample_id.rpartition("_")[0])
