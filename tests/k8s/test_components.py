"""The components that no shipped overlay uses: each works on every kind of job that it says it is for."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.k8s.manifests import (
    NAMES,
    OVERLAYS,
    ROOT,
    Json,
    copy_project,
    job_of,
    needs_kubectl,
    of_kind,
    pods_of,
    render,
    render_folder,
)
from tests.k8s.rules import RULES, faults

pytestmark = needs_kubectl

COMPONENTS = ROOT / "k8s/components"
OPTIONAL = (
    "gpu/l40s",
    "monitoring",
    "nccl/p2p-off",
    "nccl/rdma",
    "priority",
    "queue/kueue",
    "queue/volcano",
    "wandb",
)
BASES = ("zero3", "zero3-1x4", "mpi-zero3", "trainjob-zero3")


def with_components(project: Path, overlay: str, *names: str) -> list[Json]:
    """The overlay with more components, as a person would write them into a copy of it."""
    path = project / "k8s/overlays" / overlay / "kustomization.yaml"
    more = "".join(f"- ../../components/{name}\n" for name in names)
    path.write_text(path.read_text().replace("transformers:", f"{more}transformers:"))
    return render_folder(path.parent)


def test_every_component_is_in_an_overlay_or_tested_here() -> None:
    used = set(OPTIONAL)
    for name in NAMES:
        lines = (OVERLAYS / name / "kustomization.yaml").read_text().splitlines()
        used |= {line.removeprefix("- ../../components/") for line in lines if "components/" in line}
    there = {
        path.parent.relative_to(COMPONENTS).as_posix() for path in COMPONENTS.rglob("kustomization.yaml")
    }
    assert there == used


@pytest.mark.parametrize("overlay", BASES)
def test_all_of_them_together_hold_to_every_rule(overlay: str, tmp_path: Path) -> None:
    both_gpus = [name for name in OPTIONAL if name != "gpu/l40s"]
    objects = with_components(copy_project(tmp_path), overlay, *both_gpus)
    assert faults(objects) == []


@pytest.mark.parametrize("overlay", BASES)
def test_they_reach_the_pods_of_the_ranks(overlay: str, tmp_path: Path) -> None:
    objects = with_components(copy_project(tmp_path), overlay, *OPTIONAL)
    for pod in pods_of(objects):
        if pod.role != "Launcher":
            assert pod.main["resources"]["limits"]["rdma/rdma_shared_device_a"] == 1
        assert pod.env["NCCL_IB_DISABLE"] == "0", "RDMA over what nccl/tcp says"
        assert pod.env["NCCL_P2P_DISABLE"] == "1"
        assert pod.spec["priorityClassName"] == "cad-mllm"
        assert pod.spec["schedulerName"] == "volcano"
        if "args" in pod.main:
            assert pod.main["args"][-1] == "--use_wandb"
        (term,) = pod.spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][
            "nodeSelectorTerms"
        ]
        # A list without merge keys: the component that comes last wins.
        assert term["matchExpressions"][0]["values"] == ["NVIDIA-L40S"]


@pytest.mark.parametrize("overlay", [*BASES, "prepare-data"])
def test_kueue_finds_the_job_and_nothing_else(overlay: str, tmp_path: Path) -> None:
    objects = with_components(copy_project(tmp_path), overlay, "queue/kueue")
    queued = [
        item["kind"] for item in objects if "kueue.x-k8s.io/queue-name" in item["metadata"].get("labels", {})
    ]
    assert queued == [job_of(objects)["kind"]]
    assert list(RULES["schema"](objects)) == []


@pytest.mark.parametrize(
    ("overlay", "kind", "path", "value"),
    [
        ("zero3", "PyTorchJob", ("runPolicy", "schedulingPolicy"), {"queue": "default"}),
        ("mpi-zero3", "MPIJob", ("runPolicy", "schedulingPolicy"), {"queue": "default"}),
        ("trainjob-zero3", "TrainingRuntime", ("podGroupPolicy",), {"volcano": {}}),
    ],
)
def test_volcano_schedules_the_gang(
    overlay: str, kind: str, path: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    objects = with_components(copy_project(tmp_path), overlay, "queue/volcano")
    found: Any = of_kind(objects, kind)["spec"]
    for key in path:
        found = found[key]
    assert found == value
    assert list(RULES["schema"](objects)) == []


def test_the_alerts_are_on_pods_of_these_jobs(tmp_path: Path) -> None:
    objects = with_components(copy_project(tmp_path), "zero3", "monitoring")
    (group,) = of_kind(objects, "PrometheusRule")["spec"]["groups"]
    assert job_of(objects)["metadata"]["name"].startswith("cad-mllm-")
    for rule in group["rules"]:
        assert rule["expr"].count("{") == rule["expr"].count("}") > 0
        assert 'pod=~"cad-mllm-.*"' in rule["expr"]


def test_a_smoke_overlay_needs_no_component_of_its_own() -> None:
    """The two differ in what they run on, not in what they train."""
    flags = [pods_of(render(name))[0].main["args"] for name in ("smoke", "smoke-cpu")]
    at = flags[1].index("--deepspeed")
    assert flags[0][2:at] == flags[1][2:at]


def test_an_overlay_of_ones_own_is_a_copy_with_another_name(tmp_path: Path) -> None:
    """As the README says: copy the folder, name it, add components and patches of the pod."""
    project = copy_project(tmp_path)
    mine = project / "k8s/overlays/mine"
    shutil.copytree(project / "k8s/overlays/zero3-1x4", mine)
    path = mine / "kustomization.yaml"
    patch = (
        "- target: {kind: PodTemplate}\n"
        "  patch: |-\n"
        "    - {op: add, path: /template/spec/hostname, value: trainer}\n"
    )
    path.write_text(
        path.read_text()
        .replace("zero3-1x4", "mine")
        .replace("transformers:", f"- ../../components/wandb\npatches:\n{patch}transformers:")
    )
    objects = render_folder(mine)
    assert faults(objects) == []
    (pod,) = pods_of(objects)
    assert pod.spec["hostname"] == "trainer"
    assert pod.main["args"][1] == "/outputs/cad-mllm-mine"
    assert pod.main["args"][-1] == "--use_wandb"
