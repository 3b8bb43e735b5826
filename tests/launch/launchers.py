"""Start launchers as an operator would, and see what is left when they end."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.distributed.ranks import ROOT

STUB = Path(__file__).with_name("stub.py")
_FOREIGN = ("PET_", "OMPI_", "CAD_MLLM_", "MASTER_", "RANK", "LOCAL_", "WORLD_SIZE")


def environment(**variables: object) -> dict[str, str]:
    """This one without what a launcher outside may have set, with `variables`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(_FOREIGN)}
    more = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        # DeepSpeed builds its ops anew with another ninja than the one they were built with.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }
    return {**kept, **more, **{k: str(v) for k, v in variables.items()}}


def pod(node_rank: int, *, nnodes: int, nproc: int | str, port: int, **more: object) -> dict[str, str]:
    """What the training operator sets in a pod."""
    operator = {
        "PET_NNODES": nnodes,
        "PET_NPROC_PER_NODE": nproc,
        "PET_NODE_RANK": node_rank,
        "PET_MASTER_ADDR": "localhost",
        "PET_MASTER_PORT": port,
        "RANK": node_rank,  # of the pod: the ranks must not see it
        "WORLD_SIZE": nnodes,
    }
    return environment(**{**operator, **more})


_started: "list[subprocess.Popen[str]]" = []


@dataclass
class Launcher:
    """A launcher that runs, and the folder where its ranks leave their traces."""

    process: "subprocess.Popen[str]"
    folder: Path

    def pid_of(self, rank: int, suffix: str = "pid") -> int:
        """The process of a rank, once it runs."""
        path = self.folder / f"{rank}.{suffix}"
        wait_until(lambda: path.exists() and path.read_text() != "", f"{path} is written")
        return int(path.read_text())

    def seen_by(self, rank: int) -> dict[str, str]:
        """The environment of a rank."""
        self.pid_of(rank)
        found: dict[str, str] = json.loads((self.folder / f"{rank}.env").read_text())
        return found

    def signals_of(self, rank: int) -> list[tuple[str, float]]:
        """(name, time) of what a rank was sent."""
        path = self.folder / f"{rank}.signals"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(line.split()[0], float(line.split()[1])) for line in lines]

    def end(self, seconds: float = 60) -> tuple[int, str]:
        """(exit code, output), within the time."""
        output, _ = self.process.communicate(timeout=seconds)
        return self.process.returncode, output


def start(
    folder: Path, *words: str, env: dict[str, str], prefix: Sequence[str] = (), **options: str
) -> Launcher:
    """The launcher with the stub as trainer."""
    command = [*prefix, sys.executable, str(STUB), "launcher", json.dumps(options)]
    return start_command([*command, "--output_dir", str(folder), *words], folder, env)


def start_command(command: Sequence[str], folder: Path, env: dict[str, str]) -> Launcher:
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    _started.append(process)
    return Launcher(process=process, folder=folder)


def end_all() -> None:
    """Kill the launchers that still run (and with them their ranks)."""
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.wait()
    _started.clear()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds} s in vain until {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Whether a process exists and is no zombie (there may be nobody to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def send(pid: int, number: signal.Signals) -> None:
    os.kill(pid, number)
