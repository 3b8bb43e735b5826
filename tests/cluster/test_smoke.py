"""The smoke job, against a stand-in for the cluster and a script in place of the operator and the trainer."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cad_mllm.cli import main
from cad_mllm.cluster.api import Cluster
from cad_mllm.cluster.smoke import (
    Console,
    SmokeReport,
    console_assertions,
    loss_trend,
    resume_assertion,
    save_steps,
    smoke,
)
from cad_mllm.errors import ConfigError, ExitCode
from tests.cluster.conftest import (
    SMOKE,
    ended_container,
    needs_kubectl,
    overlay_of,
    pod_object,
    smoke_job,
    smoke_objects,
)
from tests.cluster.standin import ApiServer, Json, Store

JOB = "cad-mllm-smoke"
MASTER, WORKER = f"{JOB}-master-0", f"{JOB}-worker-0"


class Operator:
    """What the training operator and the trainers do, step by step."""

    def __init__(self, server: ApiServer) -> None:
        self.store: Store = server.store

    def start(self) -> None:
        """Both pods run, the trainer has its ranks."""
        self.store.wait(lambda: self.store.get("PyTorchJob", JOB))
        self.store.condition("PyTorchJob", JOB, "Created")
        self._pods()
        self.store.condition("PyTorchJob", JOB, "Running")
        self.store.print(MASTER, "world size 2: gloo, 1 rank per node")

    def train(self, first: int, last: int, *, loss: Callable[[int], float]) -> None:
        self.store.print(
            MASTER,
            *(f"step {step:6d}  stage 1  loss {loss(step):7.4f}  lr 1e-4" for step in range(first, last + 1)),
        )

    def killed(self, pod: str) -> None:
        """The pod was deleted by the client: the other loses its peer, both come back and resume."""
        self.store.wait(lambda: self.store.get("Pod", pod) is None)
        self.store.condition("PyTorchJob", JOB, "Restarting", "2 replicas are restarting", Running="False")
        for name in (MASTER, WORKER):
            self.store.remove("Pod", name)
        self.store.logs.pop(MASTER)
        self._pods()
        self.store.condition("PyTorchJob", JOB, "Running", Restarting="False")
        self.store.print(MASTER, "world size 2: gloo, 1 rank per node")

    def succeed(self, steps: int) -> None:
        self.store.print(
            MASTER, f"done: {steps} steps, newest checkpoint /outputs/checkpoints/step-{steps:08d}"
        )
        for name in (MASTER, WORKER):
            self.store.set_status(
                "Pod", name, phase="Succeeded", containerStatuses=ended_container(0, "Completed")
            )
        self.store.condition("PyTorchJob", JOB, "Succeeded", Running="False")

    def _pods(self) -> None:
        self.store.put(pod_object(MASTER, job=JOB, role="master"))
        self.store.put(pod_object(WORKER, job=JOB, role="worker"))


def falling(step: int) -> float:
    return 5.0 - step / 10


@contextmanager
def acting(script: Callable[[], None]) -> Iterator[None]:
    """Run the script beside the test, and fail the test if the script fails."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            script()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    yield
    thread.join(15)
    assert not thread.is_alive()
    assert failures == []


def run_smoke(
    cluster: Cluster, *, kill_pod: bool = True, keep: bool = False
) -> tuple[SmokeReport, list[str]]:
    told: list[str] = []
    report = smoke(
        cluster,
        overlay_of(*smoke_objects()),
        kill_pod=kill_pod,
        minutes=0.5,
        keep=keep,
        tell=told.append,
        line=lambda _line: None,
    )
    return report, told


def failed(report: SmokeReport) -> list[str]:
    return [assertion.what for assertion in report.assertions if not assertion.holds]


def full_story(operator: Operator) -> Callable[[], None]:
    def story() -> None:
        operator.start()
        operator.train(1, 6, loss=falling)
        operator.killed(WORKER)
        operator.store.print(MASTER, "resumed from /outputs/checkpoints/step-00000004")
        operator.train(5, 12, loss=falling)
        operator.succeed(12)

    return story


def test_the_job_loses_a_pod_resumes_and_passes(server: ApiServer, cluster: Cluster) -> None:
    with acting(full_story(Operator(server))):
        report, told = run_smoke(cluster)
    assert failed(report) == []
    assert report.exit_code == ExitCode.DONE
    assert {a.what: a.seen for a in report.assertions} == {
        "the job succeeds": "PyTorchJob cad-mllm-smoke succeeded",
        "world size seen by the trainer": "2",
        "loss falls": "4.7500 -> 3.9500 in 12 logged steps",
        "training ends": "done: 12 steps",
        "the checkpoint loads after the kill": "step 4",
        "one pod is killed in the middle": "pod cad-mllm-smoke-worker-0, after step 5",
    }
    assert any("killed pod cad-mllm-smoke-worker-0" in line for line in told)
    assert any("PyTorchJob cad-mllm-smoke restarts: 2 replicas are restarting" in line for line in told)
    # It leaves nothing: neither the job nor its volume.
    left = {key[0] for key in server.store.objects}
    assert left == {"namespaces", "nodes"}


