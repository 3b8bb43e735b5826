"""The smoke job of CI: does this image train, lose a pod, come back and finish, on this cluster?"""

import dataclasses
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cad_mllm.cluster import apply as applying
from cad_mllm.cluster.api import PODS, Cluster
from cad_mllm.cluster.jobs import Json
from cad_mllm.cluster.preflight import check, templates
from cad_mllm.cluster.render import Overlay, world_size
from cad_mllm.cluster.watch import JobRef, follow, job_of
from cad_mllm.errors import ClusterError, ConfigError, ExitCode

_INSTANCE = "app.kubernetes.io/instance"
_DELETE_SECONDS = 300.0
_KILL_GRACE_SECONDS = 1
_CHECKPOINTS = 2
"""A pod is killed when so many are due: they are written beside training, each after the one before it."""
_WORLD = re.compile(r"\bworld size (\d+)\b")
_STEP = re.compile(r"\bstep +(\d+) +stage +\d +loss +(\S+)")
_RESUMED = re.compile(r"\bresumed from (\S*step-0*(\d+))")
_DONE = re.compile(r"\bdone: (\d+) steps\b")


@dataclass(kw_only=True)
class Console:
    """What rank 0's lines say, read as they come."""

    world_sizes: list[int] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    """By step; what a resumed run repeats replaces what was lost."""
    resumed: list[int] = field(default_factory=list)
    """The step of each checkpoint that a start went on from."""
    done: int | None = None
    """Steps at the end of the training."""

    def read(self, line: str) -> None:
        """Take in one line."""
        if found := _WORLD.search(line):
            self.world_sizes.append(int(found[1]))
        elif found := _STEP.search(line):
            self.losses[int(found[1])] = float(found[2])
        elif found := _RESUMED.search(line):
            self.resumed.append(int(found[2]))
        elif found := _DONE.search(line):
            self.done = int(found[1])


@dataclass(frozen=True, kw_only=True)
class Assertion:
    """One line of the report."""

    what: str
    expected: str
    seen: str
    holds: bool


@dataclass(frozen=True, kw_only=True)
class SmokeReport:
    """What was asserted, and on what."""

    overlay: str
    namespace: str
    job: str
    seconds: float
    exit_code: ExitCode
    """DONE where everything holds; CLUSTER where the cluster kept the job from its end; JOB otherwise."""
    assertions: tuple[Assertion, ...]
    losses: dict[int, float]

    def write(self, path: Path) -> None:
        """As JSON, for the next step of a pipeline. Raises ConfigError when it cannot be written."""
        content = {"passed": self.exit_code == ExitCode.DONE, **dataclasses.asdict(self)}
        try:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--json {path}: cannot be written ({error.strerror})") from error


def smoke(
    cluster: Cluster,
    overlay: Overlay,
    *,
    kill_pod: bool,
    minutes: float,
    keep: bool,
    tell: Callable[[str], None],
    line: Callable[[str], None],
) -> SmokeReport:
    """Run the smoke job to its end and report; the cluster is left as it was unless `keep`.

    What an earlier run left is deleted first, its volume included: a smoke job starts from nothing. With
    `kill_pod` one pod is killed once the first checkpoint is written. Raises ConfigError for an overlay
    that is no smoke overlay, ClusterError for what the cluster lacks.
    """
    _refuse_other_overlays(overlay)
    ranks, steps = world_size(overlay), save_steps(overlay)
    started = time.monotonic()
    deadline = started + 60 * minutes
    check(cluster, overlay, tell)
    applying.delete(cluster, overlay, tell, seconds=_DELETE_SECONDS)
    try:
        applying.apply(cluster, overlay, tell)
        run = _Run(cluster, job_of(overlay.job), steps * _CHECKPOINTS if kill_pod else None, tell, line)
        ending, blocked = run.to_the_end(deadline)
    finally:
        if not keep:
            applying.delete(cluster, overlay, tell, seconds=_DELETE_SECONDS)
    assertions = (
        ending,
        *console_assertions(run.console, ranks=ranks),
        *([run.kill_assertion(), resume_assertion(run.console, steps)] if kill_pod else []),
    )
    holds = all(assertion.holds for assertion in assertions)
    return SmokeReport(
        overlay=str(overlay.path),
        namespace=cluster.namespace,
        job=overlay.name,
        seconds=round(time.monotonic() - started, 1),
        exit_code=ExitCode.CLUSTER if blocked else ExitCode.DONE if holds else ExitCode.JOB,
        assertions=assertions,
        losses=run.console.losses,
    )


