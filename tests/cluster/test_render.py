"""`kubectl kustomize`, and what an overlay must hold."""

import stat
from pathlib import Path

import pytest

from cad_mllm.cluster.render import pod_templates, render, world_size
from cad_mllm.errors import ConfigError, PreflightError
from tests.cluster.conftest import SMOKE, needs_kubectl, overlay_of, smoke_job, smoke_objects
from tests.cluster.standin import Json


def write(folder: Path, resource: str) -> Path:
    (folder / "kustomization.yaml").write_text("resources: [all.yaml]\n")
    (folder / "all.yaml").write_text(resource)
    return folder


@needs_kubectl
def test_an_overlay_is_its_objects_and_its_job() -> None:
    overlay = render(SMOKE)
    assert {item["kind"] for item in overlay.objects} == {"ConfigMap", "PersistentVolumeClaim", "PyTorchJob"}
    assert overlay.name == "cad-mllm-smoke"
    assert overlay.kind.kind == "PyTorchJob"
    assert world_size(overlay) == 2


@needs_kubectl
def test_the_objects_of_the_tests_are_those_that_kubectl_renders() -> None:
    rendered = sorted(render(SMOKE).objects, key=lambda item: item["kind"])
    assert rendered == sorted(smoke_objects(), key=lambda item: item["kind"])


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        render(tmp_path / "nowhere")


def test_a_folder_that_is_no_overlay(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no kustomization\.yaml"):
        render(tmp_path)


def test_without_kubectl(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(PreflightError, match="kubectl is not on the PATH: install it"):
        render(SMOKE)


@needs_kubectl
def test_an_overlay_that_does_not_render(tmp_path: Path) -> None:
    (tmp_path / "kustomization.yaml").write_text("resources: [gone.yaml]\n")
    with pytest.raises(ConfigError) as caught:
        render(tmp_path)
    assert "gone.yaml" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("a: [", "YAML that does not parse"),
        ("- just\n- a list", "no Kubernetes object"),
        ("kind: ConfigMap", "no Kubernetes object"),
        ("", "must render to one job (PyTorchJob, MPIJob, TrainJob, Job), it has none"),
    ],
)
def test_what_kubectl_prints_is_looked_at(
    printed: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f"#!/bin/sh\ncat <<'END'\n{printed}\nEND\n")
    kubectl.chmod(kubectl.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(ConfigError) as caught:
        render(SMOKE)
    assert words in str(caught.value) and "\n" not in str(caught.value)


@needs_kubectl
def test_two_jobs_are_one_too_many(tmp_path: Path) -> None:
    job = "apiVersion: batch/v1\nkind: Job\nmetadata: {name: %s}\n"
    with pytest.raises(ConfigError, match="it has Job a, Job b"):
        render(write(tmp_path, "---\n".join([job % "a", job % "b"])))


def test_the_templates_of_every_kind_are_found() -> None:
    template: Json = {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "x"}]}}
    jobset = {"spec": {"replicatedJobs": [{"name": "node", "template": {"spec": {"template": template}}}]}}
    for item in (
        {"kind": "PyTorchJob", "spec": {"pytorchReplicaSpecs": {"Master": {"template": template}}}},
        {"kind": "MPIJob", "spec": {"mpiReplicaSpecs": {"Worker": {"replicas": 2, "template": template}}}},
        {"kind": "TrainingRuntime", "spec": {"template": jobset}},
        {"kind": "Job", "spec": {"template": template}},
    ):
        assert list(pod_templates(item)) == [template], item["kind"]
    assert list(pod_templates({"kind": "ConfigMap", "data": {"spec": "containers"}})) == []


def test_a_world_size_must_be_said_and_be_one() -> None:
    job = smoke_job()
    env = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"][0]["env"]
    env[0]["value"] = "4"
    job["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]["env"] = [
        {"name": "CAD_MLLM_WORLD_SIZE", "value": "2"}
    ]
    with pytest.raises(
        ConfigError, match="CAD_MLLM_WORLD_SIZE must be one number in the job's env, it says 2, 4"
    ):
        world_size(overlay_of(job))
    job["spec"] = {"pytorchReplicaSpecs": {}}
    with pytest.raises(ConfigError, match="nothing"):
        world_size(overlay_of(job))
