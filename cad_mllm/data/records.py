"""Small files by which a run tells later runs, and other pods, what it finished: whole, or not there.

Several pods may write the same record: what is in it follows from the input alone, and a lock keeps them
apart. The lock files stay.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cad_mllm.data.atomic import atomic_path


@contextmanager
def locked(folder: Path, what: str = "records") -> Iterator[None]:
    """One process at a time, of all that name the same in this folder (shared by several nodes, too)."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f".{what}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_record(path: Path, content: Any) -> None:
    """Write `content` as JSON with its digest, durably."""
    with locked(path.parent), atomic_path(path, durable=True) as temporary:
        temporary.write_text(json.dumps({"content": content, "sha256": _digest(content)}), encoding="utf-8")


def read_record(path: Path) -> Any:
    """What was written; None for a record that is not there or damaged."""
    try:
        record = json.loads(path.read_bytes())
        content = record["content"]
        return content if record["sha256"] == _digest(content) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
