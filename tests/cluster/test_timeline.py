"""Object states and events in words: each mistake of issue and cluster, as a dict, becomes its sentence."""

from typing import Any

import pytest

from cad_mllm.cluster.jobs import KINDS, kind_of
from cad_mllm.cluster.timeline import Note, Timeline, ended, event_note, job_notes, pod_notes, unschedulable
from cad_mllm.errors import ExitCode
from tests.cluster.conftest import ended_container, event_object, job_object, pod_object

JOB = "cad-mllm-zero3"
PYTORCH = KINDS[0]


def with_conditions(*conditions: tuple[str, str, str], kind: str = "PyTorchJob") -> dict[str, Any]:
    job = job_object(kind)
    job["metadata"] |= {"uid": "job-uid", "creationTimestamp": "2026-01-01T00:00:00Z"}
    job["status"] = {
        "conditions": [
            {
                "type": type_,
                "status": status,
                "message": message,
                "lastTransitionTime": f"2026-01-01T00:00:0{n}Z",
            }
            for n, (type_, status, message) in enumerate(conditions)
        ]
    }
    return job


def with_uid(item: dict[str, Any], uid: str = "pod-uid") -> dict[str, Any]:
    item["metadata"] |= {"uid": uid, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return item


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    state = {"waiting": {"reason": reason, "message": message}}
    status = [{"name": "pytorch", "image": "registry/cad-mllm:1", "state": state}]
    return pod_object("p", phase="Pending", containerStatuses=status)


def pending(message: str) -> dict[str, Any]:
    condition = {
        "type": "PodScheduled",
        "status": "False",
        "reason": "Unschedulable",
        "message": message,
    }
    return pod_object("p", phase="Pending", conditions=[condition])


# --- jobs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "conditions", "sentences", "how"),
    [
        (
            "PyTorchJob",
            [("Created", "True", ""), ("Running", "True", "")],
            ["PyTorchJob cad-mllm-zero3 is created", "PyTorchJob cad-mllm-zero3 runs"],
            None,
        ),
        (
            "PyTorchJob",
            [("Running", "False", ""), ("Failed", "True", "1 Worker replica(s) failed.")],
            ["PyTorchJob cad-mllm-zero3 failed: 1 Worker replica(s) failed."],
            "failed",
        ),
        (
            "MPIJob",
            [("Created", "True", ""), ("Succeeded", "True", "")],
            ["MPIJob cad-mllm-zero3 is created", "MPIJob cad-mllm-zero3 succeeded"],
            "succeeded",
        ),
        ("TrainJob", [("Complete", "True", "")], ["TrainJob cad-mllm-zero3 succeeded"], "succeeded"),
        (
            "Job",
            [("SuccessCriteriaMet", "True", ""), ("Complete", "True", "")],
            ["Job cad-mllm-zero3 succeeded"],
            "succeeded",
        ),
        (
            "Job",
            [("FailureTarget", "True", ""), ("Failed", "True", "BackoffLimitExceeded")],
            ["Job cad-mllm-zero3 failed: BackoffLimitExceeded"],
            "failed",
        ),
        ("PyTorchJob", [], [], None),
    ],
)
def test_conditions_of_every_kind_of_job(
    kind: str, conditions: list[tuple[str, str, str]], sentences: list[str], how: str | None
) -> None:
    job = with_conditions(*conditions, kind=kind)
    found = kind_of(job)
    assert found is not None
    assert [note.text for note in job_notes(found, job)] == sentences
    assert ended(job) == how


def test_a_suspended_job_names_its_queue() -> None:
    (note,) = job_notes(PYTORCH, with_conditions(("Suspended", "True", "")))
    assert "waits to be admitted by its queue" in note.text
    assert note.mend == "get workloads.kueue.x-k8s.io"


