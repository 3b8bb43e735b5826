"""Follow a job to its end: conditions, pods and events as a timeline, rank 0's lines between."""

import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from cad_mllm.cluster.api import EVENTS, FORBIDDEN, NOT_FOUND, PODS, ApiError, Cluster, Resource
from cad_mllm.cluster.changes import changes
from cad_mllm.cluster.jobs import KINDS, JobKind, Json, kind_of
from cad_mllm.cluster.logs import rank0_lines
from cad_mllm.cluster.timeline import Note, Outcome, Timeline
from cad_mllm.errors import ClusterError

_TICK = 0.5
_LAST_LINES_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class JobRef:
    """A job in the cluster."""

    kind: JobKind
    name: str

    def __str__(self) -> str:
        return f"{self.kind.kind} {self.name}"


def find_job(cluster: Cluster, text: str) -> JobRef:
    """The job that `NAME` or `KIND/NAME` names. Raises ClusterError when there is none, or several."""
    wanted, _, name = text.rpartition("/")
    kinds = [kind for kind in KINDS if wanted.lower() in ("", kind.kind.lower(), f"{kind.kind.lower()}s")]
    found = [JobRef(kind=kind, name=name) for kind in kinds if _exists(cluster, kind, name)]
    if len(found) == 1:
        return found[0]
    if found:
        choices = " or ".join(f"{job.kind.kind.lower()}/{name}" for job in found)
        raise ClusterError(f"several jobs are named {name}: say which, {choices}")
    known = ",".join(_resource_name(kind) for kind in KINDS if _has_kind(cluster, kind))
    raise ClusterError(f"no job {text} in namespace {cluster.namespace}: {cluster.kubectl(f'get {known}')}")


def follow(
    cluster: Cluster,
    job: JobRef,
    *,
    tell: Callable[[str], None],
    line: Callable[[str], None] | None = None,
    deadline: float | None = None,
) -> Outcome:
    """The outcome of the job, once it has one; until then `tell` gets the timeline.

    `line` gets what rank 0 prints, None: its log is not read. `deadline` is on `time.monotonic`'s clock.
    Raises ClusterError when the deadline passes, when the job disappears, when a problem that waiting does
    not mend lasts for `patience.stuck` seconds, or when the API server refuses or stays away.
    """
    return _Follower(cluster, job, tell, line).run(deadline)


