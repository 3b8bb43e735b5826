"""The sharded data set: a folder (or an fsspec URL) of Arrow files under one index with their checksums.

    <root>/dataset.json         format, settings, per split the shards (rows, bytes, sha256), fingerprint
    <root>/train/00000.arrow    Arrow IPC file, uncompressed; one row per model, sorted by id in the split
    <root>/val/00000.arrow      may be absent

Shards of a folder are read by memory map. Those of a URL are copied, each at its first use, into this
machine's cache (`$XDG_CACHE_HOME/cad-mllm/shards`), checked, and then read by memory map too.

Shapes: P points of a cloud, C = 6 channels (xyz, unit normal).
"""

import ctypes
import fcntl
import hashlib
import json
import os
import shutil
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import IO, Any, overload

import numpy as np
import numpy.typing as npt

from cad_mllm.data.atomic import atomic_path
from cad_mllm.data.layout import Split
from cad_mllm.errors import ConfigError, DataError, without_credentials

FORMAT = "cad-mllm-shards-1"
INDEX_FILE = "dataset.json"
ROWS_PER_BATCH = 64
"""Rows that the writer holds in memory, and that stand together in the file: 13 MB with 8 views of 224 px."""

HalfArray = npt.NDArray[np.float16]

_POINT_BYTES = 6 * 2
_COPY_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelRow:
    """One model of the data set: a row of a shard. The fields are the columns, in their order."""

    id: str
    caption: str
    """Empty where there is none."""
    caption_source: str
    """`given`, `template`, `procedural`."""
    json: str
    """Minified Omni-CAD JSON as it was read: the source of truth."""
    command_8: str | None
    """Command text at 8 bits, as training learns it; None if the model cannot be written at that width."""
    command_10: str | None
    """The same at 10 bits."""
    points: HalfArray
    """(P, 6): coordinates and unit normals."""
    views: tuple[bytes, ...]
    """PNG files."""
    scale: float
    """Half-extent that normalising divided by."""
    center: tuple[float, float, float]
    """What it subtracted before."""
    num_extrudes: int
    num_curves: int


