"""Starts that get nowhere are counted in the output folder, and end the run for good.

Kubernetes recreates a pod whose exit code is 128 or more for ever; what fails again and again at the same
place must not keep GPUs busy over a weekend.
"""

import contextlib
import json
import time
import traceback
from pathlib import Path

from cad_mllm.data.atomic import atomic_path
from cad_mllm.errors import PreflightError, without_credentials

_FILE = "restarts.json"
_LAST_ERROR = "last_error.txt"


def count_start(output_dir: Path, *, global_step: int, limit: int) -> None:
    """Note that a run starts at `global_step` (rank 0 only).

    Raises:
        PreflightError: more than `limit` restarts in a row began at this very step.
    """
    path = output_dir / _FILE
    starts = 1 + _starts_at(path, global_step)
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps({"global_step": global_step, "starts": starts}), encoding="utf-8")
    if starts > limit + 1:
        raise PreflightError(
            f"{starts - 1} restarts began at step {global_step} and none came to a newer checkpoint; the "
            f"last error: {_last_error(output_dir)}. Mend that, remove {path}, and start again "
            f"(--max_restarts_without_progress, now {limit})."
        )


def clear(output_dir: Path) -> None:
    """The run ended as it should (done, or stopped with a checkpoint): count afresh (rank 0 only)."""
    (output_dir / _FILE).unlink(missing_ok=True)


def note_error(output_dir: Path, rank: int, error: BaseException) -> None:
    """Keep the words of an error for the run after the next restarts."""
    trace = "".join(traceback.format_exception(error))
    # The error itself is on its way to the user; a full disk must not take its place.
    with contextlib.suppress(OSError):
        first_line = f"rank {rank}: {type(error).__name__}: {error}".replace("\n", " ")
        text = f"{first_line}\n{time.strftime('%Y-%m-%d %H:%M:%S %z')}\n{trace}"
        (output_dir / _LAST_ERROR).write_text(without_credentials(text), encoding="utf-8")


def _starts_at(path: Path, global_step: int) -> int:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return int(noted["starts"]) if noted["global_step"] == global_step else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0  # none yet, or half of a file on a volume that broke: the count begins again


def _last_error(output_dir: Path) -> str:
    try:
        return (output_dir / _LAST_ERROR).read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "none was left behind (killed from outside: out of memory, evicted?)"