# --- pods that wait for a node ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "words", "mend"),
    [
        (
            "0/5 nodes are available: 5 Insufficient nvidia.com/gpu. preemption: 0/5 nodes are available: "
            "5 No preemption victims found for incoming pod.",
            "5 of 5 nodes have no free nvidia.com/gpu (Insufficient nvidia.com/gpu)",
            "describe nodes",
        ),
        (
            "0/3 nodes are available: 1 node(s) had untolerated taint "
            "{node-role.kubernetes.io/control-plane: }, 2 Insufficient memory.",
            "2 of 3 nodes have too little memory (Insufficient memory); "
            "1 of 3 nodes have the taint node-role.kubernetes.io/control-plane",
            "describe nodes",
        ),
        (
            "0/4 nodes are available: 4 node(s) didn't match Pod's node affinity/selector.",
            "4 of 4 nodes are of another GPU model or lack its labels",
            "get nodes -L nvidia.com/gpu.product",
        ),
        (
            "0/4 nodes are available: pod has unbound immediate PersistentVolumeClaims.",
            "its PersistentVolumeClaim is not bound",
            "get pvc,storageclass",
        ),
        ("something new", "waits for a node: something new", "describe pod p"),
    ],
)
def test_pending_is_said_in_words(message: str, words: str, mend: str) -> None:
    note = unschedulable("p", message)
    assert words in note.text
    assert note.mend == mend
    assert not note.stuck, "a node or a volume may come"
    assert pod_notes(pending(message)) == [note]


def test_a_claim_that_does_not_exist_is_stuck() -> None:
    note = unschedulable("p", '0/4 nodes are available: persistentvolumeclaim "cad-mllm-data" not found.')
    assert note.stuck
    assert "waits for the volume claim cad-mllm-data, which does not exist" in note.text


# --- pods whose containers cannot start, or ended --------------------------------------------------


@pytest.mark.parametrize(
    ("pod", "words", "stuck"),
    [
        (
            waiting("ErrImagePull", "manifest unknown"),
            "image registry/cad-mllm:1 cannot be pulled (manifest unknown)",
            True,
        ),
        (waiting("ImagePullBackOff"), "image registry/cad-mllm:1 cannot be pulled: push it with", True),
        (waiting("InvalidImageName"), "cannot be pulled", True),
        (
            waiting("CreateContainerConfigError", 'secret "wandb" not found'),
            'cannot be created: secret "wandb" not found',
            True,
        ),
        (waiting("CrashLoopBackOff"), "keeps failing", False),
    ],
)
def test_a_container_that_cannot_start(pod: dict[str, Any], words: str, stuck: bool) -> None:
    (note,) = pod_notes(pod)
    assert words in note.text
    assert note.stuck is stuck
    assert note.mend


def test_a_container_that_is_being_created_is_no_news() -> None:
    assert pod_notes(waiting("ContainerCreating")) == []


@pytest.mark.parametrize(
    ("code", "reason", "words"),
    [
        (0, "Completed", "container pytorch: done"),
        (2, "Error", "exited with 2 (configuration)"),
        (5, "Error", "exited with 5 (preflight: the pod is not what the job expects)"),
        (137, "OOMKilled", "needed more host memory than its limit (OOMKilled)"),
        (137, "Error", "exited with 137 (killed)"),
        (143, "Error", "exited with 143 (stopped by SIGTERM after a checkpoint)"),
        (77, "Error", "exited with 77"),
    ],
)
def test_how_a_container_ended(code: int, reason: str, words: str) -> None:
    pod = pod_object("p", phase="Failed", containerStatuses=ended_container(code, reason))
    (note,) = pod_notes(pod)
    assert words in note.text


def test_a_restart_in_place_tells_the_code_before() -> None:
    status = {
        "name": "pytorch",
        "restartCount": 2,
        "state": {"running": {}},
        "lastState": {"terminated": {"exitCode": 137}},
    }
    texts = [note.text for note in pod_notes(pod_object("p", containerStatuses=[status]))]
    assert texts == [
        "pod p, container pytorch: restarted (2x), it had exited with 137 (killed)",
        "pod p runs on node-a",
    ]


def test_an_evicted_pod_tells_why() -> None:
    pod = pod_object("p", phase="Failed", reason="Evicted", message="The node was low on ephemeral-storage.")
    assert pod_notes(pod) == [
        Note(
            text="pod p was evicted: The node was low on ephemeral-storage.",
            mend="describe nodes",
        )
    ]


def test_a_drained_pod_tells_why() -> None:
    condition = {"type": "DisruptionTarget", "status": "True", "message": "preempted by pod x"}
    notes = pod_notes(pod_object("p", phase="Failed", conditions=[condition]))
    assert notes[0].text == "pod p is taken down by the cluster: preempted by pod x"


def test_an_init_container_is_looked_at_as_well() -> None:
    state = {"waiting": {"reason": "ImagePullBackOff"}}
    init = [{"name": "init-pytorch", "image": "alpine:3.10", "state": state}]
    (note,) = pod_notes(pod_object("p", phase="Pending", initContainerStatuses=init))
    assert "container init-pytorch: the image alpine:3.10 cannot be pulled" in note.text


