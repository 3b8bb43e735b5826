"""Named arrays of one dimension in one file: written in pieces, read by memory map.

A line of JSON, padded to 64 bytes, then the arrays one after the other. Processes of a machine that read the
same file share its pages; nothing is read that is not asked for.
"""

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from cad_mllm.data.atomic import atomic_path

Arrays = Mapping[str, npt.NDArray[Any]]

_ALIGNMENT = 64
_COPY_BYTES = 2**20


class ColumnsWriter:
    """Appends to the columns of a file that is whole, or not there.

        with ColumnsWriter(path, {"ids": "<u1"}) as writer:
            writer.add("ids", values)
            header = writer.finish({"format": ...})

    Until `finish`, each column has a hidden file of its own beside `path`.
    """

    def __init__(self, path: Path, dtypes: Mapping[str, str]) -> None:
        self._path = path
        self._dtypes = {name: np.dtype(dtype) for name, dtype in dtypes.items()}
        self._parts = {name: path.with_name(f".{path.name}.{name}") for name in dtypes}
        self._stack = ExitStack()

    def __enter__(self) -> "ColumnsWriter":
        self._files = {name: self._stack.enter_context(part.open("wb")) for name, part in self._parts.items()}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        for part in self._parts.values():
            part.unlink(missing_ok=True)

    def add(self, name: str, values: npt.ArrayLike) -> None:
        """Append to a column."""
        self._files[name].write(np.ascontiguousarray(values, self._dtypes[name]).tobytes())

    def finish(self, header: Mapping[str, Any]) -> dict[str, Any]:
        """Write the file; the header, with the places of the arrays and the digest of their bytes added."""
        self._stack.close()
        places, offset, digest = {}, 0, hashlib.sha256()
        for name, part in self._parts.items():
            size = part.stat().st_size
            places[name] = [self._dtypes[name].str, offset, size // self._dtypes[name].itemsize]
            offset += size + -size % _ALIGNMENT
            with part.open("rb") as file:
                while piece := file.read(_COPY_BYTES):
                    digest.update(piece)
        full = {**header, "arrays": places, "body_bytes": offset, "body_sha256": digest.hexdigest()}
        line = json.dumps(full).encode()
        line += b" " * (-(len(line) + 1) % _ALIGNMENT) + b"\n"
        with atomic_path(self._path, durable=True) as temporary, temporary.open("wb") as out:
            out.write(line)
            for part in self._parts.values():
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out, _COPY_BYTES)
                out.write(b"\0" * (-out.tell() % _ALIGNMENT))
        return full


def read_columns(path: Path, *, verify: bool) -> tuple[dict[str, Any], Arrays] | None:
    """Header and read-only arrays; None for a file that is missing, foreign or cut.

    `verify` reads all of it and compares the digest.
    """
    try:
        with path.open("rb") as file:
            line = file.readline()
            header = json.loads(line)
        places, body_bytes = dict(header["arrays"]), int(header["body_bytes"])
        if path.stat().st_size != len(line) + body_bytes:
            return None
        body = np.memmap(path, mode="r", offset=len(line)) if body_bytes else np.zeros(0, np.uint8)
        arrays = {
            name: np.asarray(body[offset : offset + length * np.dtype(dtype).itemsize]).view(dtype)
            for name, (dtype, offset, length) in places.items()
        }
        digest = header["body_sha256"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None  # whatever a foreign or torn line holds
    if verify:
        found = hashlib.sha256()
        for array in arrays.values():
            found.update(memoryview(array))
        if found.hexdigest() != digest:
            return None
    return header, arrays
