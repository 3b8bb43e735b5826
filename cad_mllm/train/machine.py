"""What a rank can say of its machine: facts, without a judgement. `preflight` judges them."""

import ctypes
import importlib
import os
import platform
import re
import socket
import subprocess
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from cad_mllm import __version__
from cad_mllm.train.distributed import World
from cad_mllm.train.zero import missing_for_ops

_PACKAGES = (
    *("torch", "deepspeed", "transformers", "peft", "safetensors", "tokenizers", "numpy"),
    *("flash-attn", "liger-kernel", "triton", "accelerate"),
)
_NCCL_SETTINGS = (
    *("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE", "NCCL_NET"),
    *("NCCL_SOCKET_IFNAME", "NCCL_HOSTID"),
)
"""Read by name: other variables may hold secrets."""
_NO_LIMIT = 2**60
"""cgroup v1 writes "no limit" as a number about this large."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """The GPU of a rank."""

    model: str
    uuid: str
    total_bytes: int
    free_bytes: int
    reaches_peers: bool
    """Whether it can read the memory of the other ranks' GPUs on this machine (P2P)."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """The output folder, seen from a rank."""

    free_bytes: int
    fault: str | None
    """Why writing, syncing or renaming a file there failed; None if it worked."""
    sees_main: bool
    """Whether the file that rank 0 wrote is there."""


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank and its machine. Small, picklable, JSON-able; holds no environment variable but NCCL's."""

    rank: int
    host: str
    """Host name: what NCCL tells machines apart by (with the boot id)."""
    versions: Mapping[str, str]
    """Python, this project and its git revision, packages."""
    config: Mapping[str, object]
    """Flags and resolved DeepSpeed JSON, as `name -> value`."""
    cpu: str
    memory_bytes: int
    """Host memory that this process may use in all: the container's limit, or the machine's."""
    memory_available_bytes: int
    shm_bytes: int
    """Free in /dev/shm."""
    gpu: Gpu | None
    driver: str | None
    """Version of the NVIDIA driver; None without one."""
    driver_cuda: tuple[int, int] | None
    """Newest CUDA that the driver supports; None without one, or if its GPUs are hidden on purpose."""
    torch_cuda: tuple[int, int] | None
    """The CUDA that torch was built for."""
    flash_attention_fault: str | None
    """Why flash-attn cannot be imported; None if it can, or nobody asked."""
    missing_for_ops: tuple[str, ...]
    """What compiling DeepSpeed's ops for this run needs and is not here."""
    rdma: bool
    nccl: Mapping[str, str]
    """NCCL's settings in the environment."""
    output: Output


def gather_facts(
    world: World,
    *,
    config: Mapping[str, object],
    output_dir: Path,
    flash_attention: bool,
    deepspeed_ops: Sequence[str],
) -> list[RankFacts]:
    """The facts of every rank, by rank, on every rank. Writes and removes a few files in `output_dir`.

    Args:
        world: the ranks.
        config: what this rank was told to run.
        output_dir: an existing folder.
        flash_attention: whether the run uses it.
        deepspeed_ops: names of DeepSpeed's compiled ops that the run uses.
    """
    output = _probe_output(output_dir, world)
    available, limit = host_memory()
    facts = RankFacts(
        rank=world.rank,
        host=socket.gethostname(),
        versions=versions(),
        config=config,
        cpu=_cpu_model(),
        memory_bytes=limit,
        memory_available_bytes=available,
        shm_bytes=_free_bytes(Path("/dev/shm")),
        gpu=_gpu(world),
        driver=_driver_version(),
        driver_cuda=_driver_cuda(),
        torch_cuda=_major_minor(torch.version.cuda),
        flash_attention_fault=_import_fault("flash_attn") if flash_attention else None,
        missing_for_ops=missing_for_ops(deepspeed_ops),
        rdma=Path("/dev/infiniband").is_dir() and any(_listed(Path("/sys/class/infiniband"))),
        nccl={name: os.environ[name] for name in _NCCL_SETTINGS if name in os.environ},
        output=output,
    )
    return world.gather(facts)