def console_assertions(console: Console, *, ranks: int) -> tuple[Assertion, ...]:
    """What rank 0's lines must say in any case: world size, falling loss, the end."""
    sizes = sorted(set(console.world_sizes))
    first, last = loss_trend(console.losses)
    return (
        Assertion(
            what="world size seen by the trainer",
            expected=str(ranks),
            seen=", ".join(map(str, sizes)) or "no such line",
            holds=sizes == [ranks],
        ),
        Assertion(
            what="loss falls",
            expected="mean of the last third below that of the first",
            seen=f"{first:.4f} -> {last:.4f} in {len(console.losses)} logged steps",
            holds=last < first,
        ),
        Assertion(
            what="training ends",
            expected="`done: N steps`",
            seen="no such line" if console.done is None else f"done: {console.done} steps",
            holds=console.done is not None,
        ),
    )


def resume_assertion(console: Console, steps: int) -> Assertion:
    """Whether the run went on, after the kill, from a checkpoint of step `steps` or later."""
    return Assertion(
        what="the checkpoint loads after the kill",
        expected=f"`resumed from` step {steps} or later",
        seen=", ".join(f"step {step}" for step in console.resumed) or "no such line",
        holds=any(step >= steps for step in console.resumed),
    )


def loss_trend(losses: dict[int, float]) -> tuple[float, float]:
    """Mean loss of the first and of the last third of the logged steps; NaN where there are too few."""
    values = [losses[step] for step in sorted(losses)]
    third = len(values) // 3
    if third == 0:
        return float("nan"), float("nan")
    return statistics.fmean(values[:third]), statistics.fmean(values[-third:])


def save_steps(overlay: Overlay) -> int:
    """Steps between the checkpoints of the overlay's run: `--save_steps` in its args. Else ConfigError."""
    for template in templates(overlay):
        for container in template["spec"]["containers"]:
            words = " ".join(container.get("args") or []).replace("=", " ").split()
            for flag, value in itertools.pairwise(words):
                if flag == "--save_steps" and value.isdigit():
                    return int(value)
    raise ConfigError(
        f"{overlay.path}: no container has `--save_steps N` in its args: when to kill a pod follows from it"
    )


class _Run:
    """One run of the job: its console is read, and one of its pods is killed on the way."""

    def __init__(
        self,
        cluster: Cluster,
        job: JobRef,
        kill_after: int | None,
        tell: Callable[[str], None],
        line: Callable[[str], None],
    ) -> None:
        self.console = Console()
        self._job = job
        self._cluster = cluster
        self._kill_after = kill_after
        """The step after which one checkpoint is surely complete. None: no pod is killed."""
        self._killed: str | None = None
        self._tell = tell
        self._line = line

    def to_the_end(self, deadline: float) -> tuple[Assertion, bool]:
        """Follow the job; what keeps it from its end is a failed assertion, and True if it is the cluster."""
        blocked = False
        try:
            outcome = follow(self._cluster, self._job, tell=self._tell, line=self._read, deadline=deadline)
            seen, holds = outcome.text, outcome.succeeded
        except ClusterError as error:
            seen, holds, blocked = str(error), False, True
        return Assertion(what="the job succeeds", expected="Succeeded", seen=seen, holds=holds), blocked

    def kill_assertion(self) -> Assertion:
        """Whether a pod was killed in the middle."""
        return Assertion(
            what="one pod is killed in the middle",
            expected=f"after step {self._kill_after}",
            seen=self._killed or "the run was over before: it needs more steps than that",
            holds=self._killed is not None,
        )

    def _read(self, line: str) -> None:
        self._line(line)
        self.console.read(line)
        if self._kill_after is None or self._killed is not None or self.console.done is not None:
            return
        if max(self.console.losses, default=0) > self._kill_after:
            self._kill()

    def _kill(self) -> None:
        """Kill the last of the running pods that are not rank 0's; with one pod, that one."""
        pods = self._cluster.list_all(PODS, labels=self._job.kind.selector(self._job.name))["items"]
        running = [pod for pod in pods if pod.get("status", {}).get("phase") == "Running"]
        if not running:
            return  # between two lives: the next line asks again
        running.sort(key=lambda pod: (not self._job.kind.is_rank0(pod), pod["metadata"]["name"]))
        victim = running[-1]["metadata"]["name"]
        self._cluster.delete(PODS, victim, grace_seconds=_KILL_GRACE_SECONDS)
        self.console.resumed.clear()  # only what comes after the kill proves anything
        self._killed = f"pod {victim}, after step {max(self.console.losses)}"
        self._tell(f"killed pod {victim} to see the job come back")


def _refuse_other_overlays(overlay: Overlay) -> None:
    labels: Json = overlay.job["metadata"].get("labels") or {}
    instance = str(labels.get(_INSTANCE, ""))
    if not instance.startswith("smoke"):
        raise ConfigError(
            f"{overlay.path}: smoke deletes all that the overlay makes, volumes included, so it takes "
            f"overlays whose label {_INSTANCE} begins with `smoke` (this one: {instance or 'none'}): "
            "`cad-mllm smoke --overlay k8s/overlays/smoke`, or `cad-mllm submit` for a real job"
        )