def test_without_a_kill_it_passes_on_the_first_life_alone(server: ApiServer, cluster: Cluster) -> None:
    operator = Operator(server)

    def story() -> None:
        operator.start()
        operator.train(1, 9, loss=falling)
        operator.succeed(9)

    with acting(story):
        report, told = run_smoke(cluster, kill_pod=False, keep=True)
    assert failed(report) == []
    assert not any("killed" in line for line in told)
    assert server.store.get("PyTorchJob", JOB) is not None, "--keep leaves the job"


def test_what_an_earlier_run_left_is_deleted_first_its_volume_too(
    server: ApiServer, cluster: Cluster
) -> None:
    for item in smoke_objects():
        server.store.put(item)
    server.store.condition("PyTorchJob", JOB, "Succeeded")
    old = server.store.get("PersistentVolumeClaim", "cad-mllm-smoke")
    assert old is not None
    operator = Operator(server)

    def story() -> None:
        server.store.wait(lambda: server.store.get("PyTorchJob", JOB) is None)
        operator.start()
        operator.train(1, 9, loss=falling)
        operator.succeed(9)

    with acting(story):
        report, _ = run_smoke(cluster, kill_pod=False, keep=True)
    assert failed(report) == []
    new = server.store.get("PersistentVolumeClaim", "cad-mllm-smoke")
    assert new is not None and new["metadata"]["uid"] != old["metadata"]["uid"]


def test_a_job_that_starts_from_nothing_after_the_kill_fails(server: ApiServer, cluster: Cluster) -> None:
    operator = Operator(server)

    def story() -> None:
        operator.start()
        operator.train(1, 6, loss=falling)
        operator.killed(WORKER)
        operator.train(1, 12, loss=falling)
        operator.succeed(12)

    with acting(story):
        report, _ = run_smoke(cluster)
    assert failed(report) == ["the checkpoint loads after the kill"]
    assert report.exit_code == ExitCode.JOB


def test_a_job_that_ends_before_the_kill_fails(server: ApiServer, cluster: Cluster) -> None:
    operator = Operator(server)

    def story() -> None:
        operator.start()
        operator.train(1, 3, loss=falling)
        operator.succeed(3)

    with acting(story):
        report, _ = run_smoke(cluster)
    assert failed(report) == ["one pod is killed in the middle", "the checkpoint loads after the kill"]


def test_a_failed_job_is_reported_with_its_reason(server: ApiServer, cluster: Cluster) -> None:
    operator = Operator(server)

    def story() -> None:
        operator.start()
        server.store.set_status("Pod", WORKER, phase="Failed", containerStatuses=ended_container(5))
        server.store.set_status("Pod", MASTER, phase="Failed", containerStatuses=ended_container(137))
        server.store.condition("PyTorchJob", JOB, "Failed", "1 replica failed")

    with acting(story):
        report, _ = run_smoke(cluster)
    assert report.exit_code == ExitCode.JOB
    assert report.assertions[0].seen == (
        "PyTorchJob cad-mllm-smoke failed: container pytorch of pod cad-mllm-smoke-worker-0 exited with "
        "5 (preflight: the pod is not what the job expects)"
    )


def test_a_job_that_cannot_start_ends_it_with_the_reason_and_code_7(
    server: ApiServer, cluster: Cluster
) -> None:
    def story() -> None:
        server.store.wait(lambda: server.store.get("PyTorchJob", JOB))
        waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
        status = [{"name": "pytorch", "image": "cad-mllm:latest", "state": {"waiting": waiting}}]
        server.store.put(pod_object(MASTER, job=JOB, phase="Pending", containerStatuses=status))

    with acting(story):
        report, _ = run_smoke(cluster)
    assert report.exit_code == ExitCode.CLUSTER
    assert "the image cad-mllm:latest cannot be pulled" in report.assertions[0].seen
    assert "make push IMAGE= TAG=" in report.assertions[0].seen
    assert server.store.get("PyTorchJob", JOB) is None