# --- events ----------------------------------------------------------------------------------------

FORBIDDEN = (
    'Error creating: pods "cad-mllm-zero3-worker-0" is forbidden: violates PodSecurity "restricted:latest": '
    'allowPrivilegeEscalation != false (container "{}" must set ...)'
)


def note_of(reason: str, message: str) -> Note:
    note = event_note(event_object(reason, message))
    assert note is not None
    return note


def test_a_namespace_that_forbids_the_pod() -> None:
    note = note_of("FailedCreatePod", FORBIDDEN.format("pytorch"))
    assert note.stuck
    assert 'the namespace forbids its pod, it violates PodSecurity "restricted:latest"' in note.text
    assert "remove that from your patches" in note.text


def test_the_operators_own_init_container_is_another_remedy() -> None:
    note = note_of("FailedCreatePod", FORBIDDEN.format("init-pytorch"))
    assert "`kubectl apply --server-side -k k8s/operators/training-operator`" in note.text


def test_a_quota_that_is_used_up_may_pass() -> None:
    note = note_of("FailedCreate", 'pods "x" is forbidden: exceeded quota: gpus, requested: 4, used: 8')
    assert not note.stuck
    assert "the namespace's quota is used up (exceeded quota: gpus, requested: 4, used: 8)" in note.text


def test_a_service_account_that_does_not_exist() -> None:
    note = note_of(
        "FailedCreate", 'error looking up service account t/trainer: serviceaccount "trainer" not found'
    )
    assert note.stuck and note.mend == "create serviceaccount trainer"


def test_another_failure_to_create_a_pod_is_told_as_it_is() -> None:
    note = note_of("FailedCreate", "the webhook says no")
    assert not note.stuck and "a pod cannot be created: the webhook says no" in note.text


def test_a_secret_that_a_volume_needs() -> None:
    note = note_of("FailedMount", 'MountVolume.SetUp failed for volume "s" : secret "tls" not found')
    assert note.stuck and "waits for secret tls, which does not exist" in note.text
    assert not note_of("FailedMount", "timed out waiting for the condition").stuck


def test_a_job_that_its_operator_finds_invalid() -> None:
    assert note_of("ValidationError", "spec.slotsPerWorker: must be positive").stuck


def test_why_an_image_cannot_be_pulled_is_told() -> None:
    note = note_of("Failed", 'Failed to pull image "x": unauthorized')
    assert "unauthorized" in note.text


@pytest.mark.parametrize(
    ("reason", "message"),
    [("BackOff", "back-off"), ("FailedScheduling", "0/1"), ("Failed", "Error: ImagePullBackOff")],
)
def test_what_the_pods_say_better_is_left_out(reason: str, message: str) -> None:
    assert event_note(event_object(reason, message)) is None


def test_a_normal_event_needs_no_line() -> None:
    assert event_note({**event_object("Pulled", "done"), "type": "Normal"}) is None


# --- over time -------------------------------------------------------------------------------------


def timeline() -> Timeline:
    return Timeline(kind=PYTORCH, name=JOB)


def test_each_thing_is_said_once_and_again_when_it_happens_again() -> None:
    line = timeline()
    running = with_conditions(("Created", "True", ""), ("Running", "True", ""))
    assert [note.text for note in line.see_job(running)] == [
        f"PyTorchJob {JOB} is created",
        f"PyTorchJob {JOB} runs",
    ]
    assert line.see_job(running) == []
    restarted = with_conditions(("Created", "True", ""), ("Restarting", "False", ""), ("Running", "True", ""))
    assert [note.text for note in line.see_job(restarted)] == [f"PyTorchJob {JOB} runs"]


def test_a_pod_that_goes_is_told_once() -> None:
    line = timeline()
    pod = with_uid(pod_object("p"))
    assert [note.text for note in line.see_pod(pod, now=0)] == ["pod p runs on node-a"]
    assert [note.text for note in line.see_pod(pod, now=0, deleted=True)] == ["pod p is gone"]
    assert line.see_pod(pod, now=0, deleted=True) == []


def test_a_problem_is_stuck_once_it_lasts_and_no_longer_once_it_is_mended() -> None:
    line = timeline()
    line.see_pod(with_uid(waiting("ImagePullBackOff")), now=0)
    assert line.stuck(now=59, seconds=60) is None
    line.see_pod(with_uid(waiting("ImagePullBackOff")), now=30)
    stuck = line.stuck(now=60, seconds=60)
    assert stuck is not None and "cannot be pulled" in stuck.text
    line.see_pod(with_uid(pod_object("p")), now=61)
    assert line.stuck(now=1000, seconds=60) is None


