"""The one way in which tests start ranks: processes with a launcher's environment, gloo, a time limit.

Ranks are forks of one process (the nursery) that has imported the heavy libraries already: the import takes
longer than most of these tests. As a script this file is the nursery: it reads requests, forks ranks that
call a function of a module given by its path with a JSON payload, and says how they ended. Ranks on GPUs
import for themselves: CUDA does not outlive a fork, and DeepSpeed chooses its accelerator at the import.
"""

import atexit
import contextlib
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_HEAVY = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    # What `deepspeed.initialize` imports, with all of torch's compiler.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "cad_mllm.train.trainer",
)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody uses right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher sets for one rank on this machine."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
    }


@dataclass(frozen=True)
class Ranks:
    """Ranks that run."""

    pids: list[int]
    logs: list[Path]
    results: list[Path]

    def wait(self, seconds: float) -> list[int | None]:
        """Until all have ended, one has failed, or the time is up; then the rest is killed.

        Exit codes by rank: minus the signal of one that was killed, None for one that had to be ended here.
        """
        return list(_nursery().ask({"wait": self.pids, "seconds": seconds}))

    def output(self) -> str:
        """What the ranks have printed."""
        return "\n".join(f"--- rank {r}\n{log.read_text()[-4000:]}" for r, log in enumerate(self.logs))


@contextmanager
def start_ranks(
    module: Path, function: str, payload: Any, *, world_size: int, accelerator: str = "cpu"
) -> Iterator[Ranks]:
    """Start `function(payload)` of the module at a path on every rank; leaves no process behind."""
    port = free_port()
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [
            {
                "environment": {**rank_environment(rank, world_size, port), "DS_ACCELERATOR": accelerator},
                "log": str(Path(scratch) / f"{rank}.log"),
                "result": str(Path(scratch) / f"{rank}.json"),
            }
            for rank in range(world_size)
        ]
        job = {"module": str(module), "function": function, "payload": payload}
        pids = list(_nursery().ask({"start": ranks, **job}))
        started = Ranks(pids, [Path(r["log"]) for r in ranks], [Path(r["result"]) for r in ranks])
        try:
            yield started
        finally:
            started.wait(0)


def run_ranks(
    module: Path,
    function: str,
    payload: Any,
    *,
    world_size: int,
    seconds: float = 280,
    accelerator: str = "cpu",
) -> list[Any]:
    """`function(payload)` of the module at a path, on every rank; the results by rank.

    Fails with the output of the ranks if one of them fails or the time runs out.
    """
    with start_ranks(module, function, payload, world_size=world_size, accelerator=accelerator) as ranks:
        codes = ranks.wait(seconds)
        if any(codes) or None in codes:
            raise AssertionError(f"{function} failed: exit codes {codes}\n{ranks.output()}")
        return [json.loads(path.read_text()) for path in ranks.results]


class _Nursery:
    """The parent of all ranks of this test process."""

    def __init__(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self._process.kill)

    def ask(self, request: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the parent of the ranks has died"
        return json.loads(answer)


@lru_cache(maxsize=1)
def _nursery() -> _Nursery:
    return _Nursery()


def _serve() -> None:
    """The nursery: until the test process goes away."""
    answers = os.fdopen(os.dup(1), "w")  # nothing that a library prints may come between
    os.dup2(2, 1)
    for name in _HEAVY:
        importlib.import_module(name)
    _load_ops()
    codes: dict[int, int] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            answer: list[Any] = [_fork(rank, request) for rank in request["start"]]
        else:
            answer = _wait(request["wait"], request["seconds"], codes)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _load_ops() -> None:
    """DeepSpeed's compiled ops for the CPU: every rank would ask the compiler whether they are up to date."""
    from deepspeed.comm.torch import build_shm_op
    from deepspeed.ops.op_builder import CPUAdamBuilder

    build_shm_op()
    CPUAdamBuilder().load()


def _fork(rank: dict[str, Any], job: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(rank["log"], os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(rank["environment"])
        call = (job["module"], job["function"], job["payload"], rank["result"])
        if os.environ["DS_ACCELERATOR"] != "cpu":
            os.execv(sys.executable, [sys.executable, __file__, json.dumps(call)])
        _run(*call)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(module: str, function: str, payload: Any, result: str) -> None:
    spec = importlib.util.spec_from_file_location("job", module)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    Path(result).write_text(json.dumps(getattr(job, function)(payload)))


def _wait(pids: list[int], seconds: float, codes: dict[int, int]) -> list[int | None]:
    end = time.monotonic() + seconds
    while True:
        for pid in pids:
            if pid not in codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        found = [codes.get(pid) for pid in pids]
        if None not in found or any(found) or time.monotonic() > end:
            break
        time.sleep(0.05)
    for pid, code in zip(pids, found, strict=True):
        if code is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
            codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return found


if __name__ == "__main__":
    if sys.argv[1:]:
        _run(*json.loads(sys.argv[1]))
    else:
        _serve()
