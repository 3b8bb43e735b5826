"""The set-up of a fresh machine: what is missing is named, what is installed is what was tested."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TOOLS = ("bash", "env", "grep", "ldconfig", "make", "g++", "python3")


def canonical(requirement: str) -> str:
    name = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert name is not None
    return re.sub(r"[-_.]+", "-", name[0]).lower()


def prerequisites(*argv: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", ".ci/prerequisites", *argv],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def path_without(tool: str, folder: Path) -> str:
    """A PATH on which every tool of the script can be found but this one."""
    search = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    for name in TOOLS:
        found = shutil.which(name, path=search)
        if name != tool and found is not None:
            (folder / name).symlink_to(found)
    return str(folder)


@pytest.mark.parametrize("tool", ["g++", "make"])
def test_a_missing_tool_is_named_with_the_line_to_type(tool: str, tmp_path: Path) -> None:
    done = prerequisites(env={"PATH": path_without(tool, tmp_path)})
    assert done.returncode == 1
    packages = done.stderr.splitlines()[-1].removeprefix("    sudo apt-get install -y ").split()
    assert tool in packages
    assert not ({"g++", "make"} - {tool}) & set(packages)


def test_a_missing_python_is_named_with_all_that_it_needs() -> None:
    done = prerequisites(env={"PYTHON": "python-that-is-not-there"})
    assert done.returncode == 1
    assert "no Python 3.11 or 3.12 found" in done.stderr
    assert re.search(r"apt-get install -y python3\S* python3\S*-venv python3\S*-dev", done.stderr)


def test_nothing_is_named_where_nothing_is_missing() -> None:
    """The machine that runs this test has been set up."""
    done = prerequisites("--missing", env={})
    assert done.stdout.strip() == ""


def test_a_library_is_found_however_many_come_after_it(tmp_path: Path) -> None:
    ldconfig = tmp_path / "ldconfig"
    ldconfig.write_text("#!/bin/sh\necho libGL.so.1\necho libX11.so.6\nseq 200000\n")
    ldconfig.chmod(0o755)
    done = prerequisites("--missing", env={"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"})
    assert not {"libgl1", "libx11-6"} & set(done.stdout.split())


def test_every_dependency_is_pinned_to_a_plain_version() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = dict(line.split("==") for line in lines)
    assert pins["torch"] == "2.13.0"
    assert not [line for line in lines if "+" in line or "nvidia" in line]
    extras = PROJECT["optional-dependencies"]
    wanted = {canonical(r) for r in PROJECT["dependencies"] + extras["dev"] + extras["gpu"]}
    # docker/Dockerfile builds flash-attn, and says which.
    assert wanted - {canonical("flash-attn")} <= {canonical(name) for name in pins}


@pytest.mark.parametrize(
    "target",
    ["demo", "test", "test-slow", "test-image", "lint", "train", "image", "image-cpu", "push", "clean"],
)
def test_make_alone_lists_every_command(target: str) -> None:
    listed = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(rf"^  make {target} +\S", listed, flags=re.MULTILINE)


def test_make_train_is_the_distributed_training_of_the_quick_start() -> None:
    shown = subprocess.run(
        ["make", "-n", "-o", ".venv/installed", "train", "NUM_GPUS=8", "ARGS=--batch_size 2"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "deepspeed --num_gpus=8 cad_mllm/train_curriculum.py" in shown
    assert "--output_dir outputs_curriculum_distributed --batch_size 2" in shown
