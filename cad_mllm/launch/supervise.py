"""Start processes, pass signals on to all of them at once, wait for all, and find the code that says it all.

Signals are blocked and fetched (`sigtimedwait`) instead of handled: none is lost between two lines of
Python, none interrupts one, and it works the same when this process is PID 1 of a container.
"""

import ctypes
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cad_mllm.errors import ExitCode

STOP_SIGNALS = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGINT: signal.SIGINT,
    # mpirun itself ends at SIGTERM, its ranks two seconds later. These it passes on.
    signal.SIGUSR1: signal.SIGTERM,
    signal.SIGUSR2: signal.SIGINT,
}
"""What asks a run to stop, and what the ranks are sent for it."""
THROUGH_MPIRUN = {
    signal.SIGTERM: signal.SIGUSR1,
    signal.SIGINT: signal.SIGUSR2,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGUSR2: signal.SIGUSR2,
}
"""The same, where the process is mpirun."""
_WATCHED = {*STOP_SIGNALS, signal.SIGCHLD}
_SIGNALLED = 128
_BUG = 1
_PR_SET_PDEATHSIG = 1

Translation = Mapping[signal.Signals, signal.Signals]


class StoppedError(Exception):
    """A signal asked to stop before there was anything to stop."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(f"stopped by {number.name} before the ranks were started")
        self.code = _SIGNALLED + STOP_SIGNALS[number]


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long ended and ending processes are waited for, in seconds."""

    grace: float = 300.0
    """For a checkpoint: between a request to stop and SIGKILL."""
    peers: float = 3.0
    """After a rank failed, the others get so long to end by themselves (and say what they know)."""
    last: float = 5.0
    """Between SIGTERM and SIGKILL for those that did not."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """A process that ended."""

    name: str
    code: int
    """Exit code; 128 + n after signal n."""
    consequence: bool
    """Ended by us because another one had failed: says nothing about the cause."""


def say(line: str) -> None:
    """A line in the container's log, in one piece: the ranks write there too."""
    sys.stderr.write(f"launcher: {line}\n")
    sys.stderr.flush()


def block_signals() -> None:
    """From here on the signals that matter wait until they are fetched. Children start without this."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _WATCHED)


def die_with_parent() -> None:
    """Be killed when the parent is: kill -9 of a launcher must not leave ranks behind (Linux)."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")


class Waiting:
    """Waiting before the ranks are started: a stop ends it at once."""

    def __init__(self) -> None:
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds since this began."""
        return time.monotonic() - self._started

    def sleep(self, seconds: float) -> None:
        """Pass the time.

        Raises:
            StoppedError: a signal came, now or earlier.
        """
        end = time.monotonic() + seconds
        while (number := _fetch(end - time.monotonic())) is not None:
            if number != signal.SIGCHLD:
                raise StoppedError(number)


def start(command: Sequence[str], env: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    """Start a process that gets no signal but ours, and that dies with us."""
    us = os.getpid()

    def in_child() -> None:
        die_with_parent()
        if os.getppid() != us:  # we were gone before the line above
            os._exit(_SIGNALLED + signal.SIGKILL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _WATCHED)

    return subprocess.Popen(
        command,
        env=dict(env),
        stdin=subprocess.DEVNULL,
        process_group=0,
        preexec_fn=in_child,
    )


def supervise(
    processes: Mapping[str, "subprocess.Popen[bytes]"], patience: Patience, translation: Translation
) -> list[Ended]:
    """Wait for all of them, passing signals on; how they ended, in that order.

    After one failed, the others are given a short while, then ended: SIGTERM, then SIGKILL.
    """
    running = dict(processes)
    ended: list[Ended] = []
    asked = ending = False
    terminate_at = kill_at = math.inf
    while running:
        number = _fetch(min(terminate_at, kill_at) - time.monotonic())
        if number is not None and number != signal.SIGCHLD:
            say(f"{number.name}: passed on to {', '.join(running)}")
            _send(running, translation[number])
            if not asked:
                kill_at = min(kill_at, time.monotonic() + patience.grace)
            asked = True
        for name, code in _reap(running):
            ended.append(Ended(name=name, code=code, consequence=ending and code > _SIGNALLED))
            expected = code == ExitCode.DONE or (asked and code == ExitCode.STOPPED)
            if running and not expected and not ending and terminate_at == math.inf:
                say(f"{name} {describe(code)}: ending the others")
                terminate_at = time.monotonic() + patience.peers
        now = time.monotonic()
        if now >= terminate_at:
            _send(running, translation[signal.SIGTERM])
            # After a stop of one rank alone the others may still be saving.
            stopped = verdict(ended) == ExitCode.STOPPED
            kill_at = min(kill_at, now + (patience.grace if stopped else patience.last))
            ending, terminate_at = True, math.inf
        if now >= kill_at:
            say(f"killing {', '.join(running)}: time is up")
            for process in running.values():
                os.killpg(process.pid, signal.SIGKILL)
            kill_at = math.inf
    return ended


def verdict(ended: Sequence[Ended]) -> int:
    """The one code for all: that of the cause, not of what the cause did to the others.

    The user's mistakes first, then a bug, then what a restart can mend: a rank that died by itself before
    one that lost a peer, before one that was stopped. Among equals the first to end.
    """
    failed = [e for e in ended if e.code != ExitCode.DONE]
    if not failed:
        return int(ExitCode.DONE)
    return min([e for e in failed if not e.consequence] or failed, key=lambda e: _weight(e.code)).code


def _weight(code: int) -> int:
    if code == _BUG:
        return 1
    if code < _SIGNALLED:
        return 0
    return {int(ExitCode.PEER_LOST): 3, int(ExitCode.STOPPED): 4}.get(code, 2)


def describe(code: int) -> str:
    """How a process ended, in words."""
    if code > _SIGNALLED and code - _SIGNALLED in {s.value for s in signal.Signals} - {signal.SIGTERM}:
        return f"was ended by {signal.Signals(code - _SIGNALLED).name} (exit code {code})"
    return f"ended with exit code {code}"


def _fetch(seconds: float) -> signal.Signals | None:
    """The next signal, or None when the time is up."""
    if seconds == math.inf:
        return signal.Signals(signal.sigwait(_WATCHED))
    info = signal.sigtimedwait(_WATCHED, max(seconds, 0.0))
    return None if info is None else signal.Signals(info.si_signo)


def _send(running: Mapping[str, "subprocess.Popen[bytes]"], number: signal.Signals) -> None:
    """To the processes alone, not to their workers, which would die of it. None of them is reaped yet."""
    for process in running.values():
        os.kill(process.pid, number)


def _reap(running: "dict[str, subprocess.Popen[bytes]]") -> list[tuple[str, int]]:
    """Collect every child that ended, ours and (as PID 1) orphans; ours leave `running`."""
    names = {process.pid: name for name, process in running.items()}
    ended: list[tuple[str, int]] = []
    while True:
        try:
            info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return ended
        if info is None:
            return ended
        if info.si_pid not in names:
            os.waitpid(info.si_pid, 0)
            continue
        # Its workers, if it left any. The group's number is taken as long as the leader is not reaped.
        os.killpg(info.si_pid, signal.SIGKILL)
        name = names.pop(info.si_pid)
        code = running.pop(name).wait()
        ended.append((name, code if code >= 0 else _SIGNALLED - code))
