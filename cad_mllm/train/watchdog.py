"""A run that makes no step any more says where it stands, and ends with a code that a restart follows."""

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from cad_mllm.errors import ExitCode

_FILE_SECONDS = 10.0


class Watchdog:
    """While this context is open, `beat` must be called at least every `seconds`.

    Otherwise the Python stacks of all threads go to stderr and to `<output_dir>/stacks-rank<N>.txt`, and the
    process ends at once with ExitCode.HUNG. Each rank has its own: in a hang all of them write.
    """

    def __init__(self, seconds: float, output_dir: Path, rank: int) -> None:
        self._seconds = seconds
        self._path = output_dir / f"stacks-rank{rank}.txt"
        self._rank = rank
        self._closed = threading.Event()
        self._last = time.monotonic()

    def __enter__(self) -> "Watchdog":
        self.beat()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def beat(self) -> None:
        """Something was done."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._last > self._seconds:
                self._bark()

    def _bark(self) -> None:
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        # Beside, and not for long: the volume may be what hangs.
        to_file = threading.Thread(target=self._write_stacks, daemon=True)
        to_file.start()
        to_file.join(_FILE_SECONDS)
        print(
            f"[rank {self._rank}] error: nothing was done for {self._seconds:.0f} s "
            f"(--hang_timeout_minutes): the stacks are above and in {self._path}. A restart with "
            f"--resume_from_ckpt auto goes on.\n[rank {self._rank}] exit code {int(ExitCode.HUNG)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(ExitCode.HUNG)

    def _write_stacks(self) -> None:
        try:
            with self._path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            print(f"{self._path}: {error}", file=sys.stderr)
