"""What a run tells: a metrics file always, a console line for people, W&B if asked; from rank 0 alone.

Ranks other than 0 get `Silent`, which does nothing, so that the fit loop never asks who it is.
"""

import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cad_mllm.config import RunConfig
from cad_mllm.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimiser step, already reduced over micro-batches and ranks."""

    step: int
    """Global, counted from 1."""
    stage: int
    loss: float
    """Mean over the supervised tokens of the whole step (all micro-batches, all ranks)."""
    grad_norm: float
    """Before clipping, over the groups that train."""
    lr: Mapping[str, float]
    """Per parameter group."""
    tokens: int
    """Tokens in the sequences of the step, padding not counted (all ranks)."""
    seconds: float
    """Wall clock of the step on rank 0."""
    gpu_memory_gb: float | None
    """Peak allocated on rank 0's GPU since the start of the run."""

    @property
    def is_finite(self) -> bool:
        """Whether the step updated the weights: loss and gradient were numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Tracker(Protocol):
    """Where the fit loop reports to."""

    def start_stage(self, title: str, total: int, done: int) -> None:
        """Begin the progress bar of a stage."""

    def log_step(self, metrics: StepMetrics) -> None:
        """One optimiser step."""

    def log_validation(self, *, step: int, stage: int, losses: Mapping[str, float]) -> None:
        """Validation loss per modality mix."""

    def say(self, message: str) -> None:
        """One line for people."""

    def close(self) -> None:
        """Flush and end."""


class Silent:
    """The tracker of the ranks that do not talk."""

    def start_stage(self, title: str, total: int, done: int) -> None:
        """Do nothing."""

    def log_step(self, metrics: StepMetrics) -> None:
        """Do nothing."""

    def log_validation(self, *, step: int, stage: int, losses: Mapping[str, float]) -> None:
        """Do nothing."""

    def say(self, message: str) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class RunTracker:
    """Rank 0: `<output_dir>/metrics.jsonl`, the console, W&B."""

    def __init__(self, config: RunConfig, *, run_config: Mapping[str, object], resumed_step: int) -> None:
        config.output_dir.mkdir(parents=True, exist_ok=True)
        path = config.output_dir / "metrics.jsonl"
        _drop_after(path, resumed_step)
        self._file = path.open("a", encoding="utf-8")
        self._every = config.logging_steps
        self._console = Console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._progress.start()
        self._task: TaskID | None = None
        self._stage_total = self._stage_done = 0
        self._window_tokens, self._window_seconds = 0, 0.0
        self._wandb = _start_wandb(config, run_config) if config.use_wandb else None

    def start_stage(self, title: str, total: int, done: int) -> None:
        """See `Tracker`."""
        self.say(f"{title}: {total - done} of {total} steps to go" if done else f"{title}: {total} steps")
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(title, total=total, completed=done)
        self._stage_total, self._stage_done = total, done

    def log_step(self, metrics: StepMetrics) -> None:
        """See `Tracker`; the file and the console get every `logging_steps`-th step, those that were skipped,
        and a stage's last."""
        assert self._task is not None
        self._stage_done += 1
        self._progress.advance(self._task)
        self._window_tokens += metrics.tokens
        self._window_seconds += metrics.seconds
        if not metrics.is_finite:
            self.say(
                f"WARNING: step {metrics.step} is skipped: "
                f"loss {metrics.loss}, gradient norm {metrics.grad_norm}"
            )
        elif metrics.step % self._every and self._stage_done != self._stage_total:
            return
        rate = self._window_tokens / max(self._window_seconds, 1e-9)
        record: dict[str, object] = {
            "step": metrics.step,
            "stage": metrics.stage,
            # JSON has no word for a number that is not finite.
            "loss": metrics.loss if metrics.is_finite else None,
            "grad_norm": metrics.grad_norm if metrics.is_finite else None,
            "tokens_per_second": rate,
            "step_seconds": metrics.seconds,
            "gpu_memory_gb": metrics.gpu_memory_gb,
            **{f"lr/{group}": lr for group, lr in metrics.lr.items()},
        }
        self._write(record)
        left = (self._stage_total - self._stage_done) * metrics.seconds
        memory = "" if metrics.gpu_memory_gb is None else f"  {metrics.gpu_memory_gb:5.1f} GB"
        self._console.print(
            f"step {metrics.step:6d}  stage {metrics.stage}  loss {metrics.loss:7.4f}  "
            f"lr {max(metrics.lr.values()):.2e}  {rate:9,.0f} tokens/s{memory}  "
            f"stage ends in {_duration(left)}",
            highlight=False,
            soft_wrap=True,
        )
        self._window_tokens, self._window_seconds = 0, 0.0

    def log_validation(self, *, step: int, stage: int, losses: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._write({"step": step, "stage": stage, "val_loss": dict(losses)})
        self.say("validation loss: " + "  ".join(f"{combo} {loss:.4f}" for combo, loss in losses.items()))

    def say(self, message: str) -> None:
        """See `Tracker`."""
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """See `Tracker`."""
        self._progress.stop()
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, record: Mapping[str, object]) -> None:
        self._file.write(json.dumps({**record, "time": time.time()}) + "\n")
        self._file.flush()
        if self._wandb is not None:
            flat = dict(record)
            losses = flat.pop("val_loss", {})
            assert isinstance(losses, dict)
            self._wandb.log({**flat, **{f"val_loss/{k}": v for k, v in losses.items()}}, step=record["step"])


def _drop_after(path: Path, step: int) -> None:
    """Forget the steps that a resumed run is going to repeat, and a line that was cut by a kill."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)


def _start_wandb(config: RunConfig, run_config: Mapping[str, object]) -> Any:
    import wandb

    try:
        return wandb.init(
            project=config.wandb_project,
            name=config.wandb_run_name,
            entity=config.wandb_entity,
            dir=str(config.output_dir),
            config={k: str(v) for k, v in run_config.items()},
        )
    except (wandb.errors.Error, OSError) as e:
        raise ConfigError(
            f"--use_wandb: W&B did not start ({e}). Log in with `wandb login`, set WANDB_API_KEY, "
            f"or set WANDB_MODE=offline."
        ) from e


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
