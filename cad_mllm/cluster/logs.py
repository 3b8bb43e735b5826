"""What rank 0 prints, line after line: across broken streams, restarted containers and replaced pods."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from cad_mllm.cluster.api import NOT_FOUND, PODS, ApiError, Cluster
from cad_mllm.cluster.jobs import JobKind, Json

_BAD_REQUEST = 400
_SERVER_ERRORS = 500


@dataclass(kw_only=True)
class LogPosition:
    """How far the log of one pod has been read: nothing is told twice after a reconnect."""

    last: str | None = None
    """The latest time stamp told, as the server wrote it."""
    _at_last: list[str] = field(default_factory=list)
    """The lines told that carry this very stamp."""
    _repeats: list[str] | None = None
    """While the server repeats what was told: those of `_at_last` that are still to come."""

    def reconnect(self) -> None:
        """The server is about to repeat everything since the second of `last`."""
        self._repeats = list(self._at_last) if self.last is not None else None

    def new(self, stamped: str) -> str | None:
        """The text of a stamped line, or None where it was told before."""
        stamp, _, text = stamped.partition(" ")
        if not _is_stamp(stamp):
            return stamped  # the kubelet's own words ("unable to retrieve container logs ...")
        order, last = _order(stamp), _order(self.last or "")
        if self._repeats is not None:
            if order < last:
                return None
            if order == last and text in self._repeats:
                self._repeats.remove(text)
                return None
            self._repeats = None
        if order > last:
            self.last, self._at_last = stamp, []
        if order >= last:
            self._at_last.append(text)
        return text


def rank0_pod(kind: JobKind, pods: list[Json]) -> Json | None:
    """The newest pod of rank 0 that is not on its way out, else the newest at all."""
    candidates = [pod for pod in pods if kind.is_rank0(pod)]
    candidates.sort(
        key=lambda pod: ("deletionTimestamp" not in pod["metadata"], pod["metadata"]["creationTimestamp"])
    )
    return candidates[-1] if candidates else None


def rank0_lines(cluster: Cluster, kind: JobKind, name: str, *, stop: threading.Event) -> Iterator[str]:
    """Every line that rank 0 prints, until its job has no more: `stop` is set, and the log is at its end.

    A pod that is replaced under the same or another name is followed on. Raises ClusterError when the
    server refuses.
    """
    uid = None
    position = LogPosition()
    while True:
        stopping = stop.is_set()
        pod = rank0_pod(kind, cluster.list_all(PODS, labels=kind.selector(name))["items"])
        if pod is not None:
            if pod["metadata"]["uid"] != uid:
                uid = pod["metadata"]["uid"]
                position = LogPosition()
            if _has_log(pod, kind):
                yield from _read(cluster, pod, kind, position)
        # `stop` means that the job has ended: what was printed before has been read by now.
        if stopping:
            return
        stop.wait(cluster.patience.poll)


def _read(cluster: Cluster, pod: Json, kind: JobKind, position: LogPosition) -> Iterator[str]:
    position.reconnect()
    try:
        stream = cluster.log(pod["metadata"]["name"], kind.trainer_container(pod), since=position.last)
        for line in stream.lines():
            text = position.new(line)
            if text is not None:
                yield text
    except ConnectionError:
        return  # broken or quiet: the caller opens it anew
    except ApiError as error:
        # The pod went, or its container is being started, between the look and the request; or its node
        # does not answer the API server. The caller looks again.
        if error.status not in (NOT_FOUND, _BAD_REQUEST) and error.status < _SERVER_ERRORS:
            raise


def _has_log(pod: Json, kind: JobKind) -> bool:
    container = kind.trainer_container(pod)
    for status in pod.get("status", {}).get("containerStatuses") or []:
        if status["name"] == container:
            state = status.get("state") or {}
            return "running" in state or "terminated" in state
    return False


def _is_stamp(text: str) -> bool:
    return len(text) >= 20 and text[4] == text[7] == "-" and text[10] == "T"


def _order(stamp: str) -> tuple[str, str]:
    """Sorts stamps of one log: the seconds, then the fraction with its stripped zeros put back."""
    whole, _, rest = stamp.partition(".")
    fraction = ""
    for character in rest:
        if not character.isdigit():
            break
        fraction += character
    return whole[:19], fraction.ljust(9, "0")
