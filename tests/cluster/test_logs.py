"""Rank 0's lines: each once, in order, whatever happens to the stream and to the pod."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cad_mllm.cluster.api import Cluster
from cad_mllm.cluster.jobs import KINDS
from cad_mllm.cluster.logs import LogPosition, rank0_lines, rank0_pod
from tests.cluster.conftest import QUICK, ended_container, pod_object
from tests.cluster.standin import ApiServer, Json, status_error

PYTORCH, MPI, TRAIN, BATCH = KINDS
POD = "cad-mllm-zero3-master-0"


class Reader:
    def __init__(self, cluster: Cluster) -> None:
        self.lines: list[str] = []
        self.error: BaseException | None = None
        self.ended = threading.Event()

        def run() -> None:
            try:
                for line in rank0_lines(cluster, PYTORCH, "cad-mllm-zero3", stop=self.ended):
                    self.lines.append(line)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()


@contextmanager
def reading(cluster: Cluster) -> Iterator[Reader]:
    reader = Reader(cluster)
    yield reader
    reader.ended.set()


def finish(server: ApiServer, reader: Reader) -> None:
    """The pod and its job end; what was printed until then is read."""
    server.store.set_status("Pod", POD, phase="Succeeded", containerStatuses=ended_container(0))
    reader.ended.set()
    reader.thread.join(10)
    assert not reader.thread.is_alive() and reader.error is None


def test_lines_come_while_they_are_printed(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(pod_object(POD))
    server.store.print(POD, "one", "two")
    with reading(cluster) as reader:
        server.store.wait(lambda: reader.lines == ["one", "two"])
        server.store.print(POD, "three")
        server.store.wait(lambda: reader.lines == ["one", "two", "three"])
        finish(server, reader)
    assert reader.lines == ["one", "two", "three"]


def test_it_waits_for_the_pod_and_for_its_container(server: ApiServer, cluster: Cluster) -> None:
    with reading(cluster) as reader:
        server.store.put(pod_object(POD, phase="Pending"))
        server.store.put(pod_object("cad-mllm-zero3-worker-0", role="worker"))
        server.store.print("cad-mllm-zero3-worker-0", "of no interest")
        server.store.wait(lambda: len(server.asked("GET", "/pods?")) > 2)
        assert server.asked("GET", "/log") == []
        server.store.put(pod_object(POD))
        server.store.print(POD, "hello")
        server.store.wait(lambda: reader.lines)
        finish(server, reader)
    assert reader.lines == ["hello"]


def test_a_broken_stream_repeats_nothing_and_misses_nothing(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(pod_object(POD))
    with reading(cluster) as reader:
        for n in range(4):
            # Two lines of one stamp, of which the text alone tells no difference to the next round.
            stamp = f"2026-01-01T00:00:00.{n}Z"
            server.store.print(POD, "same", "same", f"step {n}", stamp=stamp)
            server.store.wait(lambda n=n: len(reader.lines) == 3 * (n + 1))
            server.cut()
        finish(server, reader)
    assert reader.lines == [line for n in range(4) for line in ("same", "same", f"step {n}")]
    assert "sinceTime" in server.asked("GET", "/log")[-1].params


def test_a_replaced_pod_is_followed_on_from_its_first_line(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(pod_object(POD))
    server.store.print(POD, "world size 2", stamp="2026-01-01T00:00:01Z")
    with reading(cluster) as reader:
        server.store.wait(lambda: reader.lines)
        server.store.remove("Pod", POD)
        server.store.logs.clear()
        server.store.put(pod_object(POD))
        # The node of the new pod may have a clock that is behind.
        server.store.print(POD, "world size 2", "resumed", stamp="2026-01-01T00:00:00Z")
        server.store.wait(lambda: len(reader.lines) == 3)
        finish(server, reader)
    assert reader.lines == ["world size 2", "world size 2", "resumed"]


@pytest.mark.parametrize(("status", "times"), [(400, 1), (404, 1), (502, QUICK.attempts)])
def test_a_pod_or_a_node_that_goes_between_the_look_and_the_request(
    status: int, times: int, server: ApiServer, cluster: Cluster
) -> None:
    (
        server[f"get /api/v1/namespaces/training/pods/{POD}/log"][:times]
        << status
        << status_error(status, "not now")
    )
    server.store.put(pod_object(POD))
    server.store.print(POD, "hello")
    with reading(cluster) as reader:
        server.store.wait(lambda: reader.lines)
        finish(server, reader)
    assert reader.lines == ["hello"]


def test_a_refusal_is_raised(server: ApiServer, cluster: Cluster) -> None:
    detail = 'pods is forbidden: User "me" cannot get resource "pods/log" in API group ""'
    server[f"get /api/v1/namespaces/training/pods/{POD}/log"] << 403 << status_error(403, detail)
    server.store.put(pod_object(POD))
    with reading(cluster) as reader:
        server.store.wait(lambda: reader.error)
    assert "not allowed" in str(reader.error)


def test_the_kubelets_own_words_pass() -> None:
    position = LogPosition()
    assert position.new("unable to retrieve container logs for containerd://1") is not None


def test_stripped_zeros_do_not_disturb_the_order() -> None:
    position = LogPosition()
    assert position.new("2026-01-01T00:00:00.1Z a") == "a"
    assert position.new("2026-01-01T00:00:00.12Z b") == "b"
    position.reconnect()
    assert position.new("2026-01-01T00:00:00.1Z a") is None
    assert position.new("2026-01-01T00:00:00.120000000Z b") is None
    assert position.new("2026-01-01T00:00:00.120000000Z b") == "b"
    assert position.new("2026-01-01T00:00:00.13Z c") == "c"


def test_lines_out_of_order_are_not_lost() -> None:
    """stdout and stderr are stamped by two hands."""
    position = LogPosition()
    assert position.new("2026-01-01T00:00:00.2Z out") == "out"
    assert position.new("2026-01-01T00:00:00.1Z err") == "err"
    position.reconnect()
    assert position.new("2026-01-01T00:00:00.2Z out") is None
    assert position.new("2026-01-01T00:00:00.1Z err") is None
    assert position.new("2026-01-01T00:00:00.3Z more") == "more"
    assert position.new("2026-01-01T00:00:00.1Z late") == "late"


# --- who is rank 0 ---------------------------------------------------------------------------------


def bare_pod(name: str, created: str, labels: Json) -> Json:
    return {"metadata": {"name": name, "labels": labels, "creationTimestamp": created}}


def test_rank_0_of_each_kind() -> None:
    role, replica = "training.kubeflow.org/job-role", "training.kubeflow.org/replica-type"
    index, part = "batch.kubernetes.io/job-completion-index", "jobset.sigs.k8s.io/replicatedjob-name"

    def first(kind: int, *labels: dict[str, str]) -> str:
        pods = [bare_pod(f"p{n}", "2026-01-01T00:00:00Z", carried) for n, carried in enumerate(labels)]
        pod = rank0_pod(KINDS[kind], pods)
        assert pod is not None
        name: str = pod["metadata"]["name"]
        return name

    assert first(0, {replica: "worker"}, {replica: "master"}) == "p1"
    assert first(1, {role: "worker"}, {role: "launcher"}) == "p1"
    assert first(2, {part: "node", index: "1"}, {part: "node", index: "0"}) == "p1"
    assert first(2, {part: "node", index: "0"}, {part: "prepare", index: "0"}) == "p0"
    assert first(3, {index: "1"}, {index: "0"}) == "p1"
    assert first(3, {}) == "p0"


def test_of_two_lives_the_newer_one_that_is_not_on_its_way_out() -> None:
    old, new = bare_pod("old", "2026-01-01T00:00:00Z", {}), bare_pod("new", "2026-01-02T00:00:00Z", {})
    assert rank0_pod(BATCH, [new, old]) == new
    new["metadata"]["deletionTimestamp"] = "2026-01-03T00:00:00Z"
    assert rank0_pod(BATCH, [old, new]) == old
    assert rank0_pod(BATCH, []) is None


def test_the_trainers_container_by_name_else_the_first() -> None:
    pod = {"spec": {"containers": [{"name": "sidecar"}, {"name": "pytorch"}]}}
    assert PYTORCH.trainer_container(pod) == "pytorch"
    assert MPI.trainer_container(pod) == "sidecar"
    assert TRAIN.trainer_container(pod) == "sidecar"
