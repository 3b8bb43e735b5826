"""Stand-ins for the tests: `launcher` is the real launcher with a trainer that does as it is told, `trainer`
is that trainer. Its flags: `--output_dir FOLDER` and for some ranks `RANK=WORD`, one of the words below.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

STUB = Path(__file__).resolve()


def launcher(options: dict[str, str], flags: list[str]) -> int:
    from cad_mllm.launch.main import launch
    from cad_mllm.launch.place import HOSTFILE
    from cad_mllm.launch.supervise import Patience

    return launch(
        flags,
        trainer=[sys.executable, str(STUB), "trainer"],
        entry=[sys.executable, str(STUB), "launcher", json.dumps(options)],
        hostfile=Path(options.get("hostfile", HOSTFILE)),
        patience=Patience(peers=1.0, last=1.0),
    )


def reduce_for_ever(met: Path) -> None:
    """As the trainer does: torch.distributed over gloo, inside what turns errors into exit codes."""
    import torch
    from torch import distributed

    from cad_mllm.cli import run_and_exit
    from cad_mllm.errors import ExitCode

    def body() -> ExitCode:
        distributed.init_process_group("gloo")
        distributed.all_reduce(torch.ones(1))
        met.write_text("1")
        while True:
            distributed.all_reduce(torch.ones(1))

    run_and_exit(body)


def trainer(flags: list[str]) -> int:
    rank = os.environ["RANK"]
    folder = Path(flags[flags.index("--output_dir") + 1])
    word, _, value = dict(f.split("=") for f in flags if f[0].isdigit()).get(rank, "wait").partition(":")
    got: list[int] = []

    def note(number: int, frame: object) -> None:
        got.append(number)
        with (folder / f"{rank}.signals").open("a") as f:
            f.write(f"{signal.Signals(number).name} {time.time()}\n")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)
    if word == "parent":  # with a worker of its own, which knows of no signals
        worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(150)"])
        (folder / f"{rank}.worker").write_text(str(worker.pid))
    if word == "orphan":  # a grandchild whose parent is gone, and which ends
        subprocess.run(["sh", "-c", "sleep 0.2 & exit 0"], check=True)
    (folder / f"{rank}.env").write_text(json.dumps(dict(os.environ)))
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    if word == "collectives":
        reduce_for_ever(folder / f"{rank}.met")
    if word == "exit":
        return int(value)
    if word == "late":  # fails when its peers have fallen
        time.sleep(0.5)
        return int(value)
    if word == "signal":
        os.kill(os.getpid(), int(value))
    end = time.monotonic() + 150
    while time.monotonic() < end:
        time.sleep(0.02)
        if signal.SIGTERM in got and word != "stubborn":
            return 143
        if got.count(signal.SIGINT) == 2:
            return 130
    return 99


if __name__ == "__main__":
    if sys.argv[1] == "trainer":
        sys.exit(trainer(sys.argv[2:]))
    sys.exit(launcher(json.loads(sys.argv[2]), sys.argv[3:]))
