"""SIGTERM and SIGINT become a wish that the fit loop grants at the next step border."""

import signal
from types import FrameType, TracebackType


class StopSignal:
    """While this context is open, the first SIGTERM or SIGINT only sets `requested`.

    A second SIGINT interrupts at once: a person at a keyboard means it.
    """

    requested: bool

    def __enter__(self) -> "StopSignal":
        self.requested = False
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
