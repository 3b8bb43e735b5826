"""An overlay goes into the cluster: in order, checked before, and out of it again."""

import copy

import pytest

from cad_mllm.cluster.api import Cluster
from cad_mllm.cluster.apply import apply, delete, in_order, namespace_for
from cad_mllm.cluster.preflight import Reference, check, references
from cad_mllm.cluster.render import Overlay
from cad_mllm.errors import ClusterError, ConfigError
from tests.cluster.conftest import gpu_node, overlay_of, pod_object, smoke_job, smoke_objects
from tests.cluster.standin import ApiServer, Json, status_error

NODES = "get /api/v1/nodes"


def smoke_overlay(**spec: object) -> Overlay:
    """The smoke overlay; `spec` changes the pods' spec."""
    train, volume, job = smoke_objects()
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["spec"] |= copy.deepcopy(spec)
    return overlay_of(train, volume, job)


def refusal(cluster: Cluster, overlay: Overlay) -> str:
    with pytest.raises(ClusterError) as caught:
        check(cluster, overlay, lambda _warning: None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def warnings(cluster: Cluster, overlay: Overlay) -> list[str]:
    warned: list[str] = []
    check(cluster, overlay, warned.append)
    return warned


# --- apply -----------------------------------------------------------------------------------------


def test_everything_is_applied_server_side_and_the_job_last(server: ApiServer, cluster: Cluster) -> None:
    told: list[str] = []
    job = apply(cluster, smoke_overlay(), told.append)
    assert job["metadata"]["uid"]
    assert told == [
        "applied ConfigMap train",
        "applied PersistentVolumeClaim cad-mllm-smoke",
        "applied PyTorchJob cad-mllm-smoke",
    ]
    assert {r.params["fieldManager"] for r in server.asked("PATCH", "")} == {"cad-mllm"}
    applied = server.store.get("PyTorchJob", "cad-mllm-smoke")
    assert applied is not None and applied["spec"] == smoke_job()["spec"]


def test_what_others_stand_on_comes_first() -> None:
    kinds = ["PyTorchJob", "NetworkPolicy", "TrainingRuntime", "PersistentVolumeClaim", "Namespace", "Secret"]
    objects = [{"kind": kind, "metadata": {"name": "x"}} for kind in kinds]
    objects[0]["apiVersion"] = "kubeflow.org/v1"
    assert [item["kind"] for item in in_order(tuple(objects))] == [
        *["Namespace", "Secret", "PersistentVolumeClaim", "NetworkPolicy", "TrainingRuntime", "PyTorchJob"]
    ]


def test_applying_twice_changes_nothing(server: ApiServer, cluster: Cluster) -> None:
    first = apply(cluster, smoke_overlay(), print)
    second = apply(cluster, smoke_overlay(), print)
    assert first["metadata"]["uid"] == second["metadata"]["uid"]


def test_a_field_of_another_manager_is_a_conflict_with_the_remedy(
    server: ApiServer, cluster: Cluster
) -> None:
    apply(cluster, smoke_overlay(), print)
    key = ("pytorchjobs", "training", "cad-mllm-smoke")
    path = ".spec.pytorchReplicaSpecs.Master.replicas"
    server.store.owners[key][path] = "kubectl-edit"
    server.store.objects[key]["spec"]["pytorchReplicaSpecs"]["Master"]["replicas"] = 3
    with pytest.raises(ClusterError) as caught:
        apply(cluster, smoke_overlay(), print)
    message = str(caught.value)
    assert message.startswith(
        'PyTorchJob cad-mllm-smoke: Apply failed with 1 conflict: conflict with "kubectl-edit"'
    )
    assert "kubectl -n training apply --server-side --force-conflicts --field-manager=cad-mllm -k" in message


def test_a_field_that_cannot_be_changed(server: ApiServer, cluster: Cluster) -> None:
    path = "patch /apis/kubeflow.org/v1/namespaces/training/pytorchjobs/cad-mllm-smoke"
    server[path] << 422 << status_error(422, "spec.template: Invalid value: field is immutable")
    with pytest.raises(ClusterError, match=r"delete pytorchjobs\S+ cad-mllm-smoke`, then submit again"):
        apply(cluster, smoke_overlay(), print)


def test_a_job_that_has_ended_is_not_taken_for_a_new_one(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(smoke_job())
    server.store.condition("PyTorchJob", "cad-mllm-smoke", "Succeeded")
    with pytest.raises(
        ClusterError, match=r"is there already and has ended \(succeeded\), nothing would run"
    ):
        apply(cluster, smoke_overlay(), print)
    assert server.asked("PATCH", "") == []


def test_a_namespace_that_does_not_exist(server: ApiServer, cluster: Cluster) -> None:
    server.store.remove("Namespace", "training")
    with pytest.raises(
        ClusterError, match="namespace training does not exist: `kubectl create namespace training`"
    ):
        apply(cluster, smoke_overlay(), print)


def test_the_namespace_is_the_overlays_own_unless_it_names_none() -> None:
    objects = smoke_objects()
    assert namespace_for(overlay_of(*objects), "mine") == "mine"
    assert namespace_for(overlay_of(*objects), None) is None
    for item in objects:
        item["metadata"]["namespace"] = "ours"
    assert namespace_for(overlay_of(*objects), None) == "ours"
    assert namespace_for(overlay_of(*objects), "ours") == "ours"
    with pytest.raises(ConfigError, match="name the namespace ours: leave the flag out"):
        namespace_for(overlay_of(*objects), "mine")
    objects[0]["metadata"]["namespace"] = "theirs"
    with pytest.raises(ConfigError, match=r"several namespaces \(ours, theirs\)"):
        namespace_for(overlay_of(*objects), None)


# --- delete ----------------------------------------------------------------------------------------


def test_everything_is_deleted_and_waited_for(server: ApiServer, cluster: Cluster) -> None:
    apply(cluster, smoke_overlay(), print)
    server.store.put(pod_object("cad-mllm-smoke-master-0", job="cad-mllm-smoke"))
    told: list[str] = []
    delete(cluster, smoke_overlay(), told.append, seconds=5)
    assert told[0] == "deleting PyTorchJob cad-mllm-smoke"
    assert {key[0] for key in server.store.objects} == {"namespaces", "nodes"}
    delete(cluster, smoke_overlay(), told.append, seconds=5)
    assert len(told) == 3, "what is not there is not deleted"


def test_what_does_not_go_is_named(server: ApiServer, cluster: Cluster) -> None:
    claim = "/api/v1/namespaces/training/persistentvolumeclaims/cad-mllm-smoke"
    apply(cluster, smoke_overlay(), print)
    server[f"delete {claim}"] << {"kind": "Status", "status": "Success"}  # a finalizer holds it
    with pytest.raises(ClusterError, match=r"persistentvolumeclaims/cad-mllm-smoke: still there .* describe"):
        delete(cluster, smoke_overlay(), print, seconds=0.1)


# --- before the job is there -----------------------------------------------------------------------


def test_a_cluster_that_has_everything_passes_without_a_word(server: ApiServer, cluster: Cluster) -> None:
    assert warnings(cluster, smoke_overlay()) == []
    assert server.asked("PATCH", "") == []


def test_a_cluster_without_the_crd(server: ApiServer, cluster: Cluster) -> None:
    del server.resources["kubeflow.org/v1/pytorchjobs"]
    assert "the cluster has no PyTorchJob (kubeflow.org/v1), its CRD is missing" in refusal(
        cluster, smoke_overlay()
    )


def test_what_the_pods_need_and_the_overlay_does_not_bring_is_known() -> None:
    overlay = smoke_overlay(
        serviceAccountName="trainer",
        volumes=[
            {"name": "data", "persistentVolumeClaim": {"claimName": "cad-mllm-data"}},
            {"name": "own", "persistentVolumeClaim": {"claimName": "cad-mllm-smoke"}},
            {"name": "tls", "secret": {"secretName": "tls"}},
            {"name": "maybe", "secret": {"secretName": "maybe", "optional": True}},
            {"name": "mix", "projected": {"sources": [{"configMap": {"name": "mixed"}}]}},
        ],
        initContainers=[{"name": "i", "envFrom": [{"secretRef": {"name": "token"}}]}],
    )
    assert references(overlay) == [
        Reference("ConfigMap", "mixed"),
        Reference("PersistentVolumeClaim", "cad-mllm-data"),
        Reference("Secret", "tls"),
        Reference("Secret", "token"),
        Reference("ServiceAccount", "trainer"),
    ]


def test_a_missing_claim_and_a_missing_secret_are_one_line(server: ApiServer, cluster: Cluster) -> None:
    volumes: list[Json] = [
        {"name": "data", "persistentVolumeClaim": {"claimName": "cad-mllm-data"}},
        {"name": "tls", "secret": {"secretName": "tls"}},
    ]
    message = refusal(cluster, smoke_overlay(volumes=volumes))
    assert "namespace training lacks PersistentVolumeClaim cad-mllm-data, Secret tls: " in message
    assert "`kubectl -n training apply -k k8s/overlays/storage` and `kubectl -n training create" in message


def test_secrets_that_may_not_be_seen_are_a_warning(server: ApiServer, cluster: Cluster) -> None:
    detail = 'secrets "tls" is forbidden: User "me" cannot get resource "secrets"'
    server["get /api/v1/namespaces/training/secrets/tls"] << 403 << status_error(403, detail)
    overlay = smoke_overlay(volumes=[{"name": "tls", "secret": {"secretName": "tls"}}])
    assert warnings(cluster, overlay) == [
        "you may not look at Secret tls: whether it is there was not checked"
    ]


def test_a_namespace_that_forbids_the_pod_says_so_before_the_job_is_there(
    server: ApiServer, cluster: Cluster
) -> None:
    server.pod_policy = lambda pod: (
        'pods "x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true'
        if pod["spec"]["containers"][0]["name"] == "pytorch"
        else None
    )
    message = refusal(cluster, smoke_overlay())
    assert (
        'namespace training forbids the pod, it violates PodSecurity "restricted:latest": runAsNonRoot'
        in message
    )
    assert "`kubectl get namespace training --show-labels`" in message
    assert server.store.get("PyTorchJob", "cad-mllm-smoke") is None


def test_a_quota_that_is_used_up_is_a_warning(server: ApiServer, cluster: Cluster) -> None:
    server.pod_policy = lambda _pod: "exceeded quota: gpus"
    (first, *_) = warnings(cluster, smoke_overlay())
    assert first == "a dry run of the pod was refused, the job's own may be as well: exceeded quota: gpus"


def test_a_user_who_may_create_no_pods_is_warned(server: ApiServer, cluster: Cluster) -> None:
    server.pod_policy = lambda _pod: 'User "me" cannot create resource "pods" in API group ""'
    assert "you may not create pods" in warnings(cluster, smoke_overlay())[0]


@pytest.mark.parametrize(
    "node",
    [gpu_node("NVIDIA-A100"), gpu_node(gpus=0), {**gpu_node(), "metadata": {"name": "node-nvidia-l40"}}],
)
def test_no_l40_in_the_cluster_is_a_warning(node: Json, server: ApiServer, cluster: Cluster) -> None:
    server.store.remove("Node", "node-nvidia-l40")
    server.store.put(node)
    (warning,) = warnings(cluster, smoke_overlay())
    assert "no node has 1 nvidia.com/gpu and nvidia.com/gpu.product=NVIDIA-L40" in warning
    assert "`kubectl get nodes -L nvidia.com/gpu.product`" in warning


@pytest.mark.parametrize(
    ("operator", "values", "fits"),
    [
        ("In", ["NVIDIA-L40", "NVIDIA-L40S"], True),
        ("In", ["NVIDIA-L40S"], False),
        ("NotIn", ["NVIDIA-L40S"], True),
        ("NotIn", ["NVIDIA-L40"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
    ],
)
def test_required_affinity_is_understood(
    operator: str, values: list[str], fits: bool, server: ApiServer, cluster: Cluster
) -> None:
    rule = {"key": "nvidia.com/gpu.product", "operator": operator, "values": values}
    terms = {"nodeSelectorTerms": [{"matchExpressions": [rule]}]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}
    warned = warnings(cluster, smoke_overlay(nodeSelector={}, affinity=affinity))
    assert (warned == []) is fits


def test_nodes_that_may_not_be_seen_are_a_warning(server: ApiServer, cluster: Cluster) -> None:
    server[NODES] << 403 << status_error(403, 'User "me" cannot list resource "nodes"')
    assert warnings(cluster, smoke_overlay()) == [
        "you may not look at the nodes: whether one of them has the GPUs was not checked"
    ]


def test_a_job_without_gpus_asks_for_no_nodes(server: ApiServer, cluster: Cluster) -> None:
    train, volume, job = smoke_objects()
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "2Gi"}}
    assert warnings(cluster, overlay_of(train, volume, job)) == []
    assert server.asked("GET", "/nodes") == []