def test_a_pod_that_is_created_after_all_ends_the_problem_of_its_creation() -> None:
    line = timeline()
    line.see_job(with_conditions(("Created", "True", "")))
    line.see_event(event_object("FailedCreatePod", FORBIDDEN.format("pytorch")), now=0)
    assert line.stuck(now=60, seconds=60) is not None
    line.see_pod(with_uid(pod_object("p")), now=61)
    assert line.stuck(now=1000, seconds=60) is None


def test_a_mount_that_waits_for_a_secret_is_stuck_until_the_pod_starts() -> None:
    line = timeline()
    line.see_job(with_conditions(("Created", "True", "")))
    creating = with_uid(waiting("ContainerCreating"))
    line.see_pod(creating, now=0)
    event = event_object("FailedMount", 'secret "tls" not found', kind="Pod", name=f"{JOB}-master-0")
    event["involvedObject"]["uid"] = "pod-uid"
    line.see_event(event, now=1)
    line.see_pod(creating, now=2)
    assert line.stuck(now=61, seconds=60) is not None
    line.see_pod(with_uid(pod_object("p")), now=62)
    assert line.stuck(now=1000, seconds=60) is None


def test_events_of_other_jobs_and_of_an_older_job_of_the_name_are_none_of_ours() -> None:
    line = timeline()
    line.see_job(with_conditions(("Created", "True", "")))
    other = event_object("FailedCreatePod", FORBIDDEN.format("pytorch"), name="cad-mllm-zero3x")
    assert line.see_event(other, now=0) == []
    old = event_object("FailedCreatePod", FORBIDDEN.format("pytorch"))
    old["lastTimestamp"] = "2025-12-31T23:59:59Z"
    assert line.see_event(old, now=0) == []
    assert len(line.see_event(event_object("FailedCreatePod", "no"), now=0)) == 1


def test_what_a_job_waits_for_is_known() -> None:
    line = timeline()
    assert line.waits_for() is None
    line.see_pod(with_uid(pending("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.")), now=0)
    waits = line.waits_for()
    assert waits is not None and "no free nvidia.com/gpu" in waits.text
    line.see_pod(with_uid(pod_object("p")), now=1)
    assert line.waits_for() is None


# --- the exit code ---------------------------------------------------------------------------------


def outcome_of(*codes: int, finished: tuple[str, ...] = ()) -> tuple[int, str]:
    line = timeline()
    for n, code in enumerate(codes):
        when = finished[n] if finished else f"2026-01-01T00:00:0{n}Z"
        pod = pod_object(f"p{n}", phase="Failed", containerStatuses=ended_container(code, finished=when))
        line.see_pod(with_uid(pod, f"uid-{n}"), now=0)
    line.see_job(with_conditions(("Failed", "True", "a replica failed")))
    outcome = line.outcome()
    assert outcome is not None and not outcome.succeeded
    return outcome.exit_code, outcome.text


def test_a_failed_job_ends_with_the_code_of_its_trainer() -> None:
    code, text = outcome_of(3)
    assert code == 3
    assert text == f"PyTorchJob {JOB} failed: container pytorch of pod p0 exited with 3 (data)"


def test_the_first_code_below_128_is_the_cause_those_above_are_what_followed() -> None:
    assert outcome_of(137, 4, 143)[0] == 4
    assert outcome_of(5, 3, finished=("2026-01-01T00:00:09Z", "2026-01-01T00:00:01Z"))[0] == 3


def test_a_code_that_a_restart_can_mend_ends_with_8() -> None:
    code, text = outcome_of(137)
    assert code == ExitCode.JOB == 8
    assert "exited with 137 (killed)" in text


def test_a_failed_job_without_pods_ends_with_8_and_the_operators_words() -> None:
    code, text = outcome_of()
    assert code == ExitCode.JOB
    assert text.endswith("failed: a replica failed")


def test_a_job_that_runs_has_no_outcome_and_one_that_succeeded_0() -> None:
    line = timeline()
    line.see_job(with_conditions(("Running", "True", "")))
    assert line.outcome() is None
    line.see_job(with_conditions(("Succeeded", "True", "")))
    outcome = line.outcome()
    assert outcome is not None and outcome.succeeded and outcome.exit_code == 0
