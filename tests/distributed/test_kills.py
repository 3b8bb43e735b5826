"""A rank killed at any moment, saves included: the run that is started again ends as if nobody had."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from cad_mllm.train import checkpoint
from tests.distributed.ranks import start_ranks
from tests.distributed.runs import flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS, SAVE_STEPS, RANKS = 20, 3, 2
ENGINES = ("zero2_config", "zero3_config")
LONGEST_STEPS = 4.0
"""Seconds of training within which a kill is drawn; a run that ends before it is drawn anew."""

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(5400)]


@dataclass(frozen=True)
class Kill:
    """What happened to a run."""

    victim: int
    """Rank."""
    in_save: bool
    step: int
    """Steps done when it was killed."""
    resumed_at: int = -1

    def __str__(self) -> str:
        where = "in a save" if self.in_save else "between saves"
        repeated = self.step - self.resumed_at
        return f"rank {self.victim} after step {self.step:>2}, {where:<13}  {repeated} steps repeated"


def run_flags(data: Path, output_dir: Path, engine: str) -> list[str]:
    stages = {f"stage{n}_epochs": e for n, e in ((1, 3), (2, 3), (3, 4))}
    rates = {f"stage{n}_lr": 3e-3 for n in (1, 2, 3)}
    more = {"save_steps": SAVE_STEPS, "resume_from_ckpt": "auto"}
    return flags(data, output_dir, ranks=RANKS, zero=engine, **stages, **rates, **more)


def is_saving(output_dir: Path) -> bool:
    return any((output_dir / "checkpoints").glob(".tmp-step-*"))


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.001)
    return False


def steps_done(output_dir: Path) -> int:
    metrics = output_dir / "metrics.jsonl"
    return len(losses(output_dir)) if metrics.exists() else 0


def kill_once(words: list[str], output_dir: Path, draw: random.Random, *, in_save: bool) -> Kill | None:
    """Start the run and kill one rank after step 1; None if it was over before."""
    victim = draw.randrange(RANKS)
    with start_ranks(JOBS, "train_all", [words], world_size=RANKS) as ranks:
        assert wait_for(lambda: steps_done(output_dir) >= 1, 200), ranks.output()
        if in_save:
            for _ in range(draw.randint(1, 4)):  # of several saves, any
                wait_for(lambda: not is_saving(output_dir), 20)
                if not wait_for(lambda: is_saving(output_dir), 20):
                    return None
            time.sleep(draw.uniform(0, 0.05))
        else:
            time.sleep(draw.uniform(0, LONGEST_STEPS))
        saving = is_saving(output_dir)
        os.kill(ranks.pids[victim], signal.SIGKILL)
        codes = ranks.wait(120)
    if codes[victim] != -signal.SIGKILL:
        return None
    step = steps_done(output_dir)
    return Kill(victim=victim, in_save=saving, step=step)


def restart_until_done(words: list[str], kill: Kill) -> Kill:
    with start_ranks(JOBS, "train_all", [words], world_size=RANKS) as ranks:
        codes = ranks.wait(280)
        output = ranks.logs[0].read_text()
    assert codes == [0] * RANKS, output
    resumed = re.search(r"resumed from .*step-(\d+)", output)
    at = int(resumed[1]) if resumed else 0
    return replace(kill, resumed_at=at)


def check_unhurt(output_dir: Path, straight: Path, kill: Kill) -> None:
    """The end of the run that was killed is the end of the one that was not."""
    assert losses(output_dir) == losses(straight)
    end, expected = weights(output_dir, STEPS), weights(straight, STEPS)
    assert end.keys() == expected.keys()
    assert all(torch.equal(end[name], expected[name]) for name in expected)
    assert kill.step - kill.resumed_at < 2 * SAVE_STEPS
    folders = list((output_dir / "checkpoints").iterdir())
    assert [folder.name for folder in folders if not folder.name.startswith("step-")] == []
    assert {folder.name: checkpoint.verify(folder) for folder in folders} == dict.fromkeys(
        (folder.name for folder in folders), None
    )


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that nobody killed, made when they are asked for."""
    root, made = tmp_path_factory.mktemp("straight"), set[str]()

    def run(engine: str) -> Path:
        if engine not in made:
            made.add(engine)
            with start_ranks(
                JOBS, "train_all", [run_flags(data, root / engine, engine)], world_size=RANKS
            ) as r:
                assert r.wait(280) == [0] * RANKS, r.output()
        return root / engine

    return run


def kill_and_check(
    data: Path, root: Path, straight: Callable[[str], Path], engine: str, seed: int, *, in_save: bool
) -> Kill:
    draw = random.Random(seed)
    for attempt in range(10):
        out = root / f"{seed}-{attempt}"
        words = run_flags(data, out, engine)
        kill = kill_once(words, out, draw, in_save=in_save)
        if kill is not None and (kill.in_save or not in_save):
            kill = restart_until_done(words, kill)
            check_unhurt(out, straight(engine), kill)
            return kill
    raise AssertionError("ten runs ended before they could be killed")


@pytest.mark.parametrize("in_save", [False, True], ids=["anywhere", "in-a-save"])
def test_a_run_that_lost_a_rank_ends_as_if_it_had_not(
    in_save: bool, data: Path, tmp_path: Path, straight: Callable[[str], Path]
) -> None:
    kill_and_check(data, tmp_path, straight, "zero2_config", seed=int(in_save), in_save=in_save)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_fifteen_kills(engine: str, data: Path, tmp_path: Path, straight: Callable[[str], Path]) -> None:
    kills = []
    for seed in range(ENGINES.index(engine), 30, 2):
        kill = kill_and_check(data, tmp_path, straight, engine, 100 + seed, in_save=seed % 3 == 0)
        kills.append(kill)
        print(f"{len(kills):>2}  {engine:<13} {kill}", flush=True)
    saves = sum(kill.in_save for kill in kills)
    print(f"{len(kills)} kills, {saves} of them in a save; every run ended bit for bit as without")
    assert saves >= 5
