"""What the ranks of a test do."""

import torch

from cad_mllm.settings import parse_train_args
from cad_mllm.train.distributed import world
from cad_mllm.train.run import prepare_run
from cad_mllm.train.stop import StopSignal
from cad_mllm.train.trainer import fit


def train_all(runs: list[list[str]]) -> list[int]:
    """Train each run (a list of flags) in the same process group; the exit codes."""
    torch.set_num_threads(1)
    configs = [parse_train_args(flags) for flags in runs]
    codes = []
    with world(configs[0].run) as ranks:
        for config in configs:
            run = prepare_run(config, ranks)
            with StopSignal() as stop:
                codes.append(int(fit(run, stop)))
            run.tracker.close()
    return codes
