"""The four subcommands: what they say to people, and the code they end with."""

import contextlib
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cad_mllm.cluster import apply as applying
from cad_mllm.cluster import preflight
from cad_mllm.cluster import smoke as smoking
from cad_mllm.cluster.api import PODS, Cluster, connect
from cad_mllm.cluster.render import render
from cad_mllm.cluster.timeline import Outcome
from cad_mllm.cluster.watch import JobRef, delete_job, find_job, follow, job_of, sigterm_interrupts
from cad_mllm.errors import ClusterError, ExitCode


def submit(
    path: Path, *, namespace: str | None, context: str | None, follow: bool, delete_on_interrupt: bool
) -> int:
    """Render, check, apply; with `follow` stay until the job ends and return its code.

    Raises ConfigError for the overlay, PreflightError without kubectl, ClusterError for the cluster.
    """
    overlay = render(path)
    cluster = connect(context=context, namespace=applying.namespace_for(overlay, namespace))
    preflight.check(cluster, overlay, _warn)
    applying.apply(cluster, overlay, _tell)
    job = job_of(overlay.job)
    if follow:
        return _follow(cluster, job, log=True, delete_on_interrupt=delete_on_interrupt)
    flags = f"--namespace {cluster.namespace}" + (f" --context {context}" if context else "")
    _tell(f"{job} is submitted: follow it with `cad-mllm watch {job.name} {flags}`")
    return ExitCode.DONE


def watch(name: str, *, namespace: str | None, context: str | None, delete_on_interrupt: bool) -> int:
    """Tell the job's timeline until it ends, and return its code. Raises ClusterError."""
    cluster = connect(context=context, namespace=namespace)
    return _follow(cluster, find_job(cluster, name), log=False, delete_on_interrupt=delete_on_interrupt)


def logs(name: str, *, namespace: str | None, context: str | None) -> int:
    """Print rank 0's lines to stdout until the job ends; the timeline goes to stderr.

    Raises ClusterError, also when no pod of rank 0 is left.
    """
    cluster = connect(context=context, namespace=namespace)
    job = find_job(cluster, name)
    follow(cluster, job, tell=_warn, line=_print)
    pods = cluster.list_all(PODS, labels=job.kind.selector(job.name))["items"]
    if not any(job.kind.is_rank0(pod) for pod in pods):
        raise ClusterError(
            f"{job} has ended and its pods are cleaned up, their logs with them: what it wrote is in its "
            f"output volume (metrics.jsonl): {cluster.kubectl('get pvc')}"
        )
    return ExitCode.DONE


def smoke(
    path: Path,
    *,
    namespace: str | None,
    context: str | None,
    kill_pod: bool,
    minutes: float,
    keep: bool,
    json: Path | None,
) -> int:
    """Run the smoke job, print what was asserted, and return 0 where all of it holds.

    Raises ConfigError for the overlay, PreflightError without kubectl, ClusterError for the cluster.
    """
    overlay = render(path)
    cluster = connect(context=context, namespace=applying.namespace_for(overlay, namespace))
    with sigterm_interrupts():
        report = smoking.smoke(
            cluster, overlay, kill_pod=kill_pod, minutes=minutes, keep=keep, tell=_tell, line=_print
        )
    if json is not None:
        report.write(json)
    _show(report)
    return report.exit_code


def _follow(cluster: Cluster, job: JobRef, *, log: bool, delete_on_interrupt: bool) -> int:
    with _deleting(cluster, job) if delete_on_interrupt else contextlib.nullcontext():
        outcome: Outcome = follow(cluster, job, tell=_tell, line=_print if log else None)
    if outcome.succeeded:
        _tell(outcome.text)
    else:
        print(f"error: {outcome.text}", file=sys.stderr)
    return outcome.exit_code


@contextlib.contextmanager
def _deleting(cluster: Cluster, job: JobRef) -> Iterator[None]:
    with sigterm_interrupts():
        try:
            yield
        except KeyboardInterrupt:
            delete_job(cluster, job)
            _tell(f"deleted {job}")
            raise


def _show(report: smoking.SmokeReport) -> None:
    table = Table(title=f"{report.job} in {report.namespace}, {report.seconds:.0f} s")
    for column in ("", "asserted", "expected", "seen"):
        table.add_column(column, overflow="fold")
    for assertion in report.assertions:
        mark = "[green]ok[/]" if assertion.holds else "[red]FAILED[/]"
        table.add_row(mark, assertion.what, assertion.expected, assertion.seen)
    Console().print(table)


def _stamped(text: str) -> str:
    return f"{datetime.now():%H:%M:%S} {text}"


def _tell(text: str) -> None:
    print(_stamped(text), flush=True)


def _warn(text: str) -> None:
    print(_stamped(text), file=sys.stderr, flush=True)


def _print(line: str) -> None:
    print(line, flush=True)
