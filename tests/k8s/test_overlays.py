"""Every overlay renders and holds to every rule."""

import pytest

from tests.k8s.manifests import (
    JOBS,
    NAMES,
    ROOT,
    STORAGE,
    TRAINING,
    Json,
    leaves,
    needs_kubectl,
    of_kind,
    pods_of,
    render,
)
from tests.k8s.rules import RULES, faults, names, schema

pytestmark = needs_kubectl


def test_the_overlays_are_these() -> None:
    assert sorted([*JOBS, *STORAGE]) == NAMES
    assert len(TRAINING) == 16


@pytest.mark.parametrize("name", JOBS)
def test_an_overlay_holds_to_every_rule(name: str) -> None:
    assert faults(render(name)) == []


@pytest.mark.parametrize("name", JOBS)
def test_an_overlay_is_named_after_its_folder(name: str) -> None:
    objects = render(name)
    assert {item["metadata"]["labels"]["app.kubernetes.io/instance"] for item in objects} == {name}
    jobs = [item for item in objects if item["kind"] in ("PyTorchJob", "MPIJob", "TrainJob", "Job")]
    assert [item["metadata"]["name"] for item in jobs] == [f"cad-mllm-{name}"]
    for pod in pods_of(objects):
        assert pod.template["metadata"]["labels"]["app.kubernetes.io/instance"] == name


@pytest.mark.parametrize("name", STORAGE)
def test_the_storage_overlays_make_the_claims_that_the_jobs_name(name: str) -> None:
    objects = render(name)
    assert [*schema(objects), *names(objects)] == []
    claims = {item["metadata"]["name"]: item["spec"] for item in objects}
    assert set(claims) == {"cad-mllm-data", "cad-mllm-models", "cad-mllm-outputs"}
    for spec in claims.values():
        assert spec["accessModes"] == ["ReadWriteMany" if name == "storage" else "ReadWriteOnce"]
        # Without ReadWriteMany the cluster's default class does; with it, the person names one.
        assert ("storageClassName" in spec) == (name == "storage")


@pytest.mark.parametrize("name", ["smoke", "smoke-cpu"])
def test_a_smoke_job_brings_its_own_volume(name: str) -> None:
    objects = render(name)
    claim = of_kind(objects, "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == f"cad-mllm-outputs-{name}"
    # Pods on several nodes need ReadWriteMany; on one node, anything does.
    assert claim["spec"]["accessModes"] == ["ReadWriteMany" if name == "smoke" else "ReadWriteOnce"]
    for pod in pods_of(objects):
        near = pod.spec.get("affinity", {}).get("podAffinity", {})
        required = near.get("requiredDuringSchedulingIgnoredDuringExecution", [])
        assert [term["topologyKey"] for term in required] == (
            ["kubernetes.io/hostname"] if name == "smoke-cpu" else []
        )
        claims = [
            v["persistentVolumeClaim"]["claimName"]
            for v in pod.spec["volumes"]
            if "persistentVolumeClaim" in v
        ]
        assert claims == [f"cad-mllm-outputs-{name}"]


def test_two_overlays_share_no_object_but_the_volumes() -> None:
    """`kubectl delete -k` of one must not take away what another one uses."""
    seen: dict[tuple[str, str], str] = {}
    for name in JOBS:
        for item in render(name):
            key = (item["kind"], item["metadata"]["name"])
            assert key not in seen, f"{key} is in {seen[key]} and in {name}"
            seen[key] = name


def test_every_rule_is_asked_of_something() -> None:
    """A rule that meets nothing of its kind would never complain."""
    kinds = {item["kind"] for name in JOBS for item in render(name)}
    assert kinds >= {
        "PyTorchJob",
        "MPIJob",
        "TrainJob",
        "TrainingRuntime",
        "Job",
        "NetworkPolicy",
        "ConfigMap",
    }
    assert len(RULES) == 16


@pytest.mark.parametrize("name", JOBS)
def test_no_manifest_names_a_machine_or_a_registry(name: str) -> None:
    """The image's name is `make k8s-image`'s to write; hosts are the cluster's."""
    objects: list[Json] = render(name)
    images = {value for item in objects for path, value in leaves(item) if path.endswith("/image")}
    assert images == {"cad-mllm:latest-cpu" if name == "smoke-cpu" else "cad-mllm:latest"}
    assert (ROOT / "k8s/components/image/kustomization.yaml").is_file()
