"""What a job needs of its cluster, asked before the job is there: missing things end in one line each."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cad_mllm.cluster.api import FORBIDDEN, NODES, ApiError, Cluster
from cad_mllm.cluster.jobs import Json
from cad_mllm.cluster.render import Overlay, pod_templates
from cad_mllm.errors import ClusterError

_GPU = "nvidia.com/gpu"
_CREATE = {
    "Secret": "create secret generic {name} --from-literal=KEY=VALUE",
    "ConfigMap": "create configmap {name} --from-file=FILE",
    "ServiceAccount": "create serviceaccount {name}",
    "PersistentVolumeClaim": "apply -k k8s/overlays/storage",
}


@dataclass(frozen=True, order=True)
class Reference:
    """An object that a pod names, and cannot start without."""

    kind: str
    name: str


def check(cluster: Cluster, overlay: Overlay, warn: Callable[[str], None]) -> None:
    """Everything that can be known before the job is submitted.

    Raises ClusterError naming what is missing: the CRD, volume claims, Secrets, ConfigMaps, or a namespace
    whose policy forbids the pods. Warns where no node matches (an autoscaler may bring one) and where the
    user may not look.
    """
    for item in overlay.objects:
        cluster.resource(item["apiVersion"], item["kind"])
    if any(item["kind"] == "Namespace" for item in overlay.objects):
        return  # it may not exist yet, and then nothing can be asked about it
    _check_references(cluster, overlay, warn)
    for template in templates(overlay):
        _check_admission(cluster, overlay, template, warn)
    _check_nodes(cluster, overlay, warn)


def templates(overlay: Overlay) -> list[Json]:
    """The pod templates of all objects of the overlay."""
    return [template for item in overlay.objects for template in pod_templates(item)]


def references(overlay: Overlay) -> list[Reference]:
    """What the pods need and the overlay does not bring."""
    brought = {Reference(item["kind"], item["metadata"]["name"]) for item in overlay.objects}
    needed = {needed for template in templates(overlay) for needed in _needs(template["spec"])}
    return sorted(needed - brought)


def _needs(pod: Json) -> Iterator[Reference]:
    if (account := pod.get("serviceAccountName", "default")) != "default":
        yield Reference("ServiceAccount", account)
    for volume in pod.get("volumes") or []:
        if claim := volume.get("persistentVolumeClaim"):
            yield Reference("PersistentVolumeClaim", claim["claimName"])
        for source in [volume, *(volume.get("projected") or {}).get("sources", [])]:
            for kind, key in (("Secret", "secret"), ("ConfigMap", "configMap")):
                if (named := source.get(key)) and not named.get("optional"):
                    yield Reference(kind, named.get("secretName") or named["name"])
    for container in [*pod["containers"], *(pod.get("initContainers") or [])]:
        sources = [entry.get("valueFrom") or {} for entry in container.get("env") or []]
        for source in [*sources, *(container.get("envFrom") or [])]:
            for kind, keys in (
                ("Secret", ("secretKeyRef", "secretRef")),
                ("ConfigMap", ("configMapKeyRef", "configMapRef")),
            ):
                for named in (source[key] for key in keys if key in source):
                    if not named.get("optional"):
                        yield Reference(kind, named["name"])


def _check_references(cluster: Cluster, overlay: Overlay, warn: Callable[[str], None]) -> None:
    missing: list[Reference] = []
    unseen: set[str] = set()
    for reference in references(overlay):
        try:
            if cluster.find(cluster.resource("v1", reference.kind), reference.name) is None:
                missing.append(reference)
        except ApiError as error:
            if error.status != FORBIDDEN:
                raise
            unseen.add(f"{reference.kind} {reference.name}")
    if unseen:
        warn(f"you may not look at {', '.join(sorted(unseen))}: whether it is there was not checked")
    if missing:
        names = ", ".join(f"{reference.kind} {reference.name}" for reference in missing)
        commands = dict.fromkeys(
            cluster.kubectl(_CREATE[reference.kind].format(name=reference.name)) for reference in missing
        )
        raise ClusterError(f"namespace {cluster.namespace} lacks {names}: {' and '.join(commands)}")


def _check_admission(cluster: Cluster, overlay: Overlay, template: Json, warn: Callable[[str], None]) -> None:
    """A dry run of the pod itself: PodSecurity, quotas and webhooks speak before the job is there."""
    spec = {
        **template["spec"],
        # A runtime's template gets its image from the TrainJob; admission wants one of each.
        "containers": [{"image": "probe", **container} for container in template["spec"]["containers"]],
    }
    metadata = {
        "generateName": f"{overlay.name}-dry-run-",
        **{key: template.get("metadata", {}).get(key, {}) for key in ("labels", "annotations")},
    }
    try:
        cluster.try_create({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})
    except ApiError as error:
        if "violates PodSecurity" in error.detail:
            raise ClusterError(forbidden_pod(cluster, error.detail)) from error
        if error.status not in (FORBIDDEN, 400, 422):
            raise
        if "cannot create resource" in error.detail:
            warn("you may not create pods: whether the namespace lets the job's pods in was not checked")
        else:
            warn(f"a dry run of the pod was refused, the job's own may be as well: {error.detail}")


def forbidden_pod(cluster: Cluster, detail: str) -> str:
    """The sentence for a namespace whose PodSecurity level forbids the pod."""
    what = detail[detail.find("violates PodSecurity") :]
    return (
        f"namespace {cluster.namespace} forbids the pod, it {what}: remove that from your patches of the "
        f"overlay, or submit to a namespace whose level allows it: "
        f"`kubectl get namespace {cluster.namespace} --show-labels`"
    )


def _check_nodes(cluster: Cluster, overlay: Overlay, warn: Callable[[str], None]) -> None:
    wanting = [template["spec"] for template in templates(overlay) if _gpus(template["spec"])]
    if not wanting:
        return
    try:
        nodes = cluster.list_all(NODES)["items"]
    except ApiError as error:
        if error.status != FORBIDDEN:
            raise
        warn("you may not look at the nodes: whether one of them has the GPUs was not checked")
        return
    for spec in wanting:
        if any(_fits(spec, node) for node in nodes):
            continue
        there = sorted({_labels(node).get("nvidia.com/gpu.product", "no GPU label") for node in nodes})
        warn(
            f"no node has {_gpus(spec)} {_GPU} and {_wanted(spec)} (there is: {', '.join(there) or 'none'}): "
            "the pods will wait until one comes; `kubectl get nodes -L nvidia.com/gpu.product`, or take the "
            "component of your GPU model"
        )
        return


def _gpus(pod: Json) -> int:
    return sum(
        int((container.get("resources") or {}).get("limits", {}).get(_GPU, 0))
        for container in pod["containers"]
    )


def _fits(pod: Json, node: Json) -> bool:
    labels = _labels(node)
    if int(node.get("status", {}).get("allocatable", {}).get(_GPU, 0)) < _gpus(pod):
        return False
    if any(labels.get(key) != value for key, value in (pod.get("nodeSelector") or {}).items()):
        return False
    terms = _terms(pod)
    return not terms or any(
        all(_holds(rule, labels) for rule in term.get("matchExpressions") or []) for term in terms
    )


def _terms(pod: Json) -> list[Json]:
    affinity = (pod.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or {}
    terms: list[Json] = required.get("nodeSelectorTerms") or []
    return terms


def _holds(rule: Json, labels: dict[str, str]) -> bool:
    value = labels.get(rule["key"])
    values = rule.get("values") or []
    match rule["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
        case "Gt":
            return value is not None and int(value) > int(values[0])
        case "Lt":
            return value is not None and int(value) < int(values[0])
        case operator:
            raise ClusterError(f"node affinity: Kubernetes knows no operator {operator!r}")


def _wanted(pod: Json) -> str:
    parts = [f"{key}={value}" for key, value in (pod.get("nodeSelector") or {}).items()]
    for term in _terms(pod):
        parts += [
            f"{rule['key']} {rule['operator']} {'/'.join(rule.get('values') or [])}".rstrip()
            for rule in term.get("matchExpressions") or []
        ]
    return ", ".join(parts) or "no label"


def _labels(node: Json) -> dict[str, str]:
    labels: dict[str, str] = node["metadata"].get("labels") or {}
    return labels
