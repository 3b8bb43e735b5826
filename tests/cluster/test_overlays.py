"""The shipped overlays, through the client: each can be submitted, and the smoke ones are for `smoke`."""

from pathlib import Path

import pytest

from cad_mllm.cluster.api import Cluster
from cad_mllm.cluster.apply import apply, delete
from cad_mllm.cluster.preflight import check, references
from cad_mllm.cluster.render import render, world_size
from cad_mllm.cluster.smoke import save_steps
from tests.cluster.conftest import needs_kubectl
from tests.cluster.standin import ApiServer

OVERLAYS = sorted(
    path.parent
    for path in (Path(__file__).resolve().parents[2] / "k8s/overlays").glob("*/kustomization.yaml")
    if not path.parent.name.startswith("storage")  # volumes alone: `kubectl apply -k`
)
pytestmark = needs_kubectl


def name_of(path: Path) -> str:
    return path.name


def test_there_are_overlays() -> None:
    names = {path.name for path in OVERLAYS}
    assert names >= {"zero2", "zero3", "zero3-offload", "smoke", "smoke-cpu", "mpi-zero3", "trainjob-zero3"}


@pytest.mark.parametrize("path", OVERLAYS, ids=name_of)
def test_an_overlay_is_checked_applied_and_deleted(path: Path, server: ApiServer, cluster: Cluster) -> None:
    overlay = render(path)
    for needed in references(overlay):
        assert needed.kind == "PersistentVolumeClaim", "everything else comes with the overlay"
        server.store.put({"apiVersion": "v1", "kind": needed.kind, "metadata": {"name": needed.name}})
    before = set(server.store.objects)
    warned: list[str] = []
    check(cluster, overlay, warned.append)
    assert warned == []
    job = apply(cluster, overlay, lambda _line: None)
    assert job["metadata"]["name"] == f"cad-mllm-{path.name}"
    assert len(server.store.objects) == len(before) + len(overlay.objects)
    delete(cluster, overlay, lambda _line: None, seconds=5)
    assert set(server.store.objects) == before


@pytest.mark.parametrize("path", [p for p in OVERLAYS if p.name.startswith("smoke")], ids=name_of)
def test_a_smoke_overlay_is_one_that_smoke_takes(path: Path) -> None:
    overlay = render(path)
    assert overlay.job["metadata"]["labels"]["app.kubernetes.io/instance"] == path.name
    assert world_size(overlay) == 2
    assert save_steps(overlay) >= 1
    assert references(overlay) == [], "it brings everything that it needs"
