"""What is checked before the ranks are started."""

import os
import threading
from pathlib import Path

import pytest

from cad_mllm.errors import PreflightError
from cad_mllm.launch import preflight
from cad_mllm.launch.flags import flag_value
from cad_mllm.launch.preflight import NO_GPUS, Gpus
from cad_mllm.launch.supervise import Waiting
from tests.launch.launchers import environment, start


def nvidia_smi(folder: Path, script: str) -> dict[str, str]:
    """An environment whose nvidia-smi is this shell script."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


TWO_GPUS = "echo 575.57.08; echo 575.57.08"


@pytest.mark.parametrize(
    ("script", "visible", "expected"),
    [
        (TWO_GPUS, None, Gpus(count=2, driver="575.57.08")),
        (TWO_GPUS, "1", Gpus(count=1, driver="575.57.08")),
        (TWO_GPUS, "0,1,2", Gpus(count=2, driver="575.57.08")),
        (TWO_GPUS, "GPU-8f6d-1,GPU-22", Gpus(count=2, driver="575.57.08")),
        (TWO_GPUS, "1,-1,0", Gpus(count=1, driver="575.57.08")),
        (TWO_GPUS, "", NO_GPUS),
        ("echo No devices were found; exit 6", None, NO_GPUS),
    ],
)
def test_gpus_are_counted_without_torch(
    script: str, visible: str | None, expected: Gpus, tmp_path: Path
) -> None:
    env = nvidia_smi(tmp_path, script)
    if visible is not None:
        env["CUDA_VISIBLE_DEVICES"] = visible
    assert preflight.find_gpus(env) == expected


def test_a_driver_that_fails_is_told_from_no_gpu(tmp_path: Path) -> None:
    env = nvidia_smi(tmp_path, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
    with pytest.raises(PreflightError, match="version mismatch"):
        preflight.find_gpus(env)


def test_a_container_without_nvidia_smi_has_no_gpu_or_lacks_a_capability(tmp_path: Path) -> None:
    assert preflight.find_gpus({"PATH": str(tmp_path)}, dev=tmp_path) == NO_GPUS
    (tmp_path / "nvidia0").touch()
    with pytest.raises(PreflightError, match="NVIDIA_DRIVER_CAPABILITIES"):
        preflight.find_gpus({"PATH": str(tmp_path)}, dev=tmp_path)


CUDA_IMAGE = {"CAD_MLLM_MIN_DRIVER": "580"}


@pytest.mark.parametrize(
    ("env", "gpus", "processes", "device"),
    [
        (CUDA_IMAGE, Gpus(count=4, driver="580.65.06"), 4, "auto"),
        (CUDA_IMAGE, Gpus(count=4, driver="1000.1"), 1, "cuda"),
        (CUDA_IMAGE, NO_GPUS, 2, "cpu"),
        ({}, NO_GPUS, 2, "auto"),
        ({}, Gpus(count=1, driver="470.1"), 1, "auto"),
    ],
)
def test_enough_gpus_and_a_new_enough_driver_pass(
    env: dict[str, str], gpus: Gpus, processes: int, device: str
) -> None:
    preflight.check_gpus(env, gpus, local_world_size=processes, device=device)


@pytest.mark.parametrize(
    ("env", "gpus", "processes", "device", "complaint"),
    [
        (CUDA_IMAGE, Gpus(count=1, driver="575.57.08"), 1, "auto", "is 575.57.08, .* needs at least 580:"),
        (CUDA_IMAGE, NO_GPUS, 1, "auto", "no GPU is visible"),
        ({}, NO_GPUS, 1, "cuda", "no GPU is visible"),
        ({}, Gpus(count=1, driver="580.1"), 4, "auto", "4 processes on this node, but 1 GPUs are visible"),
        ({"CAD_MLLM_MIN_DRIVER": "new"}, Gpus(count=1, driver="580.1"), 1, "auto", "'new' is no driver"),
    ],
)
def test_what_could_not_train_is_refused(
    env: dict[str, str], gpus: Gpus, processes: int, device: str, complaint: str
) -> None:
    with pytest.raises(PreflightError, match=complaint):
        preflight.check_gpus(env, gpus, local_world_size=processes, device=device)


def test_shared_memory_and_disk_are_measured_where_a_limit_is_set(tmp_path: Path) -> None:
    unborn = tmp_path / "run" / "of" / "tomorrow"
    enough = {"CAD_MLLM_MIN_SHM_GB": "0.000001", "CAD_MLLM_MIN_FREE_DISK_GB": "0.000001"}
    too_much = {"CAD_MLLM_MIN_SHM_GB": "1000000000", "CAD_MLLM_MIN_FREE_DISK_GB": "1e9"}
    for env in ({}, enough):
        preflight.check_shared_memory(env, folder=tmp_path)
        preflight.check_free_disk(env, unborn)
    with pytest.raises(PreflightError, match=r"/dev/shm has .* GB, CAD_MLLM_MIN_SHM_GB asks for 1e\+09"):
        preflight.check_shared_memory(too_much, folder=tmp_path)
    with pytest.raises(PreflightError, match="CAD_MLLM_MIN_FREE_DISK_GB is '1e9': expected a number"):
        preflight.check_free_disk(too_much, unborn)
    with pytest.raises(PreflightError, match=r"--output_dir .*tomorrow: .* GB free on its volume"):
        preflight.check_free_disk({"CAD_MLLM_MIN_FREE_DISK_GB": "1000000000"}, unborn)


def test_names_that_dns_learns_in_time_are_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def resolver(name: str) -> None:
        asked.append(name)
        if asked.count(name) < 3:
            raise OSError("Name or service not known")

    preflight.wait_for_names(["a", "b"], {"CAD_MLLM_DNS_SECONDS": "30"}, Waiting(), resolver=resolver)
    assert asked == ["a"] * 3 + ["b"] * 3
    assert "waiting for the name a (up to 30 s)" in capsys.readouterr().err


def test_a_resolver_that_hangs_does_not_hang_the_launcher() -> None:
    forever = threading.Event()
    with pytest.raises(PreflightError, match="for DNS to know a: "):
        preflight.wait_for_names(
            ["a"], {"CAD_MLLM_DNS_SECONDS": "0.3"}, Waiting(), resolver=lambda name: forever.wait(20)
        )
    forever.set()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--output_dir", "/outputs/a"], "/outputs/a"),
        (["--output_dir=/outputs/a", "--seed", "1"], "/outputs/a"),
        (["--config", "{yaml}"], "/from/yaml"),
        (["--config={yaml}", "--output_dir", "/flag"], "/flag"),
        (["--config", "nowhere.yaml"], None),
        (["--output_dir"], None),
    ],
)
def test_a_flag_wins_over_the_file(words: list[str], expected: str | None, tmp_path: Path) -> None:
    yaml = tmp_path / "train.yaml"
    yaml.write_text("output_dir: /from/yaml\n")
    assert flag_value([word.format(yaml=yaml) for word in words], "output_dir") == expected


def test_the_launcher_makes_these_checks_and_ends_with_5_in_one_line(tmp_path: Path) -> None:
    env = nvidia_smi(tmp_path, TWO_GPUS)
    cases: list[tuple[dict[str, str], list[str], str]] = [
        ({**env, "CAD_MLLM_MIN_DRIVER": "580"}, [], "needs at least 580"),
        ({**env, "PET_NNODES": "1", "PET_NPROC_PER_NODE": "3"}, [], "but 2 GPUs are visible"),
        ({"CAD_MLLM_MIN_DRIVER": "580"}, ["--device", "cuda"], "no GPU is visible"),
        ({"CAD_MLLM_MIN_SHM_GB": "100000"}, [], "CAD_MLLM_MIN_SHM_GB asks for 100000"),
        ({"CAD_MLLM_MIN_FREE_DISK_GB": "100000000"}, [], f"--output_dir {tmp_path}"),
        ({"CAD_MLLM_GRACE_SECONDS": "soon"}, [], "CAD_MLLM_GRACE_SECONDS is 'soon'"),
    ]
    for variables, words, complaint in cases:
        visible = {} if "PATH" in variables else {"CUDA_VISIBLE_DEVICES": ""}
        run_env = {k: v for k, v in environment().items() if k != "CUDA_VISIBLE_DEVICES"}
        code, output = start(tmp_path, *words, env={**run_env, **visible, **variables}).end()
        assert code == 5, output
        assert complaint in output and output.count("\n") == 1, output
