"""The one way in which tests start ranks: processes with a launcher's environment, gloo, a time limit.

As a script this file is one rank: it loads a module by its path, calls one of its functions with a JSON
payload, and writes what comes back as JSON.
"""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher sets for one rank on this machine."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


def run_ranks(
    module: Path, function: str, payload: Any, *, world_size: int, seconds: float = 280
) -> list[Any]:
    """`function(payload)` of the module at a path, on every rank; the results by rank.

    Fails with the output of the ranks if one of them fails or the time runs out; leaves no process behind.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        results = [Path(scratch) / f"{rank}.json" for rank in range(world_size)]
        logs = [Path(scratch) / f"{rank}.log" for rank in range(world_size)]
        processes = []
        for rank in range(world_size):
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            __file__,
                            str(module),
                            function,
                            json.dumps(payload),
                            str(results[rank]),
                        ],
                        env=rank_environment(rank, world_size, port),
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        try:
            _wait(processes, seconds)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if any(process.returncode for process in processes):
            shown = "\n".join(
                f"--- rank {r}: exit {p.returncode}\n{logs[r].read_text()[-4000:]}"
                for r, p in enumerate(processes)
            )
            raise AssertionError(f"{function} failed\n{shown}")
        return [json.loads(path.read_text()) for path in results]


def _wait(processes: list["subprocess.Popen[bytes]"], seconds: float) -> None:
    """Until all have ended, one has failed, or the time is up."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) or any(codes):
            return
        time.sleep(0.05)


def _main(module: str, function: str, payload: str, result: str) -> None:
    spec = importlib.util.spec_from_file_location("job", module)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    Path(result).write_text(json.dumps(getattr(job, function)(json.loads(payload))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
