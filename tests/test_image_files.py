"""What the image is built with, as far as it can be seen without building it."""

import importlib.util
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCKERFILE = (ROOT / "docker/Dockerfile").read_text()
INSTRUCTIONS = [
    re.sub(r"\s+", " ", text)
    for text in re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    if text.strip()
]


def module_at(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shown_by_make(*argv: str) -> str:
    """The command that make would run, on one line; the environment names no image of its own."""
    env = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME")}
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/installed", *argv],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return " ".join(shown.replace("\\\n", " ").split())


# ------------------------------------------------------------------------------------------------ Makefile


def test_the_cuda_image_takes_the_bases_of_the_dockerfile() -> None:
    shown = shown_by_make("image")
    assert shown.startswith("docker build -f docker/Dockerfile")
    assert "_BASE=" not in shown
    assert shown.endswith("--build-arg CUDA_VERSION=13.0.2 --build-arg MIN_DRIVER=580 -t cad-mllm:latest .")


@pytest.mark.parametrize(("cuda", "driver"), [("12.4.1", "525"), ("12.8.1", "525"), ("13.1.0", "580")])
def test_the_driver_follows_from_the_cuda_version(cuda: str, driver: str) -> None:
    assert f"CUDA_VERSION={cuda} --build-arg MIN_DRIVER={driver} " in shown_by_make(
        "image", f"CUDA_VERSION={cuda}"
    )


def test_the_cpu_image_takes_debian_and_the_torch_of_the_constraints() -> None:
    shown = shown_by_make("image-cpu", "IMAGE=registry/cad", "TAG=v1")
    assert 'RUNTIME_BASE="docker.io/library/debian:12-slim"' in shown
    assert (
        f'TORCH_VERSION="{re.search(r"^torch==(.*)$", (ROOT / "constraints.txt").read_text(), re.M)[1]}"'
        in shown
    )
    assert "--build-arg ACCELERATOR=cpu" in shown
    assert shown.endswith("-t registry/cad:v1-cpu .")


def test_one_base_given_serves_for_both_stages_of_the_cpu_image() -> None:
    shown = shown_by_make("image-cpu", "BUILD_BASE=localhost/base")
    assert 'BUILD_BASE="localhost/base" --build-arg RUNTIME_BASE="localhost/base"' in shown


@pytest.mark.parametrize("tool", ["docker", "podman", "buildah"])
def test_docker_podman_and_buildah_are_told_the_same(tool: str) -> None:
    shown = shown_by_make("image-cpu", f"DOCKER={tool}", "IMAGE_PIP_CONFIG=my.conf", "TORCH_INDEX=URL")
    layers = "--layers " if tool == "buildah" else ""
    assert shown.startswith(f"{tool} build {layers}-f docker/Dockerfile")
    assert '--build-arg TORCH_INDEX="URL"' in shown
    assert "--secret id=pip_config,src=my.conf" in shown


def test_push_sends_the_name_that_was_built() -> None:
    assert shown_by_make("push", "DOCKER=podman", "IMAGE=registry/cad", "TAG=v1-cpu") == (
        "podman push registry/cad:v1-cpu"
    )


# ---------------------------------------------------------------------------------------------- Dockerfile


def test_every_base_is_an_argument_or_a_stage() -> None:
    bases = [text.split()[1] for text in INSTRUCTIONS if text.startswith("FROM ")]
    stages = {text.split()[3] for text in INSTRUCTIONS if text.startswith("FROM ")}
    assert [base for base in bases if base not in stages] == ["${BUILD_BASE}", "${RUNTIME_BASE}"]


def test_no_layer_takes_a_pip_configuration() -> None:
    """It is mounted wherever pip may look for packages, and copied nowhere."""
    assert not [text for text in INSTRUCTIONS if text.startswith(("COPY", "ADD")) and "pip" in text]
    local = "RUN pip install --no-deps --no-build-isolation --root /out /build"
    fetching = [text for text in INSTRUCTIONS if re.search(r"pip (install|wheel)", text) and text != local]
    assert len(fetching) == 5
    assert all("--mount=type=secret,id=pip_config,target=/etc/pip.conf" in text for text in fetching)


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    first, *kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[0] != "#"]
    assert first == "*"
    copied = {
        word.split("/")[0]
        for text in INSTRUCTIONS
        if text.startswith("COPY ") and "--from" not in text
        for word in text.split()[1:-1]
    }
    assert {line.removeprefix("!") for line in kept if line.startswith("!")} == copied


