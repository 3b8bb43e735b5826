"""Files that are either whole or not there, whenever a process is killed."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cad_mllm.errors import ConfigError


@contextmanager
def atomic_path(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the place of `path` if the body succeeds.

    `durable` also outlives a power cut (one fsync: milliseconds). One writer per path at a time.
    """
    temporary = path.with_name(f".{path.stem}.part{path.suffix}")
    try:
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def make_writable(folder: Path, flag: str) -> None:
    """Make the folder, and try a write now rather than after the first work. ConfigError names the flag."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"{flag} {folder}: cannot be written ({error.strerror or error}). "
            "Name a folder on a writable volume, and check that it is mounted."
        ) from error


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON, its folder included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content), encoding="utf-8")
