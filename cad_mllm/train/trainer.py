"""The fit loop, and what it calls by name: one optimiser step, validation, a checkpoint.

A run is stages of optimiser steps over one engine; where it stands is a `Position`, and everything that a
step draws follows from (seed, stage, step), so a run that stops at any step goes on as if it had not.
"""

import faulthandler
import time

import torch
from torch import Tensor

from cad_mllm.config import TrainConfig
from cad_mllm.data.collate import Batch
from cad_mllm.data.loader import Step, StepLoader, eval_batches
from cad_mllm.data.order import stable_hash
from cad_mllm.data.sequence import MODALITIES
from cad_mllm.errors import CadMllmError, ConfigError, ExitCode
from cad_mllm.train import checkpoint, restarts
from cad_mllm.train.ahead import CopiedAhead
from cad_mllm.train.checkpoint import Position
from cad_mllm.train.distributed import spare_the_collector, world
from cad_mllm.train.engine import reset_groups
from cad_mllm.train.rehearsal import PROJECTORS, micro_batch_loss, rehearse_largest
from cad_mllm.train.run import Run, augmentation, prepare_run
from cad_mllm.train.stages import Stage, entering, learning_rates
from cad_mllm.train.stop import StopSignal
from cad_mllm.train.tracking import StepMetrics
from cad_mllm.train.watchdog import Watchdog

_STDERR = 2
_MAX_SKIPPED_IN_A_ROW = 5
"""More steps without a finite loss and gradient in a row are no accident."""
_PROFILED_STEP = 1
"""Step of this process whose communication is measured (step 0 is warm-up)."""


def train(config: TrainConfig) -> ExitCode:
    """Train as configured, on the ranks that the environment names.

    Returns DONE, or STOPPED after SIGTERM or SIGINT with a checkpoint written.

    Raises:
        ConfigError, DataError, CheckpointError, PreflightError: whatever the user can mend.
    """
    # A crash of native code would leave no word: with this the stacks of all threads go to stderr.
    faulthandler.enable(_STDERR)
    with world(config.run) as ranks:
        try:
            run = prepare_run(config, ranks)
            try:
                with StopSignal() as stop, _watchdog(run) as watchdog:
                    if ranks.device.type == "cuda":
                        rehearse(run)
                        watchdog.beat()
                    spare_the_collector()
                    code = fit(run, stop, watchdog)
            except CadMllmError:
                run.writer.let_finish()
                raise
            finally:
                run.tracker.close()
        except Exception as error:
            restarts.note_error(config.run.output_dir, ranks.rank, error)
            raise
        if ranks.is_main:
            restarts.clear(config.run.output_dir)
        return code


def fit(run: Run, stop: StopSignal, watchdog: Watchdog) -> ExitCode:
    """Train the stages that are left; the whole of training in one screen."""
    at = run.start or Position(stage=run.stages[0].number, step=0, global_step=0, stage_complete=False)
    sound = at  # where the weights were updated last
    for stage, previous, done in _remaining(run):
        total = run.total_steps(stage)
        run.tracker.start_stage(f"stage {stage.number} ({stage.name})", total, done)
        if done == 0:
            reset_groups(run.engine, entering(stage, previous))
        for step in _loader(run, stage, start_step=done):
            metrics, stopping = _train_step(run, stage, step, total, at.global_step, stop)
            watchdog.beat()
            complete = step.index + 1 == total
            at = Position(
                stage=stage.number,
                step=step.index + 1,
                global_step=at.global_step + 1,
                stage_complete=complete,
            )
            run.tracker.log_step(metrics)
            sound = at if metrics.is_finite else _endure(run, metrics, sound)
            due = complete or (at.global_step % run.config.run.save_steps == 0 and sound is at)
            if due or stopping:
                run.writer.save(at)
            if due and not stopping:
                stopping = _validate(run, stage, at, watchdog, stop)
            if stopping and not (complete and stage is run.stages[-1]):
                run.writer.finish()
                run.tracker.say(
                    f"stopped by a signal after step {at.global_step}; go on with --resume_from_ckpt auto"
                )
                return ExitCode.STOPPED
    run.writer.finish()
    run.tracker.say(f"done: {at.global_step} steps, newest checkpoint {run.newest_checkpoint}")
    return ExitCode.DONE


def rehearse(run: Run) -> None:
    """Run out of GPU memory now rather than hours later: the largest batch that the data can make.

    On CUDA only: where a CPU's memory ends, the kernel ends the process, and nobody could say why.
    """
    remaining = _remaining(run)
    if not remaining:
        return
    stage, _, _ = remaining[0]
    prompts, targets = run.index.num_prompt_tokens, run.index.num_target_tokens
    shortest = int(prompts.min())
    if run.config.data.caption_dropout:
        shortest = min(shortest, run.index.num_instruction_tokens)
    rehearse_largest(
        run.engine,
        run.built.encoders,
        run.spec,
        run.config.optim,
        run.world.device,
        modalities=run.index.needs,
        trainable=stage.trains & PROJECTORS,
        prompt_tokens=shortest,
        text_tokens=int((prompts + targets).max()),
    )


def _endure(run: Run, metrics: StepMetrics, sound: Position) -> Position:
    """Let a skipped step pass, but not too many in a row: then the run ends with the state before them.

    Raises:
        ConfigError: the limit is reached.
    """
    if metrics.step - sound.global_step < _MAX_SKIPPED_IN_A_ROW:
        return sound
    run.writer.save(sound)
    run.writer.finish()
    raise ConfigError(
        f"{_MAX_SKIPPED_IN_A_ROW} steps in a row had to be skipped; the last, step {metrics.step} of stage "
        f"{metrics.stage}, had loss {metrics.loss} and gradient norm {metrics.grad_norm}. The state before "
        f"them is saved: go on with --resume_from_ckpt auto and a lower --stage{metrics.stage}_lr or more "
        f"--warmup_steps."
    )


