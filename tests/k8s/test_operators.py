"""What we change of the training operator, on a stand-in for its manifests: kubectl fetches them with git."""

import shutil
from pathlib import Path

import pytest
import yaml

from tests.k8s.manifests import ROOT, Json, Pod, needs_kubectl, render_folder
from tests.k8s.rules import RULES

pytestmark = needs_kubectl

FOLDER = ROOT / "k8s/operators/training-operator"
CRD = """\
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {{name: {}.kubeflow.org}}
"""
# As in kubeflow/trainer v1.9, manifests/base: names, and what the patches touch.
DEPLOYMENT = """\
apiVersion: apps/v1
kind: Deployment
metadata: {name: training-operator, namespace: kubeflow}
spec:
  selector: {matchLabels: {control-plane: kubeflow-training-operator}}
  template:
    metadata: {labels: {control-plane: kubeflow-training-operator}}
    spec:
      containers:
      - name: training-operator
        image: kubeflow/training-operator
        command: [/manager]
        volumeMounts:
        - {name: cert, mountPath: /tmp/cert, readOnly: true}
      volumes:
      - name: cert
        secret: {secretName: training-operator-webhook-cert}
"""


@pytest.fixture(name="objects")
def rendered(tmp_path: Path) -> list[Json]:
    base, folder = tmp_path / "base", tmp_path / "training-operator"
    shutil.copytree(FOLDER, folder)
    base.mkdir()
    base.joinpath("all.yaml").write_text(
        "---\n".join([DEPLOYMENT, CRD.format("mpijobs"), CRD.format("pytorchjobs")])
    )
    base.joinpath("kustomization.yaml").write_text("resources: [all.yaml]\n")
    path = folder / "kustomization.yaml"
    content = yaml.safe_load(path.read_text())
    (remote,) = content["resources"]
    assert remote == "https://github.com/kubeflow/trainer//manifests/overlays/standalone?ref=v1.9.4"
    path.write_text(yaml.safe_dump({**content, "resources": ["../base"]}))
    return render_folder(folder)


def one(objects: list[Json], kind: str) -> Json:
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def test_it_is_for_pytorchjobs_alone(objects: list[Json]) -> None:
    """The MPI operator ships a CRD of the same name in another version."""
    assert one(objects, "CustomResourceDefinition")["metadata"]["name"] == "pytorchjobs.kubeflow.org"
    (container,) = one(objects, "Deployment")["spec"]["template"]["spec"]["containers"]
    assert container["args"][0] == "--enable-scheme=pytorchjob"
    assert container["command"] == ["/manager"]
    assert [mount["name"] for mount in container["volumeMounts"]] == ["init-container", "cert"]


def test_its_init_container_may_enter_a_restricted_namespace(objects: list[Json]) -> None:
    deployment, config = one(objects, "Deployment"), one(objects, "ConfigMap")
    spec = deployment["spec"]["template"]["spec"]
    (file,) = config["data"]
    (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "init-container")
    assert volume["configMap"]["name"] == config["metadata"]["name"]
    assert spec["containers"][0]["args"][1] == f"--pytorch-init-container-template-file=/etc/cad-mllm/{file}"

    text = config["data"][file]
    for field, value in (
        ("{{.InitContainerImage}}", "alpine:3.10"),
        ("{{.MasterAddr}}", "cad-mllm-zero3-master-0"),
        ("{{.MaxTries}}", "100"),
    ):
        assert field in text
        text = text.replace(field, value)
    assert "{{" not in text
    (container,) = yaml.safe_load(text)
    template = {"metadata": {"labels": {}}, "spec": {"containers": [container]}}
    job = {"kind": "Job", "spec": {"template": template}}
    assert Pod("job", 1, template).main["name"] == "init-pytorch"
    assert list(RULES["restricted"]([job])) == []
