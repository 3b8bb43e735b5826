"""Who started the container, and which ranks that makes."""

from pathlib import Path

import pytest

from cad_mllm.errors import PreflightError
from cad_mllm.launch.place import Place, Rank, is_mpi_launcher, read_place

POD = {
    "PET_NNODES": "4",
    "PET_NPROC_PER_NODE": "1",
    "PET_NODE_RANK": "2",
    "PET_MASTER_ADDR": "job-master-0",
    "PET_MASTER_PORT": "23456",
    "RANK": "2",
    "WORLD_SIZE": "4",
}
MPI_RANK = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "MASTER_ADDR": "job-worker-0.job.ns.svc",
    "MASTER_PORT": "29500",
}


def ranks(place: Place) -> list[tuple[int, int]]:
    return [(r.rank, r.local_rank) for r in place.ranks]


def test_a_pod_of_one_gpu_is_one_rank() -> None:
    place = read_place(POD, gpus=1)
    assert (place.world_size, place.local_world_size) == (4, 1)
    assert ranks(place) == [(2, 0)]
    assert (place.master_addr, place.master_port) == ("job-master-0", 23456)


@pytest.mark.parametrize(
    ("nproc", "gpus", "expected"),
    [("4", 8, 4), ("auto", 8, 8), ("auto", 0, 1), ("gpu", 4, 4), ("2", 0, 2)],
)
def test_processes_per_pod(nproc: str, gpus: int, expected: int) -> None:
    place = read_place({**POD, "PET_NPROC_PER_NODE": nproc}, gpus=gpus)
    assert place.world_size == 4 * expected
    assert ranks(place) == [(2 * expected + local, local) for local in range(expected)]


def test_cpu_is_a_process_for_each_core_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 5, 7})
    assert read_place({**POD, "PET_NPROC_PER_NODE": "cpu"}, gpus=8).local_world_size == 3


def test_one_pod_needs_no_master_and_no_dns() -> None:
    place = read_place({"PET_NNODES": "1", "PET_NPROC_PER_NODE": "4"}, gpus=4)
    assert ranks(place) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert not place.master_is_elsewhere and place.master_port > 0


@pytest.mark.parametrize(("gpus", "expected"), [(0, 1), (3, 3)])
def test_with_nobody_around_it_is_a_process_for_each_gpu_or_one(gpus: int, expected: int) -> None:
    place = read_place({}, gpus=gpus)
    assert (place.world_size, len(place.ranks), place.master_is_elsewhere) == (expected, expected, False)


def test_under_mpirun_it_is_the_one_rank_and_knows_of_its_neighbours() -> None:
    place = read_place(MPI_RANK, gpus=2)
    assert place.environment(Rank(rank=3, local_rank=1)) == {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "job-worker-0.job.ns.svc",
        "MASTER_PORT": "29500",
    }
    assert ranks(place) == [(3, 1)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"CAD_MLLM_WORLD_SIZE": "8"}, "4 (pod 2 of 4, 1 process each), but CAD_MLLM_WORLD_SIZE says 8"),
        ({"CAD_MLLM_WORLD_SIZE": "four"}, "CAD_MLLM_WORLD_SIZE is 'four': expected a whole number"),
        ({"PET_NNODES": "1:4"}, "elastic jobs are not supported"),
        ({"PET_NNODES": "0"}, "PET_NNODES is '0': expected a whole number, at least 1"),
        ({"PET_NNODES": ""}, "PET_NNODES is ''"),
        ({"PET_NODE_RANK": "4"}, "PET_NODE_RANK is 4, but PET_NNODES is 4"),
        ({"PET_NODE_RANK": "-1"}, "PET_NODE_RANK is '-1'"),
        ({"PET_MASTER_ADDR": ""}, "PET_MASTER_ADDR is not set: a PyTorchJob of several pods needs a Master"),
        ({"PET_MASTER_PORT": "http"}, "PET_MASTER_PORT is 'http'"),
        ({"PET_NPROC_PER_NODE": "gpus"}, "PET_NPROC_PER_NODE is 'gpus': expected auto, gpu, cpu or a number"),
        ({"PET_NPROC_PER_NODE": "0"}, "PET_NPROC_PER_NODE is '0'"),
        ({"PET_NPROC_PER_NODE": "gpu"}, "PET_NPROC_PER_NODE is gpu, but no GPU is visible"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_by_name(changes: dict[str, str], complaint: str) -> None:
    with pytest.raises(PreflightError) as caught:
        read_place({**POD, **changes}, gpus=0)
    assert complaint in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n in MPI_RANK if n != "OMPI_COMM_WORLD_RANK"])
def test_a_rank_of_mpirun_that_lacks_a_variable_names_it(name: str) -> None:
    with pytest.raises(PreflightError, match=name):
        read_place({k: v for k, v in MPI_RANK.items() if k != name}, gpus=2)


def test_only_a_pod_with_a_hostfile_and_no_rank_is_the_launcher(tmp_path: Path) -> None:
    hostfile = tmp_path / "hostfile"
    operator = {"OMPI_MCA_orte_default_hostfile": str(hostfile)}
    assert not is_mpi_launcher(operator, hostfile)
    hostfile.write_text("a slots=1\n")
    assert is_mpi_launcher(operator, hostfile)
    assert not is_mpi_launcher({**operator, **MPI_RANK}, hostfile)
    assert not is_mpi_launcher({**operator, **POD}, hostfile)
