"""What must be true of the machine before GPU time is spent: GPUs, driver, memory, disk, names."""

import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.errors import PreflightError
from cad_mllm.launch.supervise import Waiting, say

SHM = Path("/dev/shm")
_GB = 1e9
_NVIDIA_SMI_SECONDS = 60
_DNS_SECONDS = 300.0
_RETRY_SECONDS = 1.0

Resolver = Callable[[str], object]


@dataclass(frozen=True, kw_only=True)
class Gpus:
    """The GPUs that the ranks of this container may use."""

    count: int
    driver: str
    """Version of the NVIDIA driver; empty without a GPU."""


NO_GPUS = Gpus(count=0, driver="")


def find_gpus(env: Mapping[str, str], *, dev: Path = Path("/dev")) -> Gpus:
    """Ask nvidia-smi, without loading torch; CUDA_VISIBLE_DEVICES narrows the answer.

    Raises:
        PreflightError: the container has GPUs, but nvidia-smi cannot tell.
    """
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            command, env=dict(env), capture_output=True, text=True, timeout=_NVIDIA_SMI_SECONDS
        )
    except FileNotFoundError:
        if list(dev.glob("nvidia[0-9]*")):
            raise PreflightError(
                "the container has GPUs but no nvidia-smi: "
                "NVIDIA_DRIVER_CAPABILITIES must contain `utility` besides `compute`."
            ) from None
        return NO_GPUS
    except subprocess.TimeoutExpired:
        raise PreflightError(
            f"nvidia-smi did not answer in {_NVIDIA_SMI_SECONDS} s: a GPU of this node hangs. "
            f"Drain the node and reset its GPUs."
        ) from None
    if "no devices" in done.stdout.lower():
        return NO_GPUS
    if done.returncode != 0:
        reason = " ".join((done.stdout + done.stderr).split())
        raise PreflightError(f"nvidia-smi failed ({reason}). Check the driver of this node.")
    drivers = re.findall(r"^[\d.]+$", done.stdout, flags=re.MULTILINE)
    count = len(drivers)
    if "CUDA_VISIBLE_DEVICES" in env:
        count = min(count, _named_devices(env["CUDA_VISIBLE_DEVICES"]))
    return Gpus(count=count, driver=drivers[0]) if count else NO_GPUS


def _named_devices(text: str) -> int:
    """How many devices a CUDA_VISIBLE_DEVICES names: CUDA stops at the first that cannot be."""
    names = [name.strip() for name in text.split(",")]
    valid = 0
    while valid < len(names) and re.fullmatch(r"\d+|(GPU|MIG)-.+", names[valid]):
        valid += 1
    return valid


def check_gpus(env: Mapping[str, str], gpus: Gpus, *, local_world_size: int, device: str) -> None:
    """Refuse too few GPUs, or a driver older than the image's CUDA needs.

    A run that asked for `--device cpu` is not checked; one that names no device may run on the CPU only
    where the image is no CUDA image (it sets no CAD_MLLM_MIN_DRIVER).

    Raises:
        PreflightError: the ranks here could not train.
    """
    needed = env.get("CAD_MLLM_MIN_DRIVER", "")
    if device == "cpu":
        return
    if gpus.count == 0:
        if needed or device == "cuda":
            raise PreflightError(
                "no GPU is visible: check that the pod asks for nvidia.com/gpu and that `nvidia-smi` works "
                "in it, or train on the CPU with --device cpu."
            )
        return
    if local_world_size > gpus.count:
        raise PreflightError(
            f"{local_world_size} processes on this node, but {gpus.count} GPUs are visible: "
            f"ask for as many nvidia.com/gpu as processes per pod (nprocPerNode, slotsPerWorker)."
        )
    if needed and _version(gpus.driver) < _version(needed):
        raise PreflightError(
            f"the NVIDIA driver of this node is {gpus.driver}, and this image's CUDA needs at least "
            f"{needed}: update the driver, select nodes that have it, or build the image with an older CUDA."
        )


def _version(text: str) -> tuple[int, ...]:
    parts = text.strip().split(".")
    if not all(part.isdecimal() for part in parts):
        raise PreflightError(f"{text!r} is no driver version (CAD_MLLM_MIN_DRIVER, nvidia-smi).")
    return tuple(int(part) for part in parts)


