"""A stand-in for a cluster, a kubeconfig that leads to it, and a client that does not wait long."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from cad_mllm.cluster import api
from cad_mllm.cluster.api import Cluster, Patience, connect
from cad_mllm.cluster.jobs import kind_of
from cad_mllm.cluster.render import Overlay
from tests.cluster.standin import NAMESPACE, ApiServer, Json, serving

SMOKE = Path(__file__).parent / "overlays" / "smoke"
QUICK = Patience(
    attempts=4, first_wait=0.02, longest_wait=0.1, request=5, watch=3, quiet_log=2, poll=0.02, stuck=0.3
)

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")


@pytest.fixture
def server() -> Iterator[ApiServer]:
    server = ApiServer()
    server.store.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})
    server.store.put(gpu_node())
    yield server


@pytest.fixture
def url(server: ApiServer) -> Iterator[str]:
    with serving(server) as url:
        yield url


@pytest.fixture
def kubeconfig(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = write_kubeconfig(tmp_path / "kubeconfig", url)
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setattr(api, "Patience", lambda: QUICK)
    return path


@pytest.fixture
def cluster(kubeconfig: Path) -> Cluster:
    return connect(context=None, namespace=None)


def write_kubeconfig(path: Path, url: str) -> Path:
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "standin", "cluster": {"server": url}}],
        "users": [{"name": "me", "user": {"token": "secret-token"}}],
        "contexts": [
            {"name": "here", "context": {"cluster": "standin", "user": "me", "namespace": NAMESPACE}},
            {"name": "bare", "context": {"cluster": "standin", "user": "me"}},
        ],
    }
    path.write_text(yaml.safe_dump(content))
    return path


def gpu_node(product: str = "NVIDIA-L40", gpus: int = 4) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": f"node-{product.lower()}", "labels": {"nvidia.com/gpu.product": product}},
        "status": {"allocatable": {"nvidia.com/gpu": str(gpus)}},
    }


def smoke_job() -> Json:
    """The job of the smoke overlay next door, to be broken by a test."""
    job: Json = yaml.safe_load((SMOKE / "job.yaml").read_text())
    return copy_of(job)


def copy_of(item: Json) -> Json:
    """A copy in which nothing is shared, as YAML anchors are."""
    copied: Json = json.loads(json.dumps(item))
    return copied


def smoke_objects() -> list[Json]:
    """What that overlay renders to, without kubectl."""
    volume = yaml.safe_load((SMOKE / "volume.yaml").read_text())
    data = {"train.yaml": (SMOKE / "train.yaml").read_text()}
    train = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "train"}, "data": data}
    return [train, volume, smoke_job()]


def overlay_of(*objects: Json) -> Overlay:
    """An overlay without a folder; its job is the one job among the objects."""
    job = next(item for item in objects if kind_of(item) is not None)
    kind = kind_of(job)
    assert kind is not None
    return Overlay(path=Path("k8s/overlays/test"), objects=objects, job=job, kind=kind)


def job_object(kind: str = "PyTorchJob", name: str = "cad-mllm-zero3") -> Json:
    versions = {
        "PyTorchJob": "kubeflow.org/v1",
        "MPIJob": "kubeflow.org/v2beta1",
        "TrainJob": "trainer.kubeflow.org/v1alpha1",
        "Job": "batch/v1",
    }
    return {"apiVersion": versions[kind], "kind": kind, "metadata": {"name": name}, "spec": {}}


def pod_object(
    name: str, *, job: str = "cad-mllm-zero3", role: str = "master", phase: str = "Running", **status: object
) -> Json:
    """A pod as the training operator makes it."""
    started = {"name": "pytorch", "image": "cad-mllm:latest", "state": {"running": {}}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "labels": {
                "training.kubeflow.org/job-name": job,
                "training.kubeflow.org/replica-type": role,
            },
        },
        "spec": {"nodeName": "node-a", "containers": [{"name": "pytorch"}]},
        "status": {
            "phase": phase,
            "containerStatuses": [started] if phase == "Running" else [],
            **status,
        },
    }


def ended_container(code: int, reason: str = "Error", finished: str = "2026-01-01T00:00:00Z") -> list[Json]:
    """containerStatuses of a trainer that has exited."""
    end = {"exitCode": code, "reason": reason, "finishedAt": finished}
    return [{"name": "pytorch", "image": "cad-mllm:latest", "state": {"terminated": end}}]


def event_object(
    reason: str, message: str, *, kind: str = "PyTorchJob", name: str = "cad-mllm-zero3"
) -> Json:
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{reason.lower()}"},
        "type": "Warning",
        "reason": reason,
        "message": message,
        "lastTimestamp": "2099-01-01T00:00:00Z",
        "involvedObject": {"kind": kind, "name": name},
    }
