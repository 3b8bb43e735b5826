"""An overlay's objects go into the cluster, and out of it again."""

import time
from collections.abc import Callable

from cad_mllm.cluster.api import CONFLICT, FIELD_MANAGER, INVALID, PODS, ApiError, Cluster, Resource
from cad_mllm.cluster.jobs import Json, kind_of
from cad_mllm.cluster.render import Overlay
from cad_mllm.cluster.timeline import ended
from cad_mllm.errors import ClusterError, ConfigError

# What others stand on comes first; the job comes last; everything else between the two.
_FIRST = (
    "Namespace",
    "PriorityClass",
    "ServiceAccount",
    "Role",
    "RoleBinding",
    "Secret",
    "ConfigMap",
    "PersistentVolumeClaim",
    "NetworkPolicy",
    "PodDisruptionBudget",
    "Service",
)


def in_order(objects: tuple[Json, ...]) -> list[Json]:
    """The order in which the objects can be applied one by one."""

    def rank(item: Json) -> int:
        if kind_of(item) is not None:
            return len(_FIRST) + 1
        return _FIRST.index(item["kind"]) if item["kind"] in _FIRST else len(_FIRST)

    return sorted(objects, key=rank)


def namespace_for(overlay: Overlay, asked: str | None) -> str | None:
    """The namespace that the overlay goes to, or None for the context's. Raises ConfigError if two differ."""
    if asked is not None and overlay.namespace not in (None, asked):
        raise ConfigError(
            f"--namespace {asked}: the objects of {overlay.path} name the namespace {overlay.namespace}: "
            f"leave the flag out, or change `namespace:` in {overlay.path}/kustomization.yaml"
        )
    return asked or overlay.namespace


def apply(cluster: Cluster, overlay: Overlay, say: Callable[[str], None]) -> Json:
    """Server-side apply of every object, the job last; returns the job as the server has it.

    Raises ClusterError where the job is there already and has ended, where another field manager owns a
    field, or where a changed field cannot be changed.
    """
    _refuse_ended_job(cluster, overlay)
    job: Json | None = None
    for item in in_order(overlay.objects):
        title = f"{item['kind']} {item['metadata']['name']}"
        try:
            applied = cluster.apply(item)
        except ApiError as error:
            remedy = _remedy(cluster, overlay, item, error)
            if remedy is None:
                raise
            raise ClusterError(f"{title}: {error.detail}: {remedy}") from error
        say(f"applied {title}")
        if item is overlay.job:
            job = applied
    assert job is not None
    return job


def delete(cluster: Cluster, overlay: Overlay, say: Callable[[str], None], *, seconds: float) -> None:
    """Delete everything that the overlay makes but its namespace, and wait until the job's pods are gone.

    Raises ClusterError when something is still there after `seconds`.
    """
    waiting: list[tuple[Resource, str]] = []
    for item in reversed(in_order(overlay.objects)):
        if item["kind"] in ("Namespace", "PriorityClass"):
            continue
        try:
            resource = cluster.resource(item["apiVersion"], item["kind"])
        except ApiError:
            continue  # no such kind in the cluster: nothing of it to delete
        name = item["metadata"]["name"]
        if cluster.delete(resource, name):
            say(f"deleting {item['kind']} {name}")
            waiting.append((resource, name))
    deadline = time.monotonic() + seconds
    while left := _still_there(cluster, overlay, waiting):
        if time.monotonic() > deadline:
            raise ClusterError(
                f"{', '.join(left)}: still there {seconds:.0f} s after the deletion: see what holds it with "
                f"{cluster.kubectl(f'describe {left[0]}')}"
            )
        time.sleep(cluster.patience.poll)


def _still_there(cluster: Cluster, overlay: Overlay, waiting: list[tuple[Resource, str]]) -> list[str]:
    left = [f"{res.full_name}/{name}" for res, name in waiting if cluster.find(res, name) is not None]
    pods = cluster.list_all(PODS, labels=overlay.kind.selector(overlay.name))["items"]
    return [*left, *(f"pod/{pod['metadata']['name']}" for pod in pods)]


def _refuse_ended_job(cluster: Cluster, overlay: Overlay) -> None:
    resource = cluster.resource(overlay.kind.api_version, overlay.kind.kind)
    there = cluster.find(resource, overlay.name)
    how = ended(there) if there is not None else None
    if how is not None:
        raise ClusterError(
            f"{overlay.kind.kind} {overlay.name} is there already and has ended ({how}), nothing would run: "
            f"{cluster.kubectl(f'delete {resource.full_name} {overlay.name}')}, then submit again"
        )


def _remedy(cluster: Cluster, overlay: Overlay, item: Json, error: ApiError) -> str | None:
    if error.status == CONFLICT and "conflict" in error.detail.lower():
        take_over = f"apply --server-side --force-conflicts --field-manager={FIELD_MANAGER} -k {overlay.path}"
        return f"another tool set these fields; take them over with {cluster.kubectl(take_over)}"
    if error.status == INVALID and ("immutable" in error.detail or "forbidden" in error.detail.lower()):
        resource = cluster.resource(item["apiVersion"], item["kind"])
        delete_it = cluster.kubectl(f"delete {resource.full_name} {item['metadata']['name']}")
        return f"what is there cannot be changed into this; {delete_it}, then submit again"
    return None
