"""How long the step loop stands still for checkpoints and logging, as a share of the steps' time.

    deepspeed --num_gpus=2 tests/bench/checkpoint_stall.py <the flags of a training run>

Prints one JSON object on rank 0 and writes it to `<output_dir>/checkpoint_stall.json`.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cad_mllm.settings import parse_train_args  # noqa: E402
from cad_mllm.train.distributed import world  # noqa: E402
from cad_mllm.train.run import prepare_run  # noqa: E402
from cad_mllm.train.stop import StopSignal  # noqa: E402
from cad_mllm.train.trainer import fit  # noqa: E402
from cad_mllm.train.watchdog import Watchdog  # noqa: E402


class Stopwatch:
    """Adds up the time spent in the functions that it wraps."""

    def __init__(self) -> None:
        self.calls: list[float] = []

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed."""

        def timed(*arguments: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.calls.append(time.perf_counter() - started)

        return timed


def main(argv: list[str]) -> None:
    """Run the training of the flags, timed."""
    config = parse_train_args(argv)
    with world(config.run) as ranks:
        run = prepare_run(config, ranks)
        saving, logging = Stopwatch(), Stopwatch()
        steps: list[float] = []
        log_step = run.tracker.log_step

        def log(metrics: Any) -> None:
            steps.append(metrics.seconds)
            log_step(metrics)

        run.writer.save = saving.around(run.writer.save)  # type: ignore[method-assign]
        run.tracker.log_step = logging.around(log)  # type: ignore[method-assign]
        with StopSignal() as stop, Watchdog(1200, config.run.output_dir, ranks.rank) as watchdog:
            fit(run, stop, watchdog)
        run.tracker.close()
        if ranks.is_main:
            stalled = sum(saving.calls) + sum(logging.calls)
            result = {
                "steps": len(steps),
                "median step s": sorted(steps)[len(steps) // 2],
                "steps s": sum(steps),
                "saves s": saving.calls,
                "logging s": sum(logging.calls),
                "stall": stalled / sum(steps),
                "stall without the last save": (stalled - saving.calls[-1]) / sum(steps),
            }
            (config.run.output_dir / "checkpoint_stall.json").write_text(json.dumps(result, indent=1))
            print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main([argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
