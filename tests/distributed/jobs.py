"""What the ranks of a test do."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from cad_mllm.errors import CadMllmError
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


def refused_in_own_folders(flags: list[str]) -> str:
    """Start a run whose output folder is another one on each rank; what it is refused with."""
    config = parse_train_args(flags)
    own = Path(f"{config.run.output_dir}-{os.environ['RANK']}")
    config = replace(config, run=replace(config.run, output_dir=own))
    try:
        with world(config.run) as ranks:
            prepare_run(config, ranks)
    except CadMllmError as error:
        return f"{int(error.exit_code)} {error}"
    return ""
