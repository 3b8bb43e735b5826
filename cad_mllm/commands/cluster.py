"""Send a job to a cluster, follow it, read its logs, smoke-test it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.errors import ConfigError
from cad_mllm.settings import Positional, parse_flags, require


@dataclass(frozen=True, kw_only=True)
class ClusterArguments:
    """What every command that talks to a cluster takes."""

    namespace: str | None = None
    """Namespace of the job. Unset: the overlay's own, else the kubeconfig's."""
    context: str | None = None
    """Context of the kubeconfig. Unset: the current one."""


@dataclass(frozen=True, kw_only=True)
class SubmitArguments(ClusterArguments):
    """Send an overlay's job to a cluster: render, check what it needs, apply server-side."""

    overlay: Positional[Path]
    """Folder of the overlay, such as k8s/overlays/zero3."""
    follow: bool = False
    """Show what happens and what rank 0 prints until the job ends, and exit with its result."""
    delete_on_interrupt: bool = False
    """Delete the job when Ctrl-C or SIGTERM ends the following."""


def submit(argv: Sequence[str]) -> int:
    """Send an overlay's job to a cluster."""
    example = (
        "examples:\n"
        "  cad-mllm submit k8s/overlays/zero3 --namespace training\n"
        "  cad-mllm submit k8s/overlays/smoke-cpu --follow --delete_on_interrupt\n"
    )
    arguments = parse_flags(SubmitArguments, argv, prog="cad-mllm submit", examples=example)
    if arguments.delete_on_interrupt and not arguments.follow:
        raise ConfigError("--delete_on_interrupt needs --follow: without it there is nothing to interrupt")
    from cad_mllm.cluster import run

    return run.submit(
        arguments.overlay,
        namespace=arguments.namespace,
        context=arguments.context,
        follow=arguments.follow,
        delete_on_interrupt=arguments.delete_on_interrupt,
    )


@dataclass(frozen=True, kw_only=True)
class WatchArguments(ClusterArguments):
    """Follow a job in a cluster: what happens to it and its pods, in words; exit with its result."""

    job: Positional[str]
    """NAME, or KIND/NAME where two kinds share it: cad-mllm-zero3, mpijob/cad-mllm-mpi-zero3."""
    delete_on_interrupt: bool = False
    """Delete the job when Ctrl-C or SIGTERM ends the following."""


def watch(argv: Sequence[str]) -> int:
    """Follow a job in a cluster, and exit with its result."""
    example = "example:\n  cad-mllm watch cad-mllm-zero3 --namespace training\n"
    arguments = parse_flags(WatchArguments, argv, prog="cad-mllm watch", examples=example)
    from cad_mllm.cluster import run

    return run.watch(
        arguments.job,
        namespace=arguments.namespace,
        context=arguments.context,
        delete_on_interrupt=arguments.delete_on_interrupt,
    )


@dataclass(frozen=True, kw_only=True)
class LogsArguments(ClusterArguments):
    """Print what rank 0 of a job prints, from its start to its end, across restarts."""

    job: Positional[str]
    """NAME, or KIND/NAME where two kinds share it."""


def logs(argv: Sequence[str]) -> int:
    """Print what rank 0 of a job prints, across restarts."""
    example = "example:\n  cad-mllm logs cad-mllm-zero3 --namespace training > zero3.log\n"
    arguments = parse_flags(LogsArguments, argv, prog="cad-mllm logs", examples=example)
    from cad_mllm.cluster import run

    return run.logs(arguments.job, namespace=arguments.namespace, context=arguments.context)


@dataclass(frozen=True, kw_only=True)
class SmokeArguments(ClusterArguments):
    """Run the smoke job: it must train, lose a pod, resume from its checkpoint and succeed."""

    overlay: Path = Path("k8s/overlays/smoke")
    """Folder of a smoke overlay: k8s/overlays/smoke (GPUs) or k8s/overlays/smoke-cpu (any cluster)."""
    kill_pod: bool = True
    """Kill one pod after the first checkpoint; off (`--no_kill_pod`): let the job run through."""
    minutes: float = 30.0
    """Time limit of the job."""
    keep: bool = False
    """Leave the job, its pods and its volume for a look."""
    json: Path | None = None
    """File for the report as JSON."""


def smoke(argv: Sequence[str]) -> int:
    """Run the smoke job on a cluster, and assert what it shows."""
    example = (
        "examples:\n"
        "  cad-mllm smoke --overlay k8s/overlays/smoke --namespace ci --json smoke.json\n"
        "  cad-mllm smoke --overlay k8s/overlays/smoke-cpu --no_kill_pod --keep\n"
    )
    arguments = parse_flags(SmokeArguments, argv, prog="cad-mllm smoke", examples=example)
    require("--minutes", arguments.minutes, 0.1)
    from cad_mllm.cluster import run

    return run.smoke(
        arguments.overlay,
        namespace=arguments.namespace,
        context=arguments.context,
        kill_pod=arguments.kill_pod,
        minutes=arguments.minutes,
        keep=arguments.keep,
        json=arguments.json,
    )
