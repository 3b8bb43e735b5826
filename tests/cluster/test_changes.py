"""List, then watch: nothing is missed and nothing told twice, whatever the connection does."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import kmock
import pytest

from cad_mllm.cluster.api import PODS, ApiError, Cluster
from cad_mllm.cluster.changes import changes
from cad_mllm.errors import ClusterError
from tests.cluster.conftest import pod_object
from tests.cluster.standin import ApiServer, status_error

JOB = "training.kubeflow.org/job-name=cad-mllm-zero3"


class Listener:
    """Takes the changes in a thread of its own."""

    def __init__(self, cluster: Cluster, labels: str = JOB) -> None:
        self.heard: list[tuple[str, str]] = []
        self.error: BaseException | None = None
        self.stop = threading.Event()

        def run() -> None:
            try:
                for change in changes(cluster, PODS, labels=labels, stop=self.stop):
                    self.heard.append((change.type, change.object["metadata"]["name"]))
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


@contextmanager
def listening(cluster: Cluster) -> Iterator[Listener]:
    listener = Listener(cluster)
    yield listener
    listener.stop.set()


def watches(server: ApiServer) -> int:
    return len(server.asked("GET", "watch=true"))


def test_what_is_there_comes_first_then_what_changes(server: ApiServer, cluster: Cluster) -> None:
    store = server.store
    store.put(pod_object("p0"))
    with listening(cluster) as listener:
        store.wait(lambda: watches(server))
        store.put(pod_object("p1"))
        store.set_status("Pod", "p0", phase="Succeeded")
        store.remove("Pod", "p1")
        store.wait(lambda: len(listener.heard) == 4)
    assert listener.heard == [("ADDED", "p0"), ("ADDED", "p1"), ("MODIFIED", "p0"), ("DELETED", "p1")]
    query = server.asked("GET", "watch=true")[0].params
    assert query["resourceVersion"].isdigit()
    assert query["allowWatchBookmarks"] == "true" and query["timeoutSeconds"] == "3"


def test_only_what_the_selector_selects(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(pod_object("other", job="cad-mllm-zero2"))
    with listening(cluster) as listener:
        server.store.wait(lambda: watches(server))
        server.store.put(pod_object("another", job="cad-mllm-zero2"))
        server.store.put(pod_object("ours"))
        server.store.wait(lambda: listener.heard)
    assert listener.heard == [("ADDED", "ours")]


def test_a_broken_connection_goes_on_where_it_was(server: ApiServer, cluster: Cluster) -> None:
    store = server.store
    store.put(pod_object("p0"))
    with listening(cluster) as listener:
        for n in range(1, 4):
            store.wait(lambda n=n: watches(server) >= n)
            store.put(pod_object(f"p{n}"))
            store.wait(lambda n=n: len(listener.heard) == n + 1)
            server.cut()
    assert listener.heard == [("ADDED", f"p{n}") for n in range(4)]
    assert len(server.asked("GET", f"pods?labelSelector={JOB.replace('/', '%2F').replace('=', '%3D')}")) <= 5
    lists = [r for r in server.asked("GET", "/pods") if "watch" not in r.params]
    assert len(lists) == 1, "a broken connection is no reason to list again"


def test_what_happens_while_the_connection_is_down_is_not_missed(server: ApiServer, cluster: Cluster) -> None:
    store = server.store
    with listening(cluster) as listener:
        store.wait(lambda: watches(server))
        server.cut()
        store.put(pod_object("p0"))
        store.remove("Pod", "p0")
        store.wait(lambda: len(listener.heard) == 2)
    assert listener.heard == [("ADDED", "p0"), ("DELETED", "p0")]


def test_an_expired_version_lists_again_and_tells_the_differences(
    server: ApiServer, cluster: Cluster
) -> None:
    store = server.store
    for name in ("stays", "changes", "goes"):
        store.put(pod_object(name))
    with listening(cluster) as listener:
        store.wait(lambda: watches(server))
        # Compacted away before the client can hear of it: only a new list tells.
        store.set_status("Pod", "changes", phase="Failed")
        store.remove("Pod", "goes")
        store.put(pod_object("comes"))
        store.expire()
        server.cut()
        store.wait(lambda: ("ADDED", "comes") in listener.heard)
        store.wait(lambda: ("DELETED", "goes") in listener.heard)
        time.sleep(0.1)
    assert sorted(listener.heard[:3]) == [("ADDED", "changes"), ("ADDED", "goes"), ("ADDED", "stays")]
    assert sorted(listener.heard[3:]) == [("ADDED", "comes"), ("DELETED", "goes"), ("MODIFIED", "changes")]


def test_gone_as_an_http_status_lists_again_too(server: ApiServer, cluster: Cluster) -> None:
    server["get", "?watch=true"][:1] << 410 << status_error(410, "too old resource version")
    with listening(cluster) as listener:
        server.store.wait(lambda: watches(server) == 2)
        server.store.put(pod_object("p0"))
        server.store.wait(lambda: listener.heard)
    assert listener.heard == [("ADDED", "p0")]


def test_a_bookmark_moves_the_version_and_is_no_change(server: ApiServer, cluster: Cluster) -> None:
    bookmark = {"type": "BOOKMARK", "object": {"kind": "Pod", "metadata": {"resourceVersion": "150"}}}
    server["get", "?watch=true"][:1] << (bookmark,)
    with listening(cluster) as listener:
        server.store.wait(lambda: watches(server) == 2)
    assert listener.heard == []
    assert server.asked("GET", "watch=true")[1].params["resourceVersion"] == "150"


def test_a_line_that_is_cut_in_the_middle_is_asked_for_again(server: ApiServer, cluster: Cluster) -> None:
    server["get", "?watch=true"][:1] << (b'{"type": "ADDED", "obj',)
    with listening(cluster) as listener:
        server.store.wait(lambda: watches(server) == 2)
        server.store.put(pod_object("p0"))
        server.store.wait(lambda: listener.heard)
    assert listener.heard == [("ADDED", "p0")]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_moment_of_the_server_is_waited_out(status: int, server: ApiServer, cluster: Cluster) -> None:
    server["get", "?watch=true"][:2] << status << status_error(status, "not now")
    with listening(cluster) as listener:
        server.store.wait(lambda: watches(server) == 3)
        server.store.put(pod_object("p0"))
        server.store.wait(lambda: listener.heard)
    assert listener.error is None


def test_a_refusal_is_raised(server: ApiServer, cluster: Cluster) -> None:
    detail = 'pods is forbidden: User "me" cannot watch resource "pods" in API group ""'
    server["get", "?watch=true"] << 403 << status_error(403, detail)
    with listening(cluster) as listener:
        server.store.wait(lambda: listener.error)
    assert isinstance(listener.error, ApiError)
    assert "not allowed" in str(listener.error)


def test_watches_that_end_at_once_are_given_up(server: ApiServer, cluster: Cluster) -> None:
    server.watches_end_at_once = True
    with listening(cluster) as listener:
        server.store.wait(lambda: listener.error)
    assert isinstance(listener.error, ClusterError)
    assert "cut off at once" in str(listener.error)
    assert 15 < watches(server) < 30


def test_kmock_parses_what_the_client_sends(server: ApiServer, cluster: Cluster) -> None:
    """The stand-in answers by action: a watch must be one for it."""
    with listening(cluster):
        server.store.wait(lambda: watches(server))
    assert server.asked("GET", "watch=true")[0].action == kmock.action.WATCH


def test_of_what_was_seen_before_only_what_has_changed_is_told(server: ApiServer, cluster: Cluster) -> None:
    store, stop = server.store, threading.Event()
    for name in ("same", "changed", "gone"):
        store.put(pod_object(name))
    seen = cluster.list_all(PODS)["items"]
    store.set_status("Pod", "changed", phase="Succeeded")
    store.remove("Pod", "gone")
    store.put(pod_object("new"))
    told = changes(cluster, PODS, labels=JOB, seen=seen, stop=stop)
    heard = sorted((change.type, change.object["metadata"]["name"]) for change in islice(told, 3))
    assert heard == [("ADDED", "new"), ("DELETED", "gone"), ("MODIFIED", "changed")]
