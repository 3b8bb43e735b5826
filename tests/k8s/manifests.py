"""Overlays, rendered by `kubectl kustomize` as `kubectl apply -k` does it, and a way to look into them."""

import copy
import functools
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
OVERLAYS = ROOT / "k8s/overlays"
NAMES = sorted(path.parent.relative_to(OVERLAYS).as_posix() for path in OVERLAYS.rglob("kustomization.yaml"))

VARIANTS = ("zero2", "zero3", "zero3-resident", "zero3-offload")
TRAINING = tuple(
    name for zero in VARIANTS for name in (zero, f"{zero}-1x4", f"mpi-{zero}", f"trainjob-{zero}")
)
SMOKE = ("smoke", "smoke-cpu")
PREPARE = ("prepare-data", "prepare-model")
STORAGE = ("storage", "storage-rwo")
JOBS = (*TRAINING, *SMOKE, *PREPARE)

Json = dict[str, Any]

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed: nothing can be rendered"
)


@dataclass(frozen=True)
class Pod:
    """The template of some pods of a job."""

    role: str
    """Master, Worker, Launcher, node or job."""
    count: int
    template: Json

    @property
    def spec(self) -> Json:
        spec: Json = self.template["spec"]
        return spec

    @property
    def main(self) -> Json:
        """The container that trains (or runs sshd, or prepares)."""
        (container,) = self.spec["containers"]
        assert isinstance(container, dict)
        return container

    @property
    def containers(self) -> list[Json]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def env(self) -> dict[str, str | None]:
        """Of the main container; None where the value comes from elsewhere."""
        return {variable["name"]: variable.get("value") for variable in self.main.get("env", [])}

    @property
    def ranks(self) -> bool:
        """Whether ranks run in it."""
        return self.role in ("Master", "Worker", "node")

    @property
    def gpus(self) -> int:
        return int(self.main["resources"]["limits"].get("nvidia.com/gpu", 0))


def run_kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, timeout=60)


def render_folder(folder: Path) -> list[Json]:
    """The objects of an overlay anywhere; kustomize must have nothing to warn of."""
    done = run_kustomize(folder)
    assert (done.returncode, done.stderr) == (0, "")
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader))


@functools.cache
def _objects(name: str) -> list[Json]:
    return render_folder(OVERLAYS / name)


def render(name: str) -> list[Json]:
    """The objects of a shipped overlay; the caller may change them."""
    return copy.deepcopy(_objects(name))


def of_kind(objects: list[Json], kind: str) -> Json:
    """The only object of this kind."""
    (found,) = (item for item in objects if item["kind"] == kind)
    return found


def job_of(objects: list[Json]) -> Json:
    """The job among the objects."""
    (found,) = (item for item in objects if item["kind"] in ("PyTorchJob", "MPIJob", "TrainJob", "Job"))
    return found


def pods_of(objects: list[Json]) -> list[Pod]:
    """Every pod template among the objects."""
    pods = []
    for item in objects:
        spec = item.get("spec", {})
        if item["kind"] in ("PyTorchJob", "MPIJob"):
            replicas = spec.get("pytorchReplicaSpecs") or spec.get("mpiReplicaSpecs")
            pods += [Pod(role, one.get("replicas", 1), one["template"]) for role, one in replicas.items()]
        elif item["kind"] == "TrainingRuntime":
            nodes = spec["mlPolicy"]["numNodes"]
            pods += [
                Pod(one["name"], nodes, one["template"]["spec"]["template"])
                for one in spec["template"]["spec"]["replicatedJobs"]
            ]
        elif item["kind"] == "Job":
            pods.append(Pod("job", spec.get("parallelism", 1), spec["template"]))
    return pods


_SUFFIXES = {
    "": 1,
    "m": 1e-3,
    "k": 1e3,
    "M": 1e6,
    "G": 1e9,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def quantity(value: str | int) -> float:
    """A Kubernetes quantity as a number: 2Gi, 500m, 4."""
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(value))
    assert match is not None, f"{value!r} is no quantity"
    return float(match[1]) * _SUFFIXES[match[2]]


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every scalar; elements of lists of named things go by their names."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}/{key}")
    elif isinstance(node, list):
        for number, value in enumerate(node):
            name = value.get("name") or value.get("mountPath") if isinstance(value, dict) else None
            yield from leaves(value, f"{path}/{number if name is None else name}")
    else:
        yield path, node


def copy_project(target: Path) -> Path:
    """What `kubectl kustomize` and `make k8s-image` need of the repository, where it may be changed."""
    for name in ("k8s", "configs"):
        shutil.copytree(ROOT / name, target / name)
    shutil.copy(ROOT / "Makefile", target)
    return target
