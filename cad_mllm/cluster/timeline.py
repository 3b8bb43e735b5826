"""What happens to a job, in words: object states and events become sentences with a remedy.

Nothing here talks to a cluster, so that every sentence can be tested with a dict.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from cad_mllm.cluster.jobs import JobKind, Json
from cad_mllm.errors import ExitCode

CODES = {
    1: "a bug: its log ends in a traceback",
    2: "configuration",
    3: "data",
    4: "checkpoint",
    5: "preflight: the pod is not what the job expects",
    6: "out of GPU memory",
    137: "killed",
    139: "segmentation fault",
    143: "stopped by SIGTERM after a checkpoint",
    170: "another rank was lost",
    171: "hung",
}
"""What the trainer's exit codes mean (README, Exit codes), for people."""
_SUCCESS = ("Succeeded", "Complete")
_ENDS = (*_SUCCESS, "Failed")
_WORDS = {
    "Created": "is created",
    "Running": "runs",
    "Restarting": "restarts",
    "Suspended": "is suspended: it waits to be admitted by its queue, or `suspend: true` is set",
    "Succeeded": "succeeded",
    "Complete": "succeeded",
    "Failed": "failed",
}
# What a pod's own state says already, in better words.
_TOLD_BY_PODS = {"BackOff", "FailedScheduling", "Killing", "Preempting"}


@dataclass(frozen=True, kw_only=True)
class Note:
    """One line of the timeline."""

    text: str
    mend: str = ""
    """The kubectl command (without `kubectl -n NAMESPACE`) that shows more or mends it."""
    stuck: bool = False
    """Waiting does not mend it."""
    at: str = ""
    """When, as the cluster says it (RFC 3339), for what can happen again in the same words."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended."""

    succeeded: bool
    exit_code: int
    """0; or the code below 128 with which a trainer container failed; or ExitCode.JOB."""
    text: str


def ended(job: Json) -> Literal["succeeded", "failed"] | None:
    """How the job's conditions say that it ended, if it did."""
    for condition in _true_conditions(job):
        if condition["type"] in _ENDS:
            return "succeeded" if condition["type"] in _SUCCESS else "failed"
    return None


def job_notes(kind: JobKind, job: Json) -> list[Note]:
    """The job's conditions, oldest first."""
    title = f"{kind.kind} {job['metadata']['name']}"
    notes = []
    for condition in sorted(_true_conditions(job), key=lambda c: c.get("lastTransitionTime") or ""):
        if condition["type"] not in _WORDS:
            continue
        tells = condition["type"] in ("Restarting", "Failed")
        reason = f": {_line(condition['message'])}" if tells and condition.get("message") else ""
        mend = "get workloads.kueue.x-k8s.io" if condition["type"] == "Suspended" else ""
        text = f"{title} {_WORDS[condition['type']]}{reason}"
        notes.append(Note(text=text, mend=mend, at=condition.get("lastTransitionTime") or ""))
    return notes


def pod_notes(pod: Json) -> list[Note]:
    """What a pod waits for, where it runs, how its containers fared."""
    name = pod["metadata"]["name"]
    status = pod.get("status") or {}
    notes = []
    if pod["metadata"].get("deletionTimestamp"):
        notes.append(Note(text=f"pod {name} is being deleted"))
    if status.get("reason") == "Evicted":
        notes.append(
            Note(
                text=f"pod {name} was evicted: {_line(status.get('message', ''))}",
                mend="describe nodes",
            )
        )
    for condition in status.get("conditions") or []:
        if (
            condition["type"] == "PodScheduled"
            and condition["status"] == "False"
            and condition.get("message")
        ):
            notes.append(unschedulable(name, condition["message"]))
        if condition["type"] == "DisruptionTarget" and condition["status"] == "True":
            notes.append(
                Note(text=f"pod {name} is taken down by the cluster: {_line(condition.get('message', ''))}")
            )
    for container in [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]:
        notes += _container_notes(name, container)
    if status.get("phase") == "Running" and pod.get("spec", {}).get("nodeName"):
        notes.append(Note(text=f"pod {name} runs on {pod['spec']['nodeName']}"))
    return notes


