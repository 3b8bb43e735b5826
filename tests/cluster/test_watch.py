"""A job is followed to its end: what is told, what rank 0 printed, and with which code it ends."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cad_mllm.cli import main
from cad_mllm.cluster.api import Cluster, Resource
from cad_mllm.cluster.jobs import KINDS
from cad_mllm.cluster.timeline import Outcome
from cad_mllm.cluster.watch import JobRef, find_job, follow
from cad_mllm.commands.cluster import LogsArguments, SmokeArguments, SubmitArguments, WatchArguments
from cad_mllm.errors import ClusterError
from cad_mllm.settings import flag_names
from tests.cluster.conftest import (
    SMOKE,
    ended_container,
    event_object,
    job_object,
    needs_kubectl,
    pod_object,
    smoke_objects,
)
from tests.cluster.standin import ApiServer, Store, status_error

NAME = "cad-mllm-zero3"
POD = f"{NAME}-master-0"
JOB = JobRef(kind=KINDS[0], name=NAME)


class Following:
    """`follow` in a thread of its own."""

    def __init__(self, cluster: Cluster, *, log: bool = True, deadline: float | None = None) -> None:
        self.told: list[str] = []
        self.lines: list[str] = []
        self.outcome: Outcome | None = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                line = self.lines.append if log else None
                self.outcome = follow(cluster, JOB, tell=self.told.append, line=line, deadline=deadline)
            except BaseException as error:
                self.error = error

        self.thread = threading.Thread(target=run)
        self.thread.start()

    def end(self) -> Outcome:
        self.thread.join(15)
        assert not self.thread.is_alive()
        assert self.error is None, self.error
        assert self.outcome is not None
        return self.outcome

    def fail(self) -> str:
        self.thread.join(15)
        assert not self.thread.is_alive()
        assert isinstance(self.error, ClusterError), self.error
        assert "\n" not in str(self.error)
        return str(self.error)

    def heard(self, text: str) -> Callable[[], bool]:
        return lambda: any(text in line for line in self.told)


def start(store: Store) -> None:
    store.put(job_object())
    store.condition("PyTorchJob", NAME, "Created")


def succeed(store: Store) -> None:
    store.set_status("Pod", POD, phase="Succeeded", containerStatuses=ended_container(0))
    store.condition("PyTorchJob", NAME, "Succeeded", Running="False")


def test_the_timeline_of_a_job_that_waits_runs_and_succeeds(server: ApiServer, cluster: Cluster) -> None:
    store = server.store
    start(store)
    following = Following(cluster)
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "message": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu.",
    }
    store.put(pod_object(POD, phase="Pending", conditions=[unschedulable]))
    store.wait(following.heard("no free nvidia.com/gpu"))
    store.put(pod_object(POD))
    store.condition("PyTorchJob", NAME, "Running")
    store.print(POD, "world size 1", "done: 4 steps")
    store.wait(following.heard("runs on node-a"))
    succeed(store)
    assert following.end() == Outcome(succeeded=True, exit_code=0, text=f"PyTorchJob {NAME} succeeded")
    assert following.lines == ["world size 1", "done: 4 steps"]
    assert sorted(following.told) == sorted(
        [
            f"PyTorchJob {NAME} is created",
            f"pod {POD} waits for a node: 2 of 2 nodes have no free nvidia.com/gpu (Insufficient "
            "nvidia.com/gpu) -> `kubectl -n training describe nodes`",
            f"PyTorchJob {NAME} runs",
            f"pod {POD} runs on node-a",
            f"pod {POD}, container pytorch: done",
            f"PyTorchJob {NAME} succeeded",
        ]
    )


def test_it_survives_broken_connections_and_expired_versions(server: ApiServer, cluster: Cluster) -> None:
    store = server.store
    start(store)
    store.put(pod_object(POD))
    following = Following(cluster)
    for n in range(5):
        store.print(POD, f"line {n}")
        store.wait(lambda n=n: len(following.lines) == n + 1)
        if n % 2:
            store.expire()
        server.cut()
    succeed(store)
    assert following.end().succeeded
    assert following.lines == [f"line {n}" for n in range(5)]
    assert len(following.told) == len(set(following.told)), "nothing is told twice"


def test_lines_that_rank_0_prints_last_are_read_although_the_job_has_ended(
    server: ApiServer, cluster: Cluster
) -> None:
    store = server.store
    start(store)
    store.put(pod_object(POD))
    store.print(POD, "first")
    following = Following(cluster)
    store.wait(lambda: following.lines)
    store.condition("PyTorchJob", NAME, "Succeeded")
    store.print(POD, "last")
    store.set_status("Pod", POD, phase="Succeeded", containerStatuses=ended_container(0))
    assert following.end().succeeded
    assert following.lines == ["first", "last"]


def test_a_failed_trainer_gives_its_code_even_if_the_pod_says_so_after_the_job(
    server: ApiServer, cluster: Cluster
) -> None:
    store = server.store
    start(store)
    store.put(pod_object(POD))
    following = Following(cluster)
    store.wait(following.heard("runs on node-a"))
    store.condition("PyTorchJob", NAME, "Failed", "1 Master replica(s) failed.")
    store.set_status("Pod", POD, phase="Failed", containerStatuses=ended_container(3))
    outcome = following.end()
    assert outcome.exit_code == 3
    assert outcome.text.endswith(f"container pytorch of pod {POD} exited with 3 (data)")


def test_an_image_that_cannot_be_pulled_ends_it_after_a_while(server: ApiServer, cluster: Cluster) -> None:
    start(server.store)
    waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
    status = [{"name": "pytorch", "image": "cad-mllm:latest", "state": {"waiting": waiting}}]
    server.store.put(pod_object(POD, phase="Pending", containerStatuses=status))
    message = Following(cluster).fail()
    assert message.startswith(
        f"PyTorchJob {NAME} cannot go on: pod {POD}, container pytorch: the image cad-mllm"
    )
    assert message.endswith(f"`kubectl -n training describe pod {POD}`")


def test_a_namespace_that_forbids_the_pods_ends_it_after_a_while(server: ApiServer, cluster: Cluster) -> None:
    start(server.store)
    forbidden = 'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true'
    server.store.put(event_object("FailedCreatePod", forbidden))
    message = Following(cluster).fail()
    assert 'the namespace forbids its pod, it violates PodSecurity "restricted:latest"' in message


def test_a_deadline_says_what_the_job_waited_for(server: ApiServer, cluster: Cluster) -> None:
    start(server.store)
    unschedulable = {
        "type": "PodScheduled",
        "status": "False",
        "message": "0/1 nodes: 1 Insufficient nvidia.com/gpu",
    }
    server.store.put(pod_object(POD, phase="Pending", conditions=[unschedulable]))
    message = Following(cluster, deadline=time.monotonic() + 0.6).fail()
    assert message.startswith(f"PyTorchJob {NAME} did not end in time: pod {POD} waits for a node: 1")


def test_a_job_that_is_deleted_meanwhile(server: ApiServer, cluster: Cluster) -> None:
    start(server.store)
    following = Following(cluster)
    server.store.wait(following.heard("is created"))
    server.store.remove("PyTorchJob", NAME)
    assert following.fail() == f"PyTorchJob {NAME} was deleted before it ended: submit it again"


def test_a_job_that_is_deleted_before_the_watch_begins(
    server: ApiServer, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(server.store)
    list_all = Cluster.list_all

    def too_late(self: Cluster, resource: Resource, **more: Any) -> Any:
        if resource.kind == "PyTorchJob":
            server.store.remove("PyTorchJob", NAME)
        return list_all(self, resource, **more)

    monkeypatch.setattr(Cluster, "list_all", too_late)
    assert "was deleted before it ended" in Following(cluster).fail()


def test_a_server_that_dies_meanwhile(server: ApiServer, cluster: Cluster) -> None:
    start(server.store)
    following = Following(cluster, log=False)
    server.store.wait(following.heard("is created"))
    server.override["get"] << 503 << status_error(503, "shutting down")
    server.cut()
    assert "(503): shutting down" in following.fail()


def test_events_that_may_not_be_seen_are_done_without(server: ApiServer, cluster: Cluster) -> None:
    detail = 'User "me" cannot list resource "events" in API group ""'
    server["get /api/v1/namespaces/training/events"] << 403 << status_error(403, detail)
    start(server.store)
    server.store.put(pod_object(POD))
    following = Following(cluster)
    server.store.wait(following.heard("you may not look at events"))
    succeed(server.store)
    assert following.end().succeeded


# --- which job -------------------------------------------------------------------------------------


def test_a_job_is_found_by_its_name_whatever_its_kind(server: ApiServer, cluster: Cluster) -> None:
    for kind in KINDS:
        server.store.put(job_object(kind.kind, f"my-{kind.kind.lower()}"))
        assert find_job(cluster, f"my-{kind.kind.lower()}").kind == kind


def test_two_jobs_of_one_name_need_the_kind(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(job_object("PyTorchJob"))
    server.store.put(job_object("MPIJob"))
    with pytest.raises(ClusterError, match=f"say which, pytorchjob/{NAME} or mpijob/{NAME}"):
        find_job(cluster, NAME)
    for text in (f"mpijob/{NAME}", f"MPIJob/{NAME}", f"mpijobs/{NAME}"):
        assert find_job(cluster, text).kind.kind == "MPIJob"


def test_no_such_job_names_the_command_that_lists_them(server: ApiServer, cluster: Cluster) -> None:
    del server.resources["kubeflow.org/v2beta1/mpijobs"]
    with pytest.raises(ClusterError, match="no job nothing in namespace training") as caught:
        find_job(cluster, "nothing")
    command = "`kubectl -n training get pytorchjobs.kubeflow.org,trainjobs.trainer.kubeflow.org,jobs.batch`"
    assert command in str(caught.value)


# --- the commands ----------------------------------------------------------------------------------


def run(*argv: str) -> object:
    with pytest.raises(SystemExit) as exit_request:
        main(argv)
    return exit_request.value.code


def test_the_flags_of_the_commands_are_these() -> None:
    """Removing or renaming one breaks somebody's pipeline."""
    common = ["--help", "--namespace", "--context"]
    interrupt = ["--delete_on_interrupt", "--no_delete_on_interrupt"]
    assert {
        command: sorted(flag_names(arguments))
        for command, arguments in (
            ("submit", SubmitArguments),
            ("watch", WatchArguments),
            ("logs", LogsArguments),
            ("smoke", SmokeArguments),
        )
    } == {
        "submit": sorted([*common, "--overlay", "--follow", "--no_follow", *interrupt]),
        "watch": sorted([*common, "--job", *interrupt]),
        "logs": sorted([*common, "--job"]),
        "smoke": sorted(
            [
                *common,
                "--overlay",
                "--kill_pod",
                "--no_kill_pod",
                "--minutes",
                "--keep",
                "--no_keep",
                "--json",
            ]
        ),
    }


