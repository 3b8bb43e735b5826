"""`make k8s-image IMAGE= TAG=` writes the image's name into every overlay."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.k8s.manifests import JOBS, copy_project, needs_kubectl, pods_of, render_folder

pytestmark = [
    needs_kubectl,
    pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed"),
]


def name_image(project: Path, *variables: str) -> str:
    done = subprocess.run(
        ["make", "k8s-image", *variables], cwd=project, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def contents(project: Path) -> dict[Path, str]:
    return {
        path.relative_to(project): path.read_text() for path in (project / "k8s").rglob("*") if path.is_file()
    }


def images(project: Path, overlay: str) -> set[tuple[str, str | None]]:
    """(image, what the provenance will say) of every container that has both, and images of the others."""
    found: set[tuple[str, str | None]] = set()
    for pod in pods_of(render_folder(project / "k8s/overlays" / overlay)):
        found |= {(container["image"], pod.env["CAD_MLLM_IMAGE"]) for container in pod.containers}
    return found


def test_the_name_reaches_every_container_of_every_overlay(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    said = name_image(project, "IMAGE=registry.example.com:5000/team/cad-mllm", "TAG=1.0")
    assert "registry.example.com:5000/team/cad-mllm:1.0" in said
    for overlay in JOBS:
        tag = "1.0-cpu" if overlay == "smoke-cpu" else "1.0"
        name = f"registry.example.com:5000/team/cad-mllm:{tag}"
        assert images(project, overlay) == {(name, name)}, overlay


def test_it_can_be_said_again_and_differently(tmp_path: Path) -> None:
    project = copy_project(tmp_path)
    before = contents(project)
    name_image(project, "IMAGE=registry.example.com/a", "TAG=v1")
    once = contents(project)
    name_image(project, "IMAGE=registry.example.com/a", "TAG=v1")
    assert contents(project) == once != before
    name_image(project)
    assert contents(project) == before, "the defaults are what is in the repository"


def test_make_alone_lists_it(tmp_path: Path) -> None:
    listed = subprocess.run(["make"], cwd=copy_project(tmp_path), capture_output=True, text=True, check=True)
    assert "\n  make k8s-image  " in listed.stdout