def unschedulable(pod: str, message: str) -> Note:
    """The scheduler's message in words. Several reasons may hold at once, for different nodes."""
    message = _line(message)
    total = re.search(r"0/(\d+) nodes", message)
    of = f" of {total[1]}" if total else ""
    if missing := re.search(r'persistentvolumeclaim "([^"]+)" not found', message):
        return Note(
            text=f"pod {pod} waits for the volume claim {missing[1]}, which does not exist",
            mend="get pvc",
            stuck=True,
        )
    if "unbound immediate PersistentVolumeClaims" in message:
        return Note(
            text=f"pod {pod} waits for a volume: its PersistentVolumeClaim is not bound, "
            "no storage class provides it (or not in this access mode)",
            mend="get pvc,storageclass",
        )
    reasons = []
    mend = f"describe pod {pod}"
    for count, resource in re.findall(r"(\d+) Insufficient ([\w./-]*\w)", message):
        what = "no free nvidia.com/gpu" if resource == "nvidia.com/gpu" else f"too little {resource}"
        reasons.append(f"{count}{of} nodes have {what} (Insufficient {resource})")
        mend = "describe nodes"
    if mismatch := re.search(r"(\d+) node\(s\) didn't match Pod's node affinity/selector", message):
        reasons.append(f"{mismatch[1]}{of} nodes are of another GPU model or lack its labels")
        mend = "get nodes -L nvidia.com/gpu.product" if mend != "describe nodes" else mend
    for count, taint in re.findall(r"(\d+) node\(s\) had untolerated taint\(?s?\)? ?\{([^}]*)\}", message):
        reasons.append(f"{count}{of} nodes have the taint {taint.strip().rstrip(':')}")
    return Note(text=f"pod {pod} waits for a node: {'; '.join(reasons) or message}", mend=mend)


def event_note(event: Json) -> Note | None:
    """A Warning event in words, or None for what needs no line."""
    reason, message = event.get("reason") or "", _line(event.get("message") or "")
    about = event.get("involvedObject") or {}
    title = f"{about.get('kind', '?')} {about.get('name', '?')}"
    if event.get("type") != "Warning" or reason in _TOLD_BY_PODS:
        return None
    if reason == "Failed" and "pull image" not in message:
        return None
    if reason.startswith("FailedCreate"):
        return _failed_create(title, message)
    if reason in ("FailedMount", "FailedAttachVolume"):
        missing = re.search(r'(secret|configmap|persistentvolumeclaim) "([^"]+)" not found', message)
        if missing:
            return Note(
                text=f"{title} waits for {missing[1]} {missing[2]}, which does not exist",
                mend=f"get {missing[1]}",
                stuck=True,
            )
        return Note(text=f"{title} cannot mount a volume: {message}", mend="get pvc")
    if "Validation" in reason:
        return Note(text=f"{title} is not valid for its operator: {message}", stuck=True)
    return Note(text=f"{title}: {message or reason}")