def versions() -> dict[str, str]:
    """What must be the same on all ranks: Python, this project, the packages that compute."""
    found = {"python": platform.python_version(), "cad_mllm": __version__}
    revision = _git_revision()
    if revision is not None:
        found["git_revision"] = revision
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def _git_revision() -> str | None:
    """The commit of the source tree that this runs from, or of the image; None for an installed package."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.strip()
    return os.environ.get("CAD_MLLM_GIT_REVISION")


def host_memory(*, proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int]:
    """(available, limit) of host memory in bytes: the machine's, or the container's where that is less."""
    lines = (proc / "meminfo").read_text(encoding="utf-8").splitlines()
    meminfo = {
        name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines)
    }
    available, limit = meminfo["MemAvailable"], meminfo["MemTotal"]
    for folder, names in (
        (cgroup, ("memory.max", "memory.current", "inactive_file")),
        (cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ):
        allowed = _number_in(folder / names[0])
        if allowed is not None and allowed < _NO_LIMIT:
            # The page cache counts as used, and goes when memory is needed.
            cache = _number_in(folder / "memory.stat", after=names[2]) or 0
            used = (_number_in(folder / names[1]) or 0) - cache
            return min(available, allowed - used), min(limit, allowed)
    return available, limit


def _number_in(path: Path, *, after: str = "") -> int | None:
    """The number in a file, or behind a word at the start of a line; None if it is not there ("max")."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(rf"^{re.escape(after)}\s*(\d+)$", text, flags=re.MULTILINE)
    return int(found[1]) if found else None


def _cpu_model() -> str:
    with suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
        if found:
            return f"{len(os.sched_getaffinity(0))} x {found[1]}"
    return f"{len(os.sched_getaffinity(0))} x {platform.machine()}"


def _free_bytes(folder: Path) -> int:
    try:
        stats = os.statvfs(folder)
    except OSError:
        return 0
    return stats.f_frsize * stats.f_bavail


def _listed(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _gpu(world: World) -> Gpu | None:
    if world.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(world.device)
    free, total = torch.cuda.mem_get_info(world.device)
    return Gpu(
        model=properties.name,
        uuid=str(properties.uuid),
        total_bytes=total,
        free_bytes=free,
        reaches_peers=reaches_peers(world),
    )


def reaches_peers(world: World) -> bool:
    """Whether this rank's GPU can read the memory of the other ranks' GPUs on this machine (P2P)."""
    own = world.device.index
    others = [i for i in range(min(world.local_size, torch.cuda.device_count())) if i != own]
    return all(torch.cuda.can_device_access_peer(own, other) for other in others)


def smallest_gpu(world: World) -> int | None:
    """Bytes of memory of the smallest GPU of all ranks, on all of them alike; None on a CPU."""
    if world.device.type != "cuda":
        return None
    return min(world.gather(torch.cuda.get_device_properties(world.device).total_memory))


def _driver_version() -> str | None:
    with suppress(OSError):
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"^NVRM.*?\s(\d+\.[\d.]+)\s", text, flags=re.MULTILINE)
        return found[1] if found else None
    return None


def _driver_cuda() -> tuple[int, int] | None:
    """Ask the driver itself: that works too where torch cannot use it."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "all") in ("", "-1"):
        return None
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int(0)
    if library.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value == 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _major_minor(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def _import_fault(module: str) -> str | None:
    """A package built for another torch is installed, and still cannot be imported."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return " ".join(str(error).split())
    return None


def _probe_output(output_dir: Path, world: World) -> Output:
    """Write, sync and rename as a checkpoint does; then look for what rank 0 wrote."""
    token = world.broadcast(uuid.uuid4().hex)
    own = output_dir / f".preflight-{token}-{world.rank}"
    fault = None
    try:
        _write_synced(own)
    except OSError as error:
        fault = error.strerror or str(error)
    world.barrier()
    sees_main = (output_dir / f".preflight-{token}-0").exists()
    world.barrier()
    with suppress(OSError):
        own.unlink(missing_ok=True)
    return Output(free_bytes=_free_bytes(output_dir), fault=fault, sees_main=sees_main)


def _write_synced(path: Path) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write("preflight\n")
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