def _watchdog(run: Run) -> Watchdog:
    return Watchdog(run.config.run.hang_timeout_minutes * 60, run.config.run.output_dir, run.world.rank)


def _remaining(run: Run) -> list[tuple[Stage, Stage | None, int]]:
    """(stage, the stage before it, steps of it already done) for what this run still has to train."""
    before = [None, *run.stages[:-1]]
    start = run.start
    remaining = []
    for stage, previous in zip(run.stages, before, strict=True):
        done = 0
        if start is not None and stage.number <= start.stage:
            if stage.number < start.stage or start.stage_complete:
                continue
            done = start.step
        if done < run.total_steps(stage):
            remaining.append((stage, previous, done))
    return remaining


def _loader(run: Run, stage: Stage, *, start_step: int) -> StepLoader:
    return StepLoader(
        run.index,
        run.built.tokenizer,
        run.spec,
        seed=run.config.run.seed,
        stage=stage.number,
        mix=stage.mix,
        batch_size=run.config.optim.batch_size,
        accumulation=run.config.optim.gradient_accumulation_steps,
        rank=run.world.rank,
        world_size=run.world.size,
        num_workers=run.config.data.num_workers,
        start_step=start_step,
        num_steps=run.total_steps(stage),
        augmentation=augmentation(run.config),
        pin_memory=run.world.device.type == "cuda",
        packs=run.packs.get(stage.number),
        pack_tokens=run.config.optim.pack_tokens,
        features=run.features,
    )


def _train_step(
    run: Run, stage: Stage, step: Step, total: int, global_step: int, stop: StopSignal
) -> tuple[StepMetrics, bool]:
    """One optimiser step. The loss is the mean over the supervised tokens of all micro-batches and ranks."""
    started = time.perf_counter()
    run.engine.module.train()
    # Dropout (some LMs have it) follows from the position, so that a resumed run draws the same.
    torch.manual_seed(
        stable_hash("step", run.config.run.seed, stage.number, step.index, run.world.rank) % 2**63
    )
    rates = learning_rates(stage, run.config.optim, step.index, total)
    started_at = run.start.global_step if run.start is not None else 0
    profiled = global_step - started_at == _PROFILED_STEP
    supervised_tokens = step.supervised_tokens - run.lost_samples.note(step.lost, "train")
    loss = torch.zeros((), device=run.world.device)
    for number, batch in enumerate(CopiedAhead(step.micro_batches, run.world.device), 1):
        if profiled and number == len(step.micro_batches):  # measuring is slow: one micro-batch is enough
            run.engine.profile_communication(True)
        part = _forward(run, batch, stage.trains & PROJECTORS) / max(1, supervised_tokens)
        # A loss that is not finite can have gradients that are: made NaN, they tell all ranks to skip.
        run.engine.backward(part * torch.where(part.detach().isfinite(), 1.0, torch.nan))
        loss += part.detach()
    norm = run.engine.step(rates)
    if profiled:
        run.engine.profile_communication(False)
    # One small reduction tells every rank the loss, and whether any of them was asked to stop.
    mean, stopping = run.world.sum(float(loss), float(stop.requested))
    memory = (
        torch.cuda.max_memory_allocated(run.world.device) / 1e9 if run.world.device.type == "cuda" else None
    )
    metrics = StepMetrics(
        step=global_step + 1,
        stage=stage.number,
        loss=mean,
        grad_norm=norm,
        lr=rates,
        tokens=step.tokens,
        seconds=time.perf_counter() - started,
        gpu_memory_gb=memory,
    )
    return metrics, stopping > 0


def _forward(run: Run, cpu_batch: Batch, trainable: frozenset[str]) -> Tensor:
    """Summed loss of a micro-batch."""
    return micro_batch_loss(
        run.engine.module, run.built.encoders, cpu_batch, run.world.device, trainable=trainable
    )


@torch.no_grad()
def _validate(run: Run, stage: Stage, at: Position, watchdog: Watchdog, stop: StopSignal) -> bool:
    """Loss per supervised token on the validation data, for each modality mix of the stage.

    The checkpoint of this position is the best one if no other has a lower mean of them.
    True: a rank was asked to stop, so all of them left it unfinished; there is no loss then.
    """
    if run.validation is None:
        return False
    run.engine.module.eval()
    losses: dict[str, float] = {}
    for combo in (c for c in MODALITIES if c in stage.mix):
        loss, tokens = 0.0, 0
        batches = eval_batches(
            run.validation,
            run.built.tokenizer,
            run.spec,
            combo=combo,
            seed=run.config.run.seed,
            batch_size=run.config.optim.batch_size,
            rank=run.world.rank,
            world_size=run.world.size,
            num_workers=run.config.data.num_workers,
            pack_tokens=run.config.optim.pack_tokens,
            features=run.validation_features,
        )
        for loaded in batches:
            run.lost_samples.note(loaded.lost, "val")
            loss += float(_forward(run, loaded.batch, frozenset()))
            tokens += loaded.batch.num_supervised
            watchdog.beat()
            if run.world.sum(float(stop.requested))[0] > 0:
                return True
        total_loss, total_tokens = run.world.sum(loss, float(tokens))
        losses[combo] = total_loss / max(1.0, total_tokens)
    run.tracker.log_validation(step=at.global_step, stage=stage.number, losses=losses)
    if run.world.is_main:
        checkpoint.note_validation(run.config.run.output_dir, at, sum(losses.values()) / len(losses))
    return False