def check_shared_memory(env: Mapping[str, str], *, folder: Path = SHM) -> None:
    """Refuse a /dev/shm smaller than CAD_MLLM_MIN_SHM_GB.

    Raises:
        PreflightError: it is smaller.
    """
    needed = gigabytes(env, "CAD_MLLM_MIN_SHM_GB")
    if needed is None:
        return
    stats = os.statvfs(folder)
    size = stats.f_frsize * stats.f_blocks / _GB
    if size < needed:
        raise PreflightError(
            f"/dev/shm has {size:.2f} GB, CAD_MLLM_MIN_SHM_GB asks for {needed:g}: mount an emptyDir with "
            f"`medium: Memory` and a sizeLimit there (docker run: --shm-size)."
        )


def check_free_disk(env: Mapping[str, str], output_dir: Path) -> None:
    """Refuse an output volume with less free space than CAD_MLLM_MIN_FREE_DISK_GB.

    Raises:
        PreflightError: there is less.
    """
    needed = gigabytes(env, "CAD_MLLM_MIN_FREE_DISK_GB")
    if needed is None:
        return
    existing = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if p.exists())
    stats = os.statvfs(existing)
    free = stats.f_frsize * stats.f_bavail / _GB
    if free < needed:
        raise PreflightError(
            f"--output_dir {output_dir}: {free:.2f} GB free on its volume, CAD_MLLM_MIN_FREE_DISK_GB "
            f"asks for {needed:g}: remove old runs, enlarge the volume, or name a folder on another one."
        )


def gigabytes(env: Mapping[str, str], name: str) -> float | None:
    """An amount in GB (1e9 bytes) from the environment; None where it is not set.

    Raises:
        PreflightError: it is no number.
    """
    if not env.get(name):
        return None
    return _positive(env, name)


def seconds(env: Mapping[str, str], name: str, default: float) -> float:
    """A time in seconds from the environment.

    Raises:
        PreflightError: it is no number.
    """
    return _positive(env, name) if env.get(name) else default


def _positive(env: Mapping[str, str], name: str) -> float:
    if not re.fullmatch(r"\d+(\.\d+)?", env[name].strip()):
        raise PreflightError(f"{name} is {env[name]!r}: expected a number, such as 16 or 0.5.")
    return float(env[name])


def resolve(name: str) -> object:
    """Look a name up; raises OSError if it is not known (yet)."""
    return socket.getaddrinfo(name, None)


def wait_for_names(
    names: Iterable[str], env: Mapping[str, str], waiting: Waiting, *, resolver: Resolver = resolve
) -> None:
    """Wait until DNS knows every name, for CAD_MLLM_DNS_SECONDS in all.

    Pods get their names when they start, so at first a name may be unknown for a good reason.

    Raises:
        PreflightError: the time is up.
        StoppedError: a signal came while it waited.
    """
    limit = seconds(env, "CAD_MLLM_DNS_SECONDS", _DNS_SECONDS)
    for name in names:
        known, given_up = threading.Event(), threading.Event()
        # In a thread: a resolver can block for half a minute, and a stop must not wait for it.
        threading.Thread(target=_look_up, args=(name, resolver, known, given_up), daemon=True).start()
        try:
            _wait_for(known, name, limit, waiting)
        finally:
            given_up.set()


def _wait_for(known: threading.Event, name: str, limit: float, waiting: Waiting) -> None:
    said = False
    while not known.is_set():
        if not said and waiting.elapsed > _RETRY_SECONDS:
            say(f"waiting for the name {name} (up to {limit:g} s)")
            said = True
        if waiting.elapsed >= limit:
            raise PreflightError(
                f"waited {limit:g} s (CAD_MLLM_DNS_SECONDS) for DNS to know {name}: is that pod running "
                f"(kubectl get pods), does its headless service exist (kubectl get services), "
                f"and does the NetworkPolicy let DNS through?"
            )
        waiting.sleep(0.1)


def _look_up(name: str, resolver: Resolver, known: threading.Event, given_up: threading.Event) -> None:
    while not given_up.is_set():
        try:
            resolver(name)
        except OSError:
            given_up.wait(_RETRY_SECONDS)
        else:
            known.set()
            return
