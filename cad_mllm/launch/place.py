"""Where this container stands in the job: read from what the operator, mpirun or nobody set."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.errors import PreflightError

HOSTFILE = Path("/etc/mpi/hostfile")
"""Where the MPI operator mounts the list of workers, in the launcher pod alone."""
_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, kw_only=True)
class Rank:
    """One process of the trainer."""

    rank: int
    local_rank: int


@dataclass(frozen=True, kw_only=True)
class Place:
    """The ranks to start here, and how they meet the others."""

    started_by: str
    world_size: int
    local_world_size: int
    """Ranks on this node (under mpirun: more than the one that is started here)."""
    ranks: tuple[Rank, ...]
    master_addr: str
    master_port: int

    @property
    def master_is_elsewhere(self) -> bool:
        """Whether the ranks meet at a name that DNS must know first."""
        return self.master_addr != _LOOPBACK

    def environment(self, rank: Rank) -> dict[str, str]:
        """What torch.distributed and the trainer read, for one rank."""
        return {
            "RANK": str(rank.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(rank.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": self.master_addr,
            "MASTER_PORT": str(self.master_port),
        }


def is_mpi_rank(env: Mapping[str, str]) -> bool:
    """Whether mpirun started this process."""
    return "OMPI_COMM_WORLD_RANK" in env


def is_mpi_launcher(env: Mapping[str, str], hostfile: Path) -> bool:
    """Whether this is the launcher pod of an MPIJob."""
    return hostfile.is_file() and not is_mpi_rank(env) and "PET_NNODES" not in env


def read_place(env: Mapping[str, str], *, gpus: int) -> Place:
    """The ranks of this container; `gpus`: how many GPUs it may use.

    Raises:
        PreflightError: variables that are missing, malformed or contradict each other.
    """
    if is_mpi_rank(env):
        place = _under_mpirun(env)
    elif "PET_NNODES" in env:
        place = _under_operator(env, gpus)
    else:
        place = _node("plain", nnodes=1, node_rank=0, nproc=gpus or 1, master=(_LOOPBACK, _free_port()))
    check_world_size(env, place.world_size, place.started_by)
    return place


def check_world_size(env: Mapping[str, str], found: int, source: str) -> None:
    """Refuse a world that is not the expected one.

    Raises:
        PreflightError: CAD_MLLM_WORLD_SIZE is set to another number.
    """
    expected = number(env, "CAD_MLLM_WORLD_SIZE", minimum=1) if "CAD_MLLM_WORLD_SIZE" in env else found
    if found != expected:
        raise PreflightError(
            f"world size {found} ({source}), but CAD_MLLM_WORLD_SIZE says {expected}: "
            f"check replicas and processes per pod (nprocPerNode, slotsPerWorker) in the job, "
            f"or correct the variable."
        )


def number(env: Mapping[str, str], name: str, *, minimum: int) -> int:
    """An environment variable as a whole number.

    Raises:
        PreflightError: it is missing, no number or too small.
    """
    text = env.get(name, "")
    if not text.strip().isdecimal() or int(text) < minimum:
        shown = f"is {text!r}" if name in env else "is not set"
        raise PreflightError(f"{name} {shown}: expected a whole number, at least {minimum}.")
    return int(text)


def _under_operator(env: Mapping[str, str], gpus: int) -> Place:
    """A pod of a PyTorchJob or TrainJob."""
    if ":" in env["PET_NNODES"]:
        raise PreflightError(
            f"PET_NNODES is {env['PET_NNODES']!r}: elastic jobs are not supported. "
            f"Remove elasticPolicy from the job; a restarted job resumes on any number of pods."
        )
    nnodes = number(env, "PET_NNODES", minimum=1)
    nproc = _processes(env, gpus)
    if nnodes == 1:
        port = number(env, "PET_MASTER_PORT", minimum=1) if "PET_MASTER_PORT" in env else _free_port()
        return _node("one pod", nnodes=1, node_rank=0, nproc=nproc, master=(_LOOPBACK, port))
    missing = [n for n in ("PET_NODE_RANK", "PET_MASTER_ADDR", "PET_MASTER_PORT") if not env.get(n)]
    if missing:
        raise PreflightError(
            f"PET_NNODES is {nnodes}, but {', '.join(missing)} is not set: "
            f"a PyTorchJob of several pods needs a Master replica (the operator sets these for it)."
        )
    node_rank = number(env, "PET_NODE_RANK", minimum=0)
    if node_rank >= nnodes:
        raise PreflightError(f"PET_NODE_RANK is {node_rank}, but PET_NNODES is {nnodes}.")
    master = (env["PET_MASTER_ADDR"], number(env, "PET_MASTER_PORT", minimum=1))
    return _node(
        f"pod {node_rank} of {nnodes}", nnodes=nnodes, node_rank=node_rank, nproc=nproc, master=master
    )


def _processes(env: Mapping[str, str], gpus: int) -> int:
    """PET_NPROC_PER_NODE: a number, `gpu`, `cpu` (one process per usable core), or `auto` (GPUs, or one)."""
    wanted = env.get("PET_NPROC_PER_NODE", "auto").strip()
    if wanted == "auto":
        return gpus or 1
    if wanted == "cpu":
        return len(os.sched_getaffinity(0))
    if wanted == "gpu":
        if gpus == 0:
            raise PreflightError(
                "PET_NPROC_PER_NODE is gpu, but no GPU is visible: "
                "check that the pod asks for nvidia.com/gpu, and `nvidia-smi` in it."
            )
        return gpus
    if not wanted.isdecimal() or int(wanted) < 1:
        raise PreflightError(f"PET_NPROC_PER_NODE is {wanted!r}: expected auto, gpu, cpu or a number from 1.")
    return int(wanted)


def _under_mpirun(env: Mapping[str, str]) -> Place:
    """One rank of an mpirun; its neighbours are other processes of this program."""
    rank = number(env, "OMPI_COMM_WORLD_RANK", minimum=0)
    size = number(env, "OMPI_COMM_WORLD_SIZE", minimum=1)
    local_rank = number(env, "OMPI_COMM_WORLD_LOCAL_RANK", minimum=0)
    local_size = number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", minimum=1)
    if not env.get("MASTER_ADDR") or not env.get("MASTER_PORT"):
        raise PreflightError(
            "MASTER_ADDR or MASTER_PORT is not set on the ranks: start `python -m cad_mllm.launch` "
            "in the launcher pod, or add `-x MASTER_ADDR -x MASTER_PORT` to mpirun."
        )
    return Place(
        started_by=f"mpirun, rank {rank} of {size}",
        world_size=size,
        local_world_size=local_size,
        ranks=(Rank(rank=rank, local_rank=local_rank),),
        master_addr=env["MASTER_ADDR"],
        master_port=number(env, "MASTER_PORT", minimum=1),
    )


def _node(source: str, *, nnodes: int, node_rank: int, nproc: int, master: tuple[str, int]) -> Place:
    return Place(
        started_by=f"{source}, {nproc} process{'es' if nproc > 1 else ''} each",
        world_size=nnodes * nproc,
        local_world_size=nproc,
        ranks=tuple(Rank(rank=node_rank * nproc + local, local_rank=local) for local in range(nproc)),
        master_addr=master[0],
        master_port=master[1],
    )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((_LOOPBACK, 0))
        port: int = s.getsockname()[1]
        return port
