"""A progress bar with time left, for work that turns out to take longer than two seconds."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_PATIENCE = 2.0
_LOG_INTERVAL = 30.0


class SlowProgress:
    """Counts to `total`: a bar on a terminal, a line every half minute in a log, nothing for quick work."""

    def __init__(self, description: str, total: int) -> None:
        self._description = description
        self._total = total
        self._done = 0
        self._start = self._last_line = time.monotonic()
        self._console = Console(file=sys.stderr)
        self._is_terminal = self._console.is_terminal  # reads the environment each time
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "SlowProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """Count items that are done."""
        self._done += count
        now = time.monotonic()
        if self._is_terminal:
            if self._bar is None and now - self._start > _PATIENCE:
                self._show()
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)
        elif now - self._last_line > _LOG_INTERVAL:
            self._last_line = now
            left = (now - self._start) / self._done * (self._total - self._done)
            self._console.print(
                f"{self._description}: {self._done}/{self._total}, {left:.0f} s left", highlight=False
            )

    def _show(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=self._console)
        self._task = self._bar.add_task(self._description, total=self._total)
        self._bar.start()