COLUMNS = tuple(field.name for field in fields(ModelRow))


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A shard as the index knows it."""

    file: str
    """Relative to the root, with `/`."""
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What `dataset.json` says."""

    settings: Mapping[str, object]
    """What the rows look like: points, views, size, ..."""
    splits: Mapping[Split, tuple[Shard, ...]]
    """Shards in the order of their ids."""

    @property
    def fingerprint(self) -> str:
        """sha256 over the shards' digests, split by split: equal for equal data."""
        digests = {split: [shard.sha256 for shard in shards] for split, shards in self.splits.items()}
        return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Of all splits."""
        return tuple(shard for shards in self.splits.values() for shard in shards)

    def num_rows(self, split: Split) -> int:
        """Models of a split; 0 for one that is absent."""
        return sum(shard.rows for shard in self.splits.get(split, ()))


def schema(points: int) -> Any:
    """The pyarrow schema of a shard whose clouds have `points` points."""
    import pyarrow as pa

    types = {
        "id": pa.string(),
        "caption": pa.string(),
        "caption_source": pa.string(),
        "json": pa.string(),
        "command_8": pa.string(),
        "command_10": pa.string(),
        "points": pa.binary(points * _POINT_BYTES),
        "views": pa.list_(pa.binary()),
        "scale": pa.float64(),
        "center": pa.list_(pa.float64(), 3),
        "num_extrudes": pa.int32(),
        "num_curves": pa.int32(),
    }
    nullable = {"command_8", "command_10"}
    return pa.schema([pa.field(name, types[name], nullable=name in nullable) for name in COLUMNS])


class ShardWriter:
    """Writes one shard: the same bytes for the same rows, whole or not there.

        with ShardWriter(root, "train/00000.arrow", points=8192) as writer:
            writer.add(row)
        shard = writer.shard

    The file has a temporary name until the block ends without an exception. Raises DataError if it cannot be
    written (a full disk).
    """

    shard: Shard
    """For the manifest; there after the block."""

    def __init__(self, root: Path, file: str, *, points: int) -> None:
        self._path = root / file
        self._file = file
        self._points = points
        self._pending: list[ModelRow] = []
        self._rows = 0
        self._last_id = ""
        self._stack = ExitStack()

    def __enter__(self) -> "ShardWriter":
        import pyarrow as pa

        self._schema = schema(self._points)
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self._stack.enter_context(atomic_path(self._path, durable=True))
            self._out = _Hashed(self._stack.enter_context(temporary.open("wb")))
        self._sink = pa.PythonFile(self._out, mode="w")
        self._writer = pa.ipc.new_file(self._sink, self._schema)
        return self

    def add(self, row: ModelRow) -> None:
        """Append a model; ids must ascend."""
        assert self._rows == 0 or row.id > self._last_id, "rows are sorted by id"
        assert row.points.shape == (self._points, 6), "all clouds of a data set have the same size"
        self._pending.append(row)
        self._rows += 1
        self._last_id = row.id
        if len(self._pending) == ROWS_PER_BATCH:
            self._flush()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with _writing(self._path), self._stack:
            self._flush()
            self._writer.close()
            self._sink.close()
        self.shard = Shard(
            file=self._file, rows=self._rows, bytes=self._out.size, sha256=self._out.digest.hexdigest()
        )

    def _flush(self) -> None:
        import pyarrow as pa

        if not self._pending:
            return
        columns = {name: [getattr(row, name) for row in self._pending] for name in COLUMNS}
        columns["points"] = [np.ascontiguousarray(cloud, "<f2").tobytes() for cloud in columns["points"]]
        columns["views"] = [list(views) for views in columns["views"]]
        columns["center"] = [list(center) for center in columns["center"]]
        with _writing(self._path):
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
        self._pending.clear()


class _Hashed:
    """A file to write to that knows the digest and the number of what went in."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.size = 0
        self.closed = False

    def write(self, data: bytes) -> int:
        self._file.write(data)
        self.digest.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file itself is closed by whoever opened it."""
        self.closed = True


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}. Free space or name another folder, and "
            "start again: nothing half-written is left"
        ) from error


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write `dataset.json`: the data set is there from then on."""
    content = {
        "format": FORMAT,
        "settings": dict(manifest.settings),
        "splits": {split: [asdict(shard) for shard in shards] for split, shards in manifest.splits.items()},
        "fingerprint": manifest.fingerprint,
    }
    path = root / INDEX_FILE
    with _writing(path):
        root.mkdir(parents=True, exist_ok=True)
    with _writing(path), atomic_path(path, durable=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def is_url(location: str | Path) -> bool:
    """Whether fsspec has to read it: `s3://bucket/data`. Everything else is a folder."""
    return "://" in str(location)


def is_sharded(location: str | Path) -> bool:
    """Whether a data set of shards is (or, for a URL, can only be) there."""
    return is_url(location) or (Path(location) / INDEX_FILE).is_file()


def read_manifest(root: str | Path) -> Manifest:
    """The index of a data set. Raises DataError, naming the file, if it is absent, foreign or damaged."""
    place = _join(root, INDEX_FILE)
    with _reading(place), _open(root, INDEX_FILE) as file:
        text = file.read()
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise DataError(f"{place} is of the format {content['format']!r}, this version reads {FORMAT!r}")
        manifest = Manifest(
            settings=dict(content["settings"]),
            splits={
                split: tuple(Shard(**shard) for shard in shards)
                for split, shards in content["splits"].items()
            },
        )
        intact = manifest.fingerprint == content["fingerprint"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{place} is damaged ({error}): {_REMEDY}") from error
    if not intact:
        raise DataError(f"{place} is damaged (its fingerprint is not that of its shards): {_REMEDY}")
    for shard in manifest.shards:
        if shard.file.startswith("/") or ".." in shard.file.split("/"):
            raise DataError(f"{place} names a shard outside its folder: {shard.file}")
    return manifest


_REMEDY = "copy it again from where it was made, or make it again with `cad-mllm prepare`"


def verify(
    root: str | Path, manifest: Manifest, advance: Callable[[Shard], None] = lambda shard: None
) -> None:
    """Read every shard and compare its bytes with the index; `advance` is called after each.

    The shards of a URL come into the cache on the way. Raises DataError naming the first that does not match.
    """
    for shard in manifest.shards:
        fault = shard_fault(root, shard)
        if fault is not None:
            raise DataError(f"{fault}: {_REMEDY}")
        advance(shard)


def shard_fault(root: str | Path, shard: Shard) -> str | None:
    """What is wrong with the bytes of a shard, its name first; None for an intact one."""
    try:
        path = _local(root, shard)
    except DataError as error:
        return str(error).removesuffix(f": {_REMEDY}")
    if is_url(root):
        return None  # checked on its way into the cache
    with _reading(str(path)), path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _mismatch(str(path), shard, shard.bytes, digest)


def _mismatch(place: str, shard: Shard, size: int, sha256: str | None = None) -> str | None:
    if size != shard.bytes:
        return f"{place} has {size:,} bytes, the index says {shard.bytes:,}"
    if sha256 is not None and sha256 != shard.sha256:
        return f"{place} was changed or damaged: its sha256 is not that of the index"
    return None


def _local(root: str | Path, shard: Shard) -> Path:
    """The shard as a file of this machine, of the right size. DataError for one that is not there or cut."""
    path = _cached(str(root), shard) if is_url(root) else Path(root) / shard.file
    with _reading(str(path)):
        size = path.stat().st_size
    fault = _mismatch(str(path), shard, size)
    if fault is not None:
        raise DataError(f"{fault}: {_REMEDY}")
    return path


def cache_folder() -> Path:
    """Where shards of URLs are kept on this machine, by their digest."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cad-mllm" / "shards"


def _cached(root: str, shard: Shard) -> Path:
    """The shard's copy in the cache; it is made, and checked, by the first process that asks for it."""
    path = cache_folder() / f"{shard.sha256}.arrow"
    if path.is_file():
        return path
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("wb")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            with _writing(path), atomic_path(path) as temporary:
                _copy(root, shard, temporary)
    return path


def _copy(root: str, shard: Shard, target: Path) -> None:
    place = _join(root, shard.file)
    with target.open("wb") as file:
        out = _Hashed(file)
        with _reading(place), _open(root, shard.file) as source:
            shutil.copyfileobj(source, out, _COPY_BYTES)
    fault = _mismatch(place, shard, out.size, out.digest.hexdigest())
    if fault is not None:
        raise DataError(f"{fault}: {_REMEDY}")


def _join(root: str | Path, file: str) -> str:
    return f"{str(root).rstrip('/')}/{file}"


def _open(root: str | Path, file: str) -> Any:
    if not is_url(root):
        return (Path(root) / file).open("rb")
    import fsspec

    return fsspec.open(_join(root, file), "rb")


@contextmanager
def _reading(place: str) -> Iterator[None]:
    """Whatever goes wrong while the body reads `place` becomes one DataError that names it."""
    try:
        yield
    except (DataError, ConfigError):
        raise
    except ImportError as error:
        raise ConfigError(f"{place}: fsspec needs another package to read it: {error}") from error
    except FileNotFoundError as error:
        raise DataError(f"{place} is missing: {_REMEDY}") from error
    except Exception as error:  # every file system of fsspec has errors of its own
        detail = without_credentials(str(error)).partition("\n")[0]
        raise DataError(f"{place} cannot be read: {detail or type(error).__name__}") from error


class ShardedSplit:
    """One split, read lazily: opening it costs nothing, and nothing is copied that is not asked for.

    Picklable; each process opens shards for itself. Every reader raises DataError naming a shard that is
    absent, cut or unreadable.
    """

    def __init__(self, root: str | Path, split: Split, manifest: Manifest | None = None) -> None:
        self.root = root
        self.split = split
        self.manifest = read_manifest(root) if manifest is None else manifest
        self.shards: tuple[Shard, ...] = self.manifest.splits.get(split, ())
        self._starts = list(accumulate((shard.rows for shard in self.shards), initial=0))
        self._opened: dict[int, list[_Part]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def ids(self) -> "StringColumn":
        """Of all models, ascending; read from the shards as they are asked for."""
        return self.column("id")

    def column(self, name: str) -> "StringColumn":
        """A column of strings."""
        return StringColumn(self, name)

    def local_stats(self) -> Iterator[tuple[str, int, int]]:
        """File, size and time (ns) of each shard, nothing for a URL; DataError for a wrong size."""
        if not is_url(self.root):
            for shard in self.shards:
                stat = _local(self.root, shard).stat()
                yield shard.file, stat.st_size, stat.st_mtime_ns

    def place(self, number: int) -> str:
        """File and row of a model, for messages."""
        shard, row = self._locate(number)
        return f"{_join(self.root, self.shards[shard].file)} row {row}"

    def row(self, number: int) -> ModelRow:
        """Everything of one model."""
        values = {name: self.value(number, name) for name in COLUMNS if name not in ("points", "views")}
        views = tuple(self.view(number, view).tobytes() for view in range(self.num_views(number)))
        values["center"] = tuple(values["center"])
        return ModelRow(**values, points=self.points(number), views=views)

    def value(self, number: int, column: str) -> Any:
        """One cell, as a Python object."""
        part, row = self._part(number)
        return part.batch.column(column)[row].as_py()

    def points(self, number: int) -> HalfArray:
        """The cloud (P, 6) of a model: read-only, a view of the mapped file."""
        part, row = self._part(number)
        cloud_PC: HalfArray = part.points_RPC[row]
        return cloud_PC

    def num_views(self, number: int) -> int:
        """Pictures of a model."""
        part, row = self._part(number)
        return int(part.first_view[row + 1] - part.first_view[row])

    def view(self, number: int, view: int) -> npt.NDArray[np.uint8]:
        """Bytes of one PNG file: read-only, a view of the mapped file."""
        assert 0 <= view < self.num_views(number), view
        part, row = self._part(number)
        position = int(part.first_view[row]) + view
        return part.view_bytes[part.view_ends[position] : part.view_ends[position + 1]]

    def batches(self, columns: Sequence[str]) -> Iterator[dict[str, list[Any]]]:
        """These columns of all models in their order, at most 256 rows at a time."""
        for shard in range(len(self.shards)):
            for part in self._parts(shard):
                yield part.batch.select(list(columns)).to_pydict()

    def _locate(self, number: int) -> tuple[int, int]:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]

    def _part(self, number: int) -> tuple["_Part", int]:
        shard, row = self._locate(number)
        parts = self._parts(shard)
        size = parts[0].batch.num_rows  # of all but the last
        return parts[row // size], row % size

    def _parts(self, shard: int) -> list["_Part"]:
        if shard not in self._opened:
            path = _local(self.root, self.shards[shard])
            with _reading(str(path)):
                self._opened[shard] = _map_shard(path, self.shards[shard].rows)
        return self._opened[shard]


def held_out(root: str | Path) -> ShardedSplit:
    """The val split of a data set, or its train split if it has no other."""
    manifest = read_manifest(root)
    return ShardedSplit(root, "val" if manifest.num_rows("val") else "train", manifest)


@dataclass(frozen=True, eq=False)
class _Part:
    """A record batch of R rows in a mapped file: addresses, not data.

    What is large is taken from the buffers: a cell that pyarrow hands out is a copy.
    """

    batch: Any
    points_RPC: HalfArray
    first_view: npt.NDArray[np.int32]
    """(R + 1,): the pictures of row r are those from `first_view[r]` to `first_view[r + 1]`."""
    view_ends: npt.NDArray[np.int32]
    """Picture n is `view_bytes[view_ends[n] : view_ends[n + 1]]`."""
    view_bytes: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, batch: Any) -> "_Part":
        points, views = batch.column("points"), batch.column("views")
        cells = memoryview(points.buffers()[1] or b"").toreadonly()
        pictures = views.values.buffers()
        return cls(
            batch,
            np.frombuffer(cells, dtype="<f2").reshape(len(points), -1, 6),
            _offsets(views.buffers()[1], len(views)),
            _offsets(pictures[1], len(views.values)),
            np.frombuffer(memoryview(pictures[2] or b"").toreadonly(), np.uint8),
        )


def _offsets(buffer: Any, length: int) -> npt.NDArray[np.int32]:
    """A copy, made without Python's lock: a mount that stalls must not hold up the threads that wait for it.

    Arrow leaves the offsets of an empty array out.
    """
    ends = np.zeros(length + 1, dtype="<i4")
    if length:
        ctypes.memmove(ends.ctypes.data, buffer.address, ends.nbytes)
    return ends


def _map_shard(path: Path, rows: int) -> list[_Part]:
    import pyarrow as pa

    # No threads: a forked process would wait for those that it does not have.
    options = pa.ipc.IpcReadOptions(use_threads=False)
    source = pa.memory_map(str(path))
    reader = pa.ipc.open_file(source, options=options)
    if not reader.schema.equals(schema(reader.schema.field("points").type.byte_width // _POINT_BYTES)):
        raise DataError(f"{path} has other columns than {FORMAT}: {_REMEDY}")
    parts = [_Part.of(reader.get_batch(n)) for n in range(reader.num_record_batches)]
    source.close()  # the mapping stays as long as its parts; hundreds of open files are many systems' limit
    sizes = [part.batch.num_rows for part in parts]
    if sum(sizes) != rows or any(size != sizes[0] for size in sizes[:-1]):
        raise DataError(f"{path} has {sum(sizes)} rows in {len(sizes)} parts, not {rows}: {_REMEDY}")
    return parts


class StringColumn(Sequence[str]):
    """A column of a split as a sequence of strings; a null is an empty one. Holds no strings itself."""

    def __init__(self, split: ShardedSplit, name: str) -> None:
        self._split = split
        self._name = name

    def __len__(self) -> int:
        return len(self._split)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return self._split.value(number, self._name) or ""

    def __iter__(self) -> Iterator[str]:
        for batch in self._split.batches([self._name]):
            yield from (text or "" for text in batch[self._name])
