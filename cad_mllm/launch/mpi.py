"""The launcher pod of an MPIJob: compose mpirun, and read its exit code.

Measured with Open MPI 4.1: mpirun hands on the code of the first rank that failed (1, 4, 143, 170; 128 + n
after signal n) and ends the other ranks within two seconds. SIGTERM ends mpirun itself with code 1 and
its ranks two seconds later, without time for a checkpoint; SIGUSR1 and SIGUSR2 it passes on to every rank.
It also returns 1 when it could not reach a worker or lost one: a rank's own 1 is told apart by `RANK_BUG`.
"""

import re
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.errors import ExitCode, PreflightError
from cad_mllm.launch.place import check_world_size

RANK_BUG = 125
"""What a rank under mpirun exits with instead of 1."""
_BUG = 1
_SIGNALLED = 128
_DEFAULT_PORT = "29500"

# What ranks on other machines need of this environment. By name: the values travel inside Open MPI and
# are on no command line.
_PASSED = re.compile(
    r"(CAD_MLLM|NCCL|GLOO|TORCH|TORCHINDUCTOR|PYTORCH|CUDA|TRITON|OMP|MKL|DS|DEEPSPEED|HF|HUGGING_FACE|"
    r"TRANSFORMERS|TOKENIZERS|WANDB|UCX|FI|XDG|LC)_\w+"
    r"|PYTHON\w*|PATH|LD_LIBRARY_PATH|HOME|TMPDIR|MPLCONFIGDIR|MPLBACKEND|MASTER_ADDR|MASTER_PORT|LANG|TZ"
    r"|SSL_CERT_(FILE|DIR)|REQUESTS_CA_BUNDLE|(?i:https?_proxy|no_proxy)"
)
_NOT_PASSED = {"CUDA_VISIBLE_DEVICES"}
"""Of this pod, not of the workers."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A line of the hostfile."""

    name: str
    slots: int


def read_hostfile(path: Path) -> tuple[Host, ...]:
    """The workers, as the operator lists them: `name slots=N`.

    Raises:
        PreflightError: no worker in it, or a line of another form.
    """
    hosts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        match = re.fullmatch(r"(\S+)(?: +slots=([1-9]\d*))?", " ".join(words))
        if match is None:
            raise PreflightError(f"{path}: `{line}`: expected `name slots=N`.")
        hosts.append(Host(name=match[1], slots=int(match[2] or 1)))
    if not hosts:
        raise PreflightError(f"{path} lists no worker: check Worker.replicas of the MPIJob.")
    return tuple(hosts)


def ranks_environment(env: Mapping[str, str], hosts: Sequence[Host]) -> dict[str, str]:
    """The environment of mpirun: this one, with what the ranks meet by and the world that they must find.

    Raises:
        PreflightError: CAD_MLLM_WORLD_SIZE is not what the hostfile adds up to.
    """
    size = sum(host.slots for host in hosts)
    check_world_size(env, size, f"{len(hosts)} hosts in the hostfile")
    return {
        **env,
        "MASTER_ADDR": hosts[0].name,
        "MASTER_PORT": env.get("MASTER_PORT", _DEFAULT_PORT),
        "CAD_MLLM_WORLD_SIZE": str(size),
    }


def mpirun_command(
    hosts: Sequence[Host], env: Mapping[str, str], entry: Sequence[str], *, hostfile: Path
) -> list[str]:
    """The whole command line; `env` is what `ranks_environment` gave."""
    command = ["mpirun", "--hostfile", str(hostfile), "-n", str(sum(host.slots for host in hosts))]
    if len({host.slots for host in hosts}) == 1:
        command += ["-N", str(hosts[0].slots)]
    command += ["--bind-to", "none"]
    for name in sorted(env):
        if _PASSED.fullmatch(name) and name not in _NOT_PASSED:
            command += ["-x", name]
    return [*command, *entry]


def check_version(env: Mapping[str, str]) -> None:
    """Refuse an mpirun that is not Open MPI 4.

    Open MPI 5 ignores the operator's OMPI_MCA_orte_* settings, runs on this pod alone and reports success.

    Raises:
        PreflightError: no mpirun, or another one.
    """
    try:
        done = subprocess.run(["mpirun", "--version"], env=dict(env), capture_output=True, text=True)
    except FileNotFoundError:
        raise PreflightError("no mpirun in this image: an MPIJob needs Open MPI 4.1.") from None
    first = done.stdout.strip().partition("\n")[0]
    if not re.fullmatch(r"mpirun \(Open MPI\) 4\.\S+", first):
        raise PreflightError(
            f"mpirun is `{first or done.stderr.strip()}`: an MPIJob needs Open MPI 4.1 "
            f"(version 5 ignores the operator's settings and would train on this pod alone)."
        )


def code_for_mpirun(code: int) -> int:
    """What a rank under mpirun exits with."""
    return RANK_BUG if code == _BUG else code


def code_of_mpirun(code: int, *, ended_by: Mapping[int, int]) -> int:
    """What mpirun's exit code says about the job; `ended_by`: signals to it that asked for a stop.

    Codes that no rank of ours ends with are mpirun's own troubles (1: a worker cannot be reached, 205: one
    is gone): a restart can mend them.
    """
    if code == RANK_BUG:
        return _BUG
    if code - _SIGNALLED in ended_by:  # the signal came before mpirun or a rank could take it
        return _SIGNALLED + ended_by[code - _SIGNALLED]
    if code in set(ExitCode) or _SIGNALLED < code <= _SIGNALLED + signal.SIGRTMAX:
        return code
    return int(ExitCode.PEER_LOST)
