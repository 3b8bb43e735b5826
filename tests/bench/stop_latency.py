"""How long a run takes to end after SIGTERM, beside its steps and its saves.

    python tests/bench/stop_latency.py --stops 10 -- <the flags of a training run>

Trains with the flags on two ranks under our launcher, then in one process of plain python without DeepSpeed,
stops each `--stops` times at random moments, resuming in between, and prints a table. "last word" is the time
until rank 0 says that it stopped, its checkpoint complete; "exit" is the end of the last process.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
STOPPED = 143
_TWO_RANKS = {
    "PET_NNODES": "1", "PET_NPROC_PER_NODE": "2", "PET_NODE_RANK": "0",
    "PET_MASTER_ADDR": "127.0.0.1", "PET_MASTER_PORT": "29541",
}  # fmt: skip
_ZERO2 = ["--deepspeed", "--deepspeed_config", str(ROOT / "configs" / "deepspeed" / "ds_zero2_config.json")]
STARTS: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
    "launcher, 2 ranks, ZeRO-2": (["-m", "cad_mllm.launch"], _TWO_RANKS, _ZERO2),
    "python, 1 process": (["-m", "cad_mllm.train_curriculum"], {}, []),
}


def stop_once(command: list[str], environment: dict[str, str], draw: random.Random) -> tuple[float, float]:
    """Start a run, let it make steps, stop it: seconds to its last word and to its exit."""
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    asked = last_word = 0.0
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("step ") and not asked:
            time.sleep(draw.uniform(0, 3))
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
        if line.startswith("stopped by a signal"):
            last_word = time.monotonic() - asked
    code = process.wait()
    if code != STOPPED:
        sys.exit(f"exit code {code} instead of {STOPPED}:\n{''.join(lines[-20:])}")
    return last_word, time.monotonic() - asked


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stops", type=int, default=10)
    parser.add_argument("flags", nargs="*")
    given = parser.parse_args()
    draw = random.Random(0)
    table = Table("start", "median step s", "last word s: median, most", "exit s: median, most")
    for name, (module, variables, more) in STARTS.items():
        with tempfile.TemporaryDirectory() as folder:
            flags = [*given.flags, *more, "--output_dir", folder, "--resume_from_ckpt", "auto"]
            command = [sys.executable, *module, *flags, "--logging_steps", "1"]
            times = [stop_once(command, {**os.environ, **variables}, draw) for _ in range(given.stops)]
            records = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
            steps = [record["step_seconds"] for record in records if "step_seconds" in record]
        words, exits = zip(*times, strict=True)
        table.add_row(
            name,
            f"{statistics.median(steps):.2f}",
            *(f"{statistics.median(part):.2f}, {max(part):.2f}" for part in (words, exits)),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