@pytest.fixture
def ended_job(server: ApiServer, kubeconfig: Path) -> Store:
    store = server.store
    start(store)
    store.put(pod_object(POD, phase="Failed", containerStatuses=ended_container(4)))
    store.print(POD, "one", "two")
    store.condition("PyTorchJob", NAME, "Failed", "a replica failed")
    return store


def test_watch_exits_with_the_result(ended_job: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("watch", NAME) == 4
    captured = capsys.readouterr()
    assert captured.err == (
        f"error: PyTorchJob {NAME} failed: container pytorch of pod {POD} exited with 4 (checkpoint)\n"
    )
    assert f" PyTorchJob {NAME} failed: a replica failed\n" in captured.out
    assert "one" not in captured.out.split()


def test_logs_prints_lines_alone(ended_job: Store, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("logs", NAME) == 0
    assert capsys.readouterr().out == "one\ntwo\n"


def test_logs_of_a_job_whose_pods_are_gone(ended_job: Store, capsys: pytest.CaptureFixture[str]) -> None:
    ended_job.remove("Pod", POD)
    assert run("logs", NAME) == 7
    assert "its pods are cleaned up, their logs with them" in capsys.readouterr().err.splitlines()[-1]


@needs_kubectl
def test_submit_applies_and_says_how_to_follow(
    server: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("submit", str(SMOKE), "--context", "here") == 0
    assert server.store.get("PyTorchJob", "cad-mllm-smoke") is not None
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("`cad-mllm watch cad-mllm-smoke --namespace training --context here`")


@needs_kubectl
def test_submit_and_follow_shows_both_and_exits_with_the_result(
    server: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, pod = server.store, "cad-mllm-smoke-master-0"

    def operator() -> None:
        store.wait(lambda: store.get("PyTorchJob", "cad-mllm-smoke"))
        store.put(pod_object(pod, job="cad-mllm-smoke"))
        store.print(pod, "hello")
        store.set_status("Pod", pod, phase="Succeeded", containerStatuses=ended_container(0))
        store.condition("PyTorchJob", "cad-mllm-smoke", "Succeeded")

    thread = threading.Thread(target=operator)
    thread.start()
    assert run("submit", str(SMOKE), "--follow") == 0
    thread.join(10)
    out = capsys.readouterr().out.splitlines()
    assert "hello" in out
    assert out[-1].endswith("PyTorchJob cad-mllm-smoke succeeded")


@needs_kubectl
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_deletes_the_job_if_asked(
    number: signal.Signals, server: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = server.store

    def interrupt() -> None:
        store.wait(lambda: server.asked("GET", "watch=true"))
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run("submit", str(SMOKE), "--follow", "--delete_on_interrupt") == 130
    thread.join(10)
    assert store.get("PyTorchJob", "cad-mllm-smoke") is None
    assert "deleted PyTorchJob cad-mllm-smoke" in capsys.readouterr().out


def test_an_interrupt_leaves_the_job_unless_asked(server: ApiServer, kubeconfig: Path) -> None:
    start(server.store)

    def interrupt() -> None:
        server.store.wait(lambda: server.asked("GET", "watch=true"))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    assert run("watch", NAME) == 130
    thread.join(10)
    assert server.store.get("PyTorchJob", NAME) is not None


@needs_kubectl
@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["submit", "k8s/overlays/zero9"], 2, "k8s/overlays/zero9: no such folder"),
        (["submit", str(SMOKE), "--delete_on_interrupt"], 2, "--delete_on_interrupt needs --follow"),
        (["submit", str(SMOKE), "--context", "there"], 7, "--context there: the kubeconfig has here, bare"),
        (["submit", str(SMOKE), "--namespace", "nowhere"], 7, "namespace nowhere does not exist"),
        (["watch"], 2, "--help"),
        (["watch", "nothing"], 7, "no job nothing in namespace training"),
        (["logs", "nothing"], 7, "no job nothing in namespace training"),
        (["smoke", "--minutes", "0"], 2, "--minutes must be at least 0.1, got 0"),
        (["smoke", "--overlay", str(SMOKE), "--mintes", "3"], 2, "did you mean --minutes?"),
    ],
)
def test_a_mistake_is_one_line_and_its_code(
    argv: list[str], code: int, words: str, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*argv) == code
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and words in last


@needs_kubectl
def test_a_cluster_without_the_crd_ends_submit_in_one_line(
    server: ApiServer, kubeconfig: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    del server.resources["kubeflow.org/v1/pytorchjobs"]
    assert run("submit", str(SMOKE)) == 7
    assert capsys.readouterr().err == (
        "error: the cluster has no PyTorchJob (kubeflow.org/v1), its CRD is missing: install its operator "
        "with `kubectl apply --server-side -k k8s/operators/training-operator`\n"
    )
    assert len(smoke_objects()) == 3 and server.asked("PATCH", "") == []