def test_an_overlay_that_is_no_smoke_overlay_is_refused_before_anything_is_deleted(
    server: ApiServer, cluster: Cluster
) -> None:
    job = smoke_job()
    job["metadata"]["labels"]["app.kubernetes.io/instance"] = "zero3"
    with pytest.raises(ConfigError, match="volumes included"):
        smoke(
            cluster,
            overlay_of(job),
            kill_pod=True,
            minutes=1,
            keep=False,
            tell=print,
            line=print,
        )
    assert server.asked("DELETE", "") == []


# --- the command -----------------------------------------------------------------------------------


@needs_kubectl
def test_the_command_prints_a_table_writes_json_and_exits_with_0(
    server: ApiServer, kubeconfig: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "report.json"
    with acting(full_story(Operator(server))), pytest.raises(SystemExit) as exit_request:
        main(["smoke", "--overlay", str(SMOKE), "--json", str(file), "--minutes", "1"])
    assert exit_request.value.code == 0
    report = json.loads(file.read_text())
    assert report["passed"] is True
    assert report["job"] == JOB and report["namespace"] == "training"
    assert len(report["assertions"]) == 6 and all(a["holds"] for a in report["assertions"])
    assert report["losses"]["12"] == 3.8
    shown = capsys.readouterr().out
    assert shown.count(" ok ") == 6
    assert "resumed from /outputs/checkpoints/step-00000004" in shown.splitlines()


# --- reading the console ---------------------------------------------------------------------------


def console_of(*lines: str) -> Console:
    console = Console()
    for line in lines:
        console.read(line)
    return console


def test_the_lines_of_the_trainer_are_read() -> None:
    console = console_of(
        "world size 4: nccl, 1 rank per node",
        "step      4  stage 1  loss  5.1234  lr 1.00e-04      1,234 tokens/s  stage ends in 0:00:10",
        "[1,0]<stdout>: step     12  stage 2  loss  4.0000  lr 1.00e-04",
        "resumed from /outputs/smoke/checkpoints/step-00000010",
        "done: 20 steps, newest checkpoint /outputs/smoke/checkpoints/step-00000020",
        "a line that says nothing: step by step, the loss falls",
    )
    assert console == Console(world_sizes=[4], losses={4: 5.1234, 12: 4.0}, resumed=[10], done=20)


def test_a_step_that_is_repeated_after_the_resume_counts_once() -> None:
    assert console_of("step 5 stage 1 loss 9.0", "step 5 stage 1 loss 4.0").losses == {5: 4.0}


@pytest.mark.parametrize(
    ("losses", "falls"),
    [
        ({1: 3.0, 2: 2.0, 3: 1.0}, True),
        ({1: 1.0, 2: 2.0, 3: 3.0}, False),
        ({1: 1.0, 2: 0.5, 3: 1.0}, False),
        ({1: 3.0, 2: 2.0}, False),
        ({1: 3.0, 2: 2.0, 3: math.nan}, False),
        ({}, False),
    ],
)
def test_the_loss_falls_if_its_last_third_is_below_its_first(losses: dict[int, float], falls: bool) -> None:
    first, last = loss_trend(losses)
    assert (last < first) is falls


def test_each_broken_console_fails_its_own_assertion() -> None:
    whole = Console(world_sizes=[2, 2], losses={1: 3.0, 2: 2.0, 3: 1.0}, resumed=[4], done=3)

    def broken(**change: object) -> list[str]:
        console = Console(**{**vars(whole), **change})  # type: ignore[arg-type]
        found = [*console_assertions(console, ranks=2), resume_assertion(console, 4)]
        return [assertion.what for assertion in found if not assertion.holds]

    assert broken() == []
    assert broken(world_sizes=[2, 1]) == ["world size seen by the trainer"]
    assert broken(world_sizes=[]) == ["world size seen by the trainer"]
    assert broken(losses={1: 1.0, 2: 2.0, 3: 3.0}) == ["loss falls"]
    assert broken(done=None) == ["training ends"]
    assert broken(resumed=[]) == ["the checkpoint loads after the kill"]
    assert broken(resumed=[2]) == ["the checkpoint loads after the kill"]


@pytest.mark.parametrize(
    "args", [["--save_steps", "7"], ["--save_steps=7"], ["--x", "1", "--save_steps", "7"]]
)
def test_the_distance_of_checkpoints_is_read_from_the_args(args: list[str]) -> None:
    assert save_steps(overlay_of(with_args(args))) == 7


@pytest.mark.parametrize("args", [[], ["--save_steps"], ["--save_steps", "many"]])
def test_without_it_nobody_knows_when_to_kill(args: list[str]) -> None:
    with pytest.raises(ConfigError, match="no container has `--save_steps N`"):
        save_steps(overlay_of(with_args(args)))


def with_args(args: list[str]) -> Json:
    job = smoke_job()
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["spec"]["containers"][0]["args"] = args
    return job