@dataclass(kw_only=True)
class Timeline:
    """Remembers what was said, what is stuck and since when, and how the containers ended."""

    kind: JobKind
    name: str
    since: str = ""
    """RFC 3339 time of the job's creation: events from before belong to an older job of the name."""
    _said: set[tuple[str, Note]] = field(default_factory=set)
    _stuck: dict[str, tuple[float, Note]] = field(default_factory=dict)
    _waiting: dict[str, Note] = field(default_factory=dict)
    _pods: dict[str, Json] = field(default_factory=dict)
    _job: Json | None = None

    def see_job(self, job: Json) -> list[Note]:
        """What is new about the job."""
        self._job = job
        self.since = job["metadata"].get("creationTimestamp") or ""
        return self._news(job["metadata"]["uid"], job_notes(self.kind, job))

    def see_pod(self, pod: Json, *, now: float, deleted: bool = False) -> list[Note]:
        """What is new about a pod; `now` in seconds of any clock that does not jump."""
        uid = pod["metadata"]["uid"]
        if uid not in self._pods:
            # A pod came to be: what kept pods from being created has been mended.
            for key in [key for key in self._stuck if key.startswith("create")]:
                del self._stuck[key]
        self._pods[uid] = pod
        if deleted or pod.get("status", {}).get("phase") != "Pending":
            self._stuck.pop(f"event {uid}", None)
        if deleted:
            self._stuck.pop(uid, None)
            self._waiting.pop(uid, None)
            return self._news(uid, [Note(text=f"pod {pod['metadata']['name']} is gone")])
        notes = pod_notes(pod)
        stuck = next((note for note in notes if note.stuck), None)
        if stuck is None:
            self._stuck.pop(uid, None)
        else:
            self._stuck.setdefault(uid, (now, stuck))
        waiting = next((note for note in notes if note.mend), None)
        if waiting is None or pod.get("status", {}).get("phase") != "Pending":
            self._waiting.pop(uid, None)
        else:
            self._waiting[uid] = waiting
        return self._news(uid, notes)

    def see_event(self, event: Json, *, now: float) -> list[Note]:
        """What an event of this job, of its pods or of what the operator makes for it says."""
        about = event.get("involvedObject") or {}
        name = about.get("name") or ""
        if name != self.name and not name.startswith(f"{self.name}-"):
            return []
        stamp = event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]
        if stamp[:19] < self.since[:19]:
            return []
        note = event_note(event)
        if note is None:
            return []
        if note.stuck:
            uid = about.get("uid", "")
            key = f"event {uid}" if uid in self._pods else f"create {name}"
            self._stuck.setdefault(key, (now, note))
        return self._news(name, [note])

    def stuck(self, *, now: float, seconds: float) -> Note | None:
        """A problem that waiting does not mend, and that has lasted for so many seconds."""
        lasting = [(since, note) for since, note in self._stuck.values() if now - since >= seconds]
        return min(lasting, key=lambda item: item[0])[1] if lasting else None

    def waits_for(self) -> Note | None:
        """What a pod that has not started waits for, if that is known."""
        problems = [note for _, note in self._stuck.values()]
        return next(iter([*problems, *self._waiting.values()]), None)

    def outcome(self) -> Outcome | None:
        """How the job ended, or None while it has not."""
        assert self._job is not None
        title = f"{self.kind.kind} {self.name}"
        how = ended(self._job)
        if how is None:
            return None
        if how == "succeeded":
            return Outcome(succeeded=True, exit_code=0, text=f"{title} succeeded")
        failures = sorted(self._failures(), key=lambda failure: (failure[1] >= 128, failure[0]))
        if not failures:
            reasons = [c.get("message") or "" for c in _true_conditions(self._job) if c["type"] == "Failed"]
            return Outcome(
                succeeded=False,
                exit_code=ExitCode.JOB,
                text=f"{title} failed: {_line(' '.join(reasons)) or 'no pod of it is left to say why'}",
            )
        _, code, pod, container = failures[0]
        return Outcome(
            succeeded=False,
            exit_code=code if code < 128 else ExitCode.JOB,
            text=f"{title} failed: container {container} of pod {pod} exited with {_code(code)}",
        )

    def _failures(self) -> Iterator[tuple[str, int, str, str]]:
        """(when, exit code, pod, container) of every container that failed, as far as the pods tell."""
        for pod in self._pods.values():
            for status in pod.get("status", {}).get("containerStatuses") or []:
                for state in (status.get("state") or {}, status.get("lastState") or {}):
                    end = state.get("terminated")
                    if end and end["exitCode"] != 0:
                        yield (
                            end.get("finishedAt") or "",
                            end["exitCode"],
                            pod["metadata"]["name"],
                            status["name"],
                        )

    def _news(self, about: str, notes: list[Note]) -> list[Note]:
        fresh = [note for note in notes if (about, note) not in self._said]
        self._said.update((about, note) for note in fresh)
        return fresh