@pytest.mark.parametrize(
    ("accelerator", "cuda", "driver", "complaint"),
    [
        ("cuda", "13.0.2", "580", None),
        ("cuda", "12.8.1", "525", None),
        ("cpu", "", "", None),
        ("cuda", "12.8.1", "580", "cuda 12.8.1 needs --build-arg MIN_DRIVER=525"),
        ("cpu", "", "580", "needs --build-arg MIN_DRIVER="),
        ("cuda", "11.8.0", "450", "cuda with 12.x or 13.x, or cpu"),
        ("rocm", "13.0.2", "580", "cuda with 12.x or 13.x, or cpu"),
    ],
)
def test_a_build_refuses_a_driver_that_its_cuda_does_not_need(
    accelerator: str, cuda: str, driver: str, complaint: str | None
) -> None:
    (step,) = [text for text in INSTRUCTIONS if "needed=580" in text]
    done = subprocess.run(
        ["sh", "-c", step.removeprefix("RUN ")],
        env={
            "PATH": os.environ["PATH"],
            "ACCELERATOR": accelerator,
            "CUDA_VERSION": cuda,
            "MIN_DRIVER": driver,
        },
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (complaint is None), done.stderr
    assert complaint is None or complaint in done.stderr


@pytest.mark.parametrize(
    ("accelerator", "torch_cuda", "base_cuda", "complaint"),
    [
        ("cuda", "13.0", "13.0.2", None),
        ("cuda", "13.0", "13.1.0", "the base image has CUDA 13.1.0"),
        ("cuda", "12.8", "13.0.2", "is for CUDA 12.8"),
        ("cuda", None, "13.0.2", "is for the CPU"),
        ("cpu", None, "", None),
        ("cpu", "13.0", "", None),
    ],
)
def test_a_build_refuses_a_torch_for_another_cuda(
    accelerator: str,
    torch_cuda: str | None,
    base_cuda: str,
    complaint: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check = module_at("docker/check_torch.py")
    monkeypatch.setattr(check.torch.version, "cuda", torch_cuda)
    found = check.complaint(accelerator, base_cuda)
    assert (found is None) == (complaint is None)
    assert complaint is None or complaint in found


@pytest.mark.parametrize("extras", [[], ["gpu"]])
def test_the_requirements_are_those_of_the_project(extras: list[str]) -> None:
    command = [sys.executable, "docker/requirements.py", "pyproject.toml", *extras]
    printed = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert "torch>=2.11" in printed
    assert bool([line for line in printed if line.startswith("flash-attn")]) == ("gpu" in extras)
    assert not [line for line in printed if line.startswith("pytest")]


# --------------------------------------------------------------------------------------------- small files


def test_ops_are_compiled_for_x86_64_v3_whatever_machine_builds(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\nprintf "%s|" "$@"\n')
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    done = subprocess.run(
        [ROOT / "docker/x86-64-v3-g++", "-O3", "-march=native", "-D__AVX512__", "a b.cpp", "-o", "x.o"],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "-O3|-march=x86-64-v3|-D__AVX256__|a b.cpp|-o|x.o|"


def test_pips_settings_reach_the_build_and_local_folders_are_mounted(tmp_path: Path) -> None:
    pip_config = module_at(".ci/pip_config.py")
    listed = "global.cert='/of/the/file'\n:env:.cert='/of/the/environment'\nglobal.extra-index-url='URL'\n"
    assert pip_config.settings(listed) == {"cert": "/of/the/environment", "extra-index-url": "URL"}
    index = tmp_path / "index/simple"
    index.mkdir(parents=True)
    value = f"https://elsewhere{index} file://{index}  {tmp_path} /not/there"
    assert pip_config.mounts(value) == {str(index): str(index.parent), str(tmp_path): str(tmp_path)}
    assert pip_config.moved(value) == (
        f"https://elsewhere{index} file:///mnt/host{index} /mnt/host{tmp_path} /not/there"
    )
