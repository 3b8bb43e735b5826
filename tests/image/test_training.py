"""Containers of the image train together: as pods of a PyTorchJob, and of an MPIJob."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from cad_mllm.train.checkpoint import read_state, verify

from .conftest import UID
from .containers import Container, Pods, output_of

pytestmark = [pytest.mark.image, pytest.mark.distributed, pytest.mark.timeout(600)]

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
MOUNTS = {
    CONFIGS / "deepspeed": "/etc/cad-mllm/deepspeed",
    CONFIGS / "train/tiny.yaml": "/etc/cad-mllm/train/train.yaml",
}
STEPS = 9
"""Of the tiny curriculum on two ranks: 12 samples, 2 ranks, batches of 2, 3 stages of 1 epoch."""


def trainer_flags(zero: str) -> list[str]:
    return [
        *("--config", "/etc/cad-mllm/train/train.yaml"),
        *("--deepspeed", "--deepspeed_config", f"/etc/cad-mllm/deepspeed/ds_{zero}_config.json"),
        *("--output_dir", "/outputs/job", "--resume_from_ckpt", "auto"),
    ]


def newest_checkpoint(outputs: Path) -> Path:
    """The newest checkpoint, which must be whole."""
    newest = max((outputs / "job/checkpoints").glob("step-*"))
    assert verify(newest) is None
    return newest


def assert_trained_together(outputs: Path, logs: str) -> None:
    """To the end of all stages, by two ranks."""
    state = read_state(newest_checkpoint(outputs))
    assert (state.position.stage, state.position.stage_complete) == (3, True)
    assert state.position.global_step == STEPS
    assert state.provenance["world_size"] == 2
    metrics = [json.loads(line) for line in (outputs / "job/metrics.jsonl").read_text().splitlines()]
    assert {record["stage"] for record in metrics if "stage" in record} >= {1, 2, 3}
    assert "world size 2" in logs
    assert "done: 9 steps" in logs


def pytorchjob_env(job: str, *, pods: int, rank: int) -> dict[str, str]:
    """What the training operator adds to a container (v1.9, spec.nprocPerNode 1)."""
    master = f"{job}-master-0"
    return {
        "PYTHONUNBUFFERED": "1",
        "MASTER_ADDR": master,
        "MASTER_PORT": "23456",
        "PET_MASTER_ADDR": master,
        "PET_MASTER_PORT": "23456",
        "WORLD_SIZE": str(pods),
        "RANK": str(rank),
        "PET_NODE_RANK": str(rank),
        "PET_NNODES": str(pods),
        "PET_NPROC_PER_NODE": "1",
        "CAD_MLLM_WORLD_SIZE": str(pods),
        "OMP_NUM_THREADS": "1",
    }


def test_two_pods_of_a_pytorchjob_train_to_the_end(pods: Pods) -> None:
    job = "cad-mllm-smoke-cpu"
    names = [f"{job}-master-0", f"{job}-worker-0"]
    started: list[Container] = [
        pods.start(name, trainer_flags("zero2"), env=pytorchjob_env(job, pods=2, rank=rank), mounts=MOUNTS)
        for rank, name in enumerate(names)
    ]
    codes = [container.exit_code(seconds=400) for container in started]
    logs = [container.logs() for container in started]
    assert codes == [0, 0], "\n".join(logs)
    assert_trained_together(pods.outputs, logs[0])


def test_sigterm_ends_the_container_with_143_after_a_checkpoint(pods: Pods) -> None:
    container = pods.start(
        "cad-mllm-one",
        [*trainer_flags("zero3"), "--stage1_epochs", "200"],
        mounts=MOUNTS,
        env={"OMP_NUM_THREADS": "1"},
    )
    container.wait_for("loss", seconds=200)
    container.stop()
    assert container.exit_code(seconds=100) == 143, container.logs()
    position = read_state(newest_checkpoint(pods.outputs)).position
    assert position.stage == 1
    assert position.global_step > 0


# -------------------------------------------------------------------------------------------------- MPIJob


def operators_secret(image: str, folder: Path) -> Path:
    """The ssh key of a job as the MPI operator mounts it: of root, readable by the pod's group."""
    folder.mkdir()
    made = output_of(
        image,
        "sh",
        "-c",
        "ssh-keygen -q -t ecdsa -b 521 -N '' -f /scratch/k && cat /scratch/k && cat /scratch/k.pub",
    )
    private, end, public = made.partition("-----END OPENSSH PRIVATE KEY-----\n")
    contents = {"id_rsa": private + end, "id_rsa.pub": public, "authorized_keys": public}
    for name, text in contents.items():
        (folder / name).write_text(text)
        os.chown(folder / name, 0, UID)
        (folder / name).chmod(0o440)
    return folder


def mpi_launcher_env(hosts: int) -> Mapping[str, str]:
    """What the MPI operator adds to the launcher (v0.8, Open MPI)."""
    return {
        "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
        "OMPI_MCA_orte_default_hostfile": "/etc/mpi/hostfile",
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
        "OMPI_MCA_orte_set_default_slots": "1",
        "K_MPI_JOB_ROLE": "launcher",
        "NVIDIA_VISIBLE_DEVICES": "",
        "NVIDIA_DRIVER_CAPABILITIES": "",
        "CAD_MLLM_WORLD_SIZE": str(hosts),
        "OMP_NUM_THREADS": "1",
    }


def test_an_mpijob_trains_to_the_end_over_ssh(pods: Pods, tmp_path: Path) -> None:
    job = "cad-mllm-mpi-zero3"
    ssh = {operators_secret(pods.image, tmp_path / "ssh"): "/home/mpiuser/.ssh"}
    names = [f"{job}-worker-{i}.{job}.training.svc" for i in range(2)]
    workers = [
        pods.start(
            name,
            ["-De", "-f", "/home/mpiuser/.sshd_config"],
            command="/usr/sbin/sshd",
            mounts={**MOUNTS, **ssh},
            env={"K_MPI_JOB_ROLE": "worker"},
        )
        for name in names
    ]
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("".join(f"{name} slots=1\n" for name in names))
    launcher = pods.start(
        f"{job}-launcher",
        trainer_flags("zero3"),
        env=mpi_launcher_env(2),
        mounts={**MOUNTS, **ssh, hostfile: "/etc/mpi/hostfile"},
    )
    code = launcher.exit_code(seconds=400)
    logs = launcher.logs() + "".join(worker.logs() for worker in workers)
    assert code == 0, logs
    assert_trained_together(pods.outputs, logs)
    assert all(worker.is_running() for worker in workers), "the operator ends them"