def _container_notes(pod: str, status: Json) -> Iterator[Note]:
    state, last = status.get("state") or {}, status.get("lastState") or {}
    where = f"pod {pod}, container {status['name']}"
    if status.get("restartCount"):
        before = last.get("terminated") or {}
        why = f", it had exited with {_code(before['exitCode'])}" if "exitCode" in before else ""
        yield Note(
            text=f"{where}: restarted ({status['restartCount']}x){why}",
            mend=f"logs {pod} -c {status['name']} --previous",
        )
    if waiting := state.get("waiting"):
        yield from _waiting_notes(pod, where, status, waiting)
    if end := state.get("terminated"):
        if end.get("reason") == "OOMKilled":
            yield Note(
                text=f"{where}: killed, it needed more host memory than its limit (OOMKilled)",
                mend=f"get pod {pod} -o jsonpath='{{.spec.containers[*].resources.limits}}'",
            )
        elif end["exitCode"] == 0:
            yield Note(text=f"{where}: done")
        else:
            yield Note(
                text=f"{where}: exited with {_code(end['exitCode'])}",
                mend=f"logs {pod} -c {status['name']}",
            )


def _waiting_notes(pod: str, where: str, status: Json, waiting: Json) -> Iterator[Note]:
    reason, message = waiting.get("reason") or "", _line(waiting.get("message") or "")
    image = status.get("image") or "its image"
    if reason in ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull"):
        why = f" ({message})" if message and reason == "ErrImagePull" else ""
        yield Note(
            text=f"{where}: the image {image} cannot be pulled{why}: push it with `make push IMAGE= TAG=`, "
            "name it in the overlays with `make k8s-image IMAGE= TAG=`, or give the pod an imagePullSecret",
            mend=f"describe pod {pod}",
            stuck=True,
        )
    elif reason in ("CreateContainerConfigError", "CreateContainerError", "RunContainerError"):
        yield Note(
            text=f"{where}: cannot be created: {message}",
            mend=f"describe pod {pod}",
            stuck=reason == "CreateContainerConfigError",
        )
    elif reason == "CrashLoopBackOff":
        yield Note(
            text=f"{where}: keeps failing, Kubernetes waits before it starts it again",
            mend=f"logs {pod} -c {status['name']} --previous",
        )


def _failed_create(title: str, message: str) -> Note:
    if "violates PodSecurity" in message:
        what = message[message.find("violates PodSecurity") :]
        by_operator = "init-pytorch" in what or "init container" in what
        whose = (
            "give the training operator an init container that may: "
            "`kubectl apply --server-side -k k8s/operators/training-operator`"
            if by_operator
            else "remove that from your patches of the overlay, or take a namespace whose level allows it"
        )
        return Note(
            text=f"{title}: the namespace forbids its pod, it {what}: {whose}",
            mend="get namespace --show-labels",
            stuck=True,
        )
    if "exceeded quota" in message:
        quota = message[message.find("exceeded quota") :]
        return Note(
            text=f"{title}: no pod, the namespace's quota is used up ({quota})", mend="describe quota"
        )
    missing = re.search(r'serviceaccount "?([\w.-]+)"? not found', message)
    if missing:
        return Note(
            text=f"{title}: no pod, the service account {missing[1]} does not exist",
            mend=f"create serviceaccount {missing[1]}",
            stuck=True,
        )
    return Note(
        text=f"{title}: a pod cannot be created: {message}", mend="get events --sort-by=.lastTimestamp"
    )


def _true_conditions(job: Json) -> list[Json]:
    conditions = (job.get("status") or {}).get("conditions") or []
    return [condition for condition in conditions if condition["status"] == "True"]


def _code(code: int) -> str:
    return f"{code} ({CODES[code]})" if code in CODES else str(code)


def _line(text: str) -> str:
    return " ".join(text.split())
