"""What the API server may answer, and what the user reads then."""

import socket
import time
from pathlib import Path

import pytest
import yaml

from cad_mllm.cluster import api
from cad_mllm.cluster.api import PODS, ApiError, Cluster, Patience, Resource, connect
from cad_mllm.errors import ClusterError, ExitCode
from tests.cluster.conftest import QUICK, job_object, pod_object, write_kubeconfig
from tests.cluster.standin import ApiServer, status_error

POD = "get /api/v1/namespaces/training/pods/p"


def refused(cluster: Cluster) -> str:
    with pytest.raises(ClusterError) as caught:
        cluster.get(PODS, "p")
    message = str(caught.value)
    assert caught.value.exit_code == ExitCode.CLUSTER == 7
    assert "\n" not in message
    return message


# --- answers ---------------------------------------------------------------------------------------


def test_an_object_is_its_json(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(pod_object("p"))
    assert cluster.get(PODS, "p")["metadata"]["name"] == "p"
    request = server.asked("GET", "/pods/p")[0]
    assert request.headers["Authorization"] == "Bearer secret-token"


def test_expired_credentials(server: ApiServer, cluster: Cluster) -> None:
    server[POD] << 401 << status_error(401, "Unauthorized")
    message = refused(cluster)
    assert "does not accept the credentials (401)" in message
    assert "`kubectl -n training auth whoami`" in message
    assert len(server.asked("GET", "/pods/p")) == 1, "asking again does not mend it"


def test_a_kubeconfig_whose_login_helper_gave_nothing(server: ApiServer, cluster: Cluster) -> None:
    detail = 'pods "p" is forbidden: User "system:anonymous" cannot get resource "pods" in API group ""'
    server[POD] << 403 << status_error(403, detail)
    assert "does not accept the credentials (403)" in refused(cluster)


def test_a_right_that_is_missing(server: ApiServer, cluster: Cluster) -> None:
    detail = 'pods "p" is forbidden: User "me" cannot get resource "pods" in API group "" in the namespace'
    server[POD] << 403 << status_error(403, detail)
    message = refused(cluster)
    assert message.startswith(f"not allowed: {detail}")
    assert "`kubectl -n training auth can-i get pods`" in message


def test_an_object_that_is_not_there(server: ApiServer, cluster: Cluster) -> None:
    assert refused(cluster) == 'not found: pods "p" not found: `kubectl -n training get pods`'
    assert cluster.find(PODS, "p") is None


def test_a_server_that_recovers_is_asked_again(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(pod_object("p"))
    server[POD][:2] << 503 << status_error(503, "etcd has no leader")
    assert cluster.get(PODS, "p")["metadata"]["name"] == "p"
    assert len(server.asked("GET", "/pods/p")) == 3


def test_a_server_that_does_not_recover_is_given_up(server: ApiServer, cluster: Cluster) -> None:
    server[POD] << 500 << status_error(500, "etcd is full")
    assert "(500): etcd is full" in refused(cluster)
    assert len(server.asked("GET", "/pods/p")) == QUICK.attempts


def test_retry_after_is_respected(server: ApiServer, cluster: Cluster) -> None:
    server.store.put(pod_object("p"))
    server[POD][:1] << 429 << {"Retry-After": "1"} << status_error(429, "too many requests")
    started = time.monotonic()
    cluster.get(PODS, "p")
    assert time.monotonic() - started >= 1


def test_an_operator_whose_webhook_is_down(server: ApiServer, cluster: Cluster) -> None:
    detail = 'Internal error occurred: failed calling webhook "validator.pytorchjob": connection refused'
    server[POD] << 500 << status_error(500, detail)
    assert "an admission webhook does not answer" in refused(cluster)


def test_something_else_that_speaks_http(server: ApiServer, cluster: Cluster) -> None:
    server[POD] << 200 << b"<html>Welcome to the proxy</html>"
    assert "answers, but not as a Kubernetes API server does" in refused(cluster)


def test_a_dead_server_is_asked_a_few_times_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{port}")))
    message = refused(connect(context=None, namespace=None, patience=QUICK))
    assert message.startswith(f"the API server http://127.0.0.1:{port} does not answer (")
    assert "`kubectl -n training cluster-info`" in message


def test_a_server_that_falls_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen()
        server = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        monkeypatch.setenv("KUBECONFIG", str(write_kubeconfig(tmp_path / "config", server)))
        patience = Patience(attempts=2, first_wait=0.01, request=0.1)
        assert "does not answer" in refused(connect(context=None, namespace=None, patience=patience))


def test_a_certificate_that_is_not_trusted() -> None:
    cluster = Cluster(client=connectable(), namespace="training", context="prod")
    error = cluster._unreachable("SSLError certificate verify failed: self-signed certificate")
    assert "shows a certificate that the kubeconfig does not trust" in str(error)
    assert "`kubectl --context prod -n training config view --minify`" in str(error)


def connectable() -> api.ApiClient:
    return api.ApiClient(api.Configuration(host="https://cluster.example"))


def test_the_pauses_grow_and_end() -> None:
    waits = list(Patience(attempts=7, first_wait=0.5, longest_wait=8).waits())
    assert waits == [0.5, 1, 2, 4, 8, 8]


# --- discovery -------------------------------------------------------------------------------------


def test_where_a_kind_lives_is_asked_once(server: ApiServer, cluster: Cluster) -> None:
    for _ in range(2):
        found = cluster.resource("kubeflow.org/v1", "PyTorchJob")
        assert found.path("training", "x") == "/apis/kubeflow.org/v1/namespaces/training/pytorchjobs/x"
        assert found.full_name == "pytorchjobs.kubeflow.org"
    assert len(server.asked("GET", "/apis/kubeflow.org/v1")) == 1


@pytest.mark.parametrize(
    ("kind", "command"),
    [
        ("PyTorchJob", "-k k8s/operators/training-operator"),
        ("MPIJob", "mpi-operator.yaml"),
        ("TrainJob", "manifests/overlays/manager?ref="),
    ],
)
def test_a_cluster_without_the_crd(kind: str, command: str, server: ApiServer, cluster: Cluster) -> None:
    job = job_object(kind)
    for resource in [r for r in server.resources if "kubeflow" in (r.group or "")]:
        del server.resources[resource]
    with pytest.raises(ClusterError) as caught:
        cluster.resource(job["apiVersion"], kind)
    assert f"the cluster has no {kind}" in str(caught.value)
    assert "kubectl apply --server-side" in str(caught.value) and command in str(caught.value)


def test_a_kind_that_an_installed_group_does_not_have(cluster: Cluster) -> None:
    with pytest.raises(ApiError, match="the cluster has no Poem"):
        cluster.resource("v1", "Poem")


def test_names_are_quoted_in_paths() -> None:
    pods = Resource(api_version="v1", kind="Pod", plural="pods", namespaced=True)
    assert pods.path("a b", "c?d") == "/api/v1/namespaces/a%20b/pods/c%3Fd"


# --- the kubeconfig --------------------------------------------------------------------------------


def test_the_namespace_is_the_flags_else_the_contexts_else_default(kubeconfig: Path) -> None:
    assert connect(context=None, namespace="mine").namespace == "mine"
    assert connect(context=None, namespace=None).namespace == "training"
    assert connect(context="bare", namespace=None).namespace == "default"


def test_no_kubeconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "nowhere"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(ClusterError, match=r"no kubeconfig at .*nowhere: fetch it") as caught:
        connect(context=None, namespace=None)
    assert "export KUBECONFIG=FILE" in str(caught.value)


def test_a_context_that_the_kubeconfig_does_not_have(kubeconfig: Path) -> None:
    with pytest.raises(ClusterError, match="--context there: the kubeconfig has here, bare"):
        connect(context="there", namespace=None)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "not: [valid",
        "just text",
        yaml.safe_dump({"contexts": [], "current-context": "x"}),
        yaml.safe_dump({"contexts": [{"name": "x", "context": {"cluster": "gone"}}], "current-context": "x"}),
    ],
)
def test_a_kubeconfig_that_is_damaged(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config"
    path.write_text(content)
    monkeypatch.setenv("KUBECONFIG", str(path))
    with pytest.raises(ClusterError, match="is not usable") as caught:
        connect(context=None, namespace=None)
    assert "\n" not in str(caught.value)
