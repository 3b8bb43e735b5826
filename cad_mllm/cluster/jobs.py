"""The kinds of job that an overlay may hold: where they live, which pods are theirs, who is rank 0."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]
"""A Kubernetes object, or a part of one, as the API server says it."""

_JOB_NAME = "training.kubeflow.org/job-name"
_INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass(frozen=True, kw_only=True)
class JobKind:
    """One kind of job, and the contract of the operator behind it (labels, containers)."""

    kind: str
    api_version: str
    pod_label: str
    """Carried by every pod of the job, with the job's name as its value."""
    rank0: Mapping[str, str]
    """Labels that single out the pod of rank 0; a label that a pod lacks does not count against it."""
    container: str | None
    """The trainer's container in that pod. None: its first."""
    install: str | None
    """The command that brings the CRD and its operator into a cluster. None: every cluster has it."""

    def selector(self, name: str) -> str:
        """Label selector of all pods of the job."""
        return f"{self.pod_label}={name}"

    def is_rank0(self, pod: Json) -> bool:
        """Whether this pod of the job runs rank 0 (for an MPIJob: the launcher, which prints for it)."""
        labels = pod["metadata"].get("labels") or {}
        return all(labels.get(key, value) == value for key, value in self.rank0.items())

    def trainer_container(self, pod: Json) -> str:
        """Name of the container that trains."""
        names: list[str] = [container["name"] for container in pod["spec"]["containers"]]
        return self.container if self.container in names else names[0]


KINDS = (
    JobKind(
        kind="PyTorchJob",
        api_version="kubeflow.org/v1",
        pod_label=_JOB_NAME,
        rank0={"training.kubeflow.org/replica-type": "master"},
        container="pytorch",
        install="kubectl apply --server-side -k k8s/operators/training-operator",
    ),
    JobKind(
        kind="MPIJob",
        api_version="kubeflow.org/v2beta1",
        pod_label=_JOB_NAME,
        rank0={"training.kubeflow.org/job-role": "launcher"},
        container=None,
        install="kubectl apply --server-side -f "
        "https://raw.githubusercontent.com/kubeflow/mpi-operator/v0.8.2/deploy/v2beta1/mpi-operator.yaml",
    ),
    JobKind(
        kind="TrainJob",
        api_version="trainer.kubeflow.org/v1alpha1",
        pod_label="jobset.sigs.k8s.io/jobset-name",
        rank0={"jobset.sigs.k8s.io/replicatedjob-name": "node", _INDEX: "0"},
        container="node",
        install="kubectl apply --server-side -k "
        "'github.com/kubeflow/trainer.git/manifests/overlays/manager?ref=v2.2.0'",
    ),
    JobKind(
        kind="Job",
        api_version="batch/v1",
        pod_label="batch.kubernetes.io/job-name",
        rank0={_INDEX: "0"},
        container=None,
        install=None,
    ),
)


def kind_of(item: Json) -> JobKind | None:
    """The kind of job that an object is, or None. MPIJob exists in two versions: ours is v2beta1."""
    for kind in KINDS:
        if (item.get("apiVersion"), item.get("kind")) == (kind.api_version, kind.kind):
            return kind
    return None