def told(cluster: Cluster, note: Note) -> str:
    """A note as one line, with the whole command that shows more or mends it."""
    return f"{note.text} -> {cluster.kubectl(note.mend)}" if note.mend else note.text


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM acts like Ctrl-C, so that what has to be cleaned up is, when CI cancels a run."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Follower:
    """One thread for each stream, one queue, one loop that tells what comes out of it."""

    def __init__(
        self,
        cluster: Cluster,
        job: JobRef,
        tell: Callable[[str], None],
        line: Callable[[str], None] | None,
    ) -> None:
        self._cluster = cluster
        self._job = job
        self._tell = tell
        self._line = line
        self._timeline = Timeline(kind=job.kind, name=job.name)
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue()
        self._stop = threading.Event()
        self._job_ended = threading.Event()
        self._log_read = threading.Event()
        self._gone = False

    def run(self, deadline: float | None) -> Outcome:
        resource = self._cluster.resource(self._job.kind.api_version, self._job.kind.kind)
        # The job first: events are judged by the time of its creation.
        job = self._cluster.get(resource, self._job.name)
        self._on_job(job)
        # It may be deleted before the watch begins.
        self._start(lambda: self._watch(resource, self._on_job_change, name=self._job.name, seen=(job,)))
        selector = self._job.kind.selector(self._job.name)
        self._start(lambda: self._watch(PODS, self._on_pod, labels=selector))
        self._start(self._watch_events)
        if self._line is not None:
            self._start(self._read_log)
        try:
            while True:
                self._take(_TICK)
                outcome = self._timeline.outcome()
                if outcome is not None:
                    return self._ending(outcome)
                if self._gone:
                    raise ClusterError(f"{self._job} was deleted before it ended: submit it again")
                self._give_up(deadline)
        finally:
            self._stop.set()
            self._job_ended.set()

    def _ending(self, outcome: Outcome) -> Outcome:
        """The last lines, and the pods' last words: they may come after the job's condition."""
        self._job_ended.set()
        patience = time.monotonic() + _LAST_LINES_SECONDS
        while self._line is not None and not self._log_read.is_set() and time.monotonic() < patience:
            self._take(_TICK)
        selector = self._job.kind.selector(self._job.name)
        for pod in self._cluster.list_all(PODS, labels=selector)["items"]:
            self._say(self._timeline.see_pod(pod, now=time.monotonic()))
        self._take(0)
        return self._timeline.outcome() or outcome

    def _take(self, seconds: float) -> None:
        """Do what the streams brought; wait so long for the first of it."""
        try:
            action = self._queue.get(timeout=seconds) if seconds else self._queue.get_nowait()
            while True:
                action()
                action = self._queue.get_nowait()
        except queue.Empty:
            pass

    def _give_up(self, deadline: float | None) -> None:
        now = time.monotonic()
        note = self._timeline.stuck(now=now, seconds=self._cluster.patience.stuck)
        if note is not None:
            raise ClusterError(f"{self._job} cannot go on: {told(self._cluster, note)}")
        if deadline is not None and now > deadline:
            waits = self._timeline.waits_for()
            why = told(self._cluster, waits) if waits else self._cluster.kubectl("get pods,events")
            raise ClusterError(f"{self._job} did not end in time: {why}")

    def _start(self, body: Callable[[], None]) -> None:
        def run() -> None:
            try:
                body()
            except Exception as error:
                # Into the main loop, which raises it where the user sees it.
                raised = error

                def fail() -> None:
                    raise raised

                self._queue.put(fail)

        threading.Thread(target=run, daemon=True).start()

    def _watch(
        self,
        resource: Resource,
        act: Callable[[str, Json], None],
        *,
        labels: str = "",
        name: str = "",
        seen: Sequence[Json] = (),
    ) -> None:
        of_cluster = changes(self._cluster, resource, labels=labels, name=name, seen=seen, stop=self._stop)
        for change in of_cluster:
            self._queue.put(lambda change=change: act(change.type, change.object))  # type: ignore[misc]

    def _watch_events(self) -> None:
        try:
            self._watch(EVENTS, self._on_event)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            self._queue.put(
                lambda: self._tell("you may not look at events: reasons that only they give stay unknown")
            )

    def _read_log(self) -> None:
        assert self._line is not None
        line = self._line
        try:
            for text in rank0_lines(self._cluster, self._job.kind, self._job.name, stop=self._job_ended):
                self._queue.put(lambda text=text: line(text))  # type: ignore[misc]
        finally:
            self._queue.put(self._log_read.set)

    def _on_job_change(self, change: str, job: Json) -> None:
        if change == "DELETED":
            self._gone = True
        else:
            self._on_job(job)

    def _on_job(self, job: Json) -> None:
        self._say(self._timeline.see_job(job))

    def _on_pod(self, change: str, pod: Json) -> None:
        self._say(self._timeline.see_pod(pod, now=time.monotonic(), deleted=change == "DELETED"))

    def _on_event(self, change: str, event: Json) -> None:
        if change != "DELETED":  # events expire; that is no news
            self._say(self._timeline.see_event(event, now=time.monotonic()))

    def _say(self, notes: list[Note]) -> None:
        for note in notes:
            self._tell(told(self._cluster, note))


def job_of(item: Json) -> JobRef:
    """The reference to a job object."""
    kind = kind_of(item)
    assert kind is not None
    return JobRef(kind=kind, name=item["metadata"]["name"])


def delete_job(cluster: Cluster, job: JobRef) -> None:
    """Delete the job; its pods go with it. Nothing happens where it is gone already."""
    cluster.delete(cluster.resource(job.kind.api_version, job.kind.kind), job.name)


def _has_kind(cluster: Cluster, kind: JobKind) -> bool:
    try:
        cluster.resource(kind.api_version, kind.kind)
    except ApiError as error:
        if error.status == NOT_FOUND:
            return False
        raise
    return True


def _exists(cluster: Cluster, kind: JobKind, name: str) -> bool:
    if not _has_kind(cluster, kind):
        return False
    return cluster.find(cluster.resource(kind.api_version, kind.kind), name) is not None


def _resource_name(kind: JobKind) -> str:
    group = kind.api_version.rpartition("/")[0]
    return f"{kind.kind.lower()}s.{group}"
