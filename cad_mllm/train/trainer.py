"""The fit loop, and what it calls by name: one optimiser step, validation, a checkpoint.

A run is stages of optimiser steps over one engine; where it stands is a `Position`, and everything that a
step draws follows from (seed, stage, step), so a run that stops at any step goes on as if it had not.
"""

import math
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cad_mllm.config import TrainConfig
from cad_mllm.data.collate import Batch
from cad_mllm.data.loader import Step, StepLoader, eval_batches
from cad_mllm.data.order import stable_hash
from cad_mllm.data.sequence import MODALITIES
from cad_mllm.errors import ConfigError, ExitCode
from cad_mllm.model.export import export_weights
from cad_mllm.model.multimodal import logit_positions
from cad_mllm.settings import to_flat
from cad_mllm.train import checkpoint
from cad_mllm.train.checkpoint import CheckpointState, Position
from cad_mllm.train.distributed import world
from cad_mllm.train.engine import reset_groups
from cad_mllm.train.run import Run, prepare_run
from cad_mllm.train.stages import IMAGE_PROJECTOR, POINT_PROJECTOR, Stage, entering, learning_rates
from cad_mllm.train.stop import StopSignal
from cad_mllm.train.tracking import StepMetrics

_PROJECTORS = frozenset({POINT_PROJECTOR, IMAGE_PROJECTOR})
_PROFILED_STEP = 1
"""Step of this process whose communication is measured (step 0 is warm-up)."""


def train(config: TrainConfig) -> ExitCode:
    """Train as configured, on the ranks that the environment names.

    Returns DONE, or STOPPED after SIGTERM or SIGINT with a checkpoint written.

    Raises:
        ConfigError, DataError, CheckpointError: whatever the user can mend.
    """
    with world(config.run) as ranks:
        run = prepare_run(config, ranks)
        try:
            with StopSignal() as stop:
                return fit(run, stop)
        finally:
            run.tracker.close()


def fit(run: Run, stop: StopSignal) -> ExitCode:
    """Train the stages that are left; the whole of training in one screen."""
    global_step = run.start.global_step if run.start is not None else 0
    saved_step = global_step if run.start is not None else -1
    for stage, previous, done in _remaining(run):
        total = run.total_steps(stage)
        run.tracker.start_stage(f"stage {stage.number} ({stage.name})", total, done)
        if done == 0:
            reset_groups(run.engine, entering(stage, previous))
        for step in _loader(run, stage, start_step=done):
            metrics, stopping = _train_step(run, stage, step, total, global_step, stop)
            global_step, done = global_step + 1, step.index + 1
            run.tracker.log_step(metrics)
            at = Position(
                stage=stage.number, step=done, global_step=global_step, stage_complete=done == total
            )
            if stopping or at.stage_complete or global_step % run.config.run.save_steps == 0:
                _save(run, at)
                saved_step = global_step
            if stopping and not (at.stage_complete and stage is run.stages[-1]):
                run.tracker.say(
                    f"stopped by a signal after step {global_step}; go on with --resume_from_ckpt auto"
                )
                return ExitCode.STOPPED
        _validate(run, stage, global_step)
    run.tracker.say(
        f"done: {global_step} steps, newest checkpoint "
        f"{checkpoint.step_folder(run.config.run.output_dir, saved_step)}"
    )
    return ExitCode.DONE


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
        pin_memory=run.world.device.type == "cuda",
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
    loss = torch.zeros((), device=run.world.device)
    for batch in step.micro_batches:
        if profiled and batch is step.micro_batches[-1]:  # measuring is slow: one micro-batch is enough
            run.engine.profile_communication(True)
        part = _forward(run, batch, stage.trains & _PROJECTORS) / step.supervised_tokens
        run.engine.backward(part)
        loss += part.detach()
    norm = run.engine.step(rates)
    if profiled:
        run.engine.profile_communication(False)
    # One small reduction tells every rank the loss, and whether any of them was asked to stop.
    mean, stopping = run.world.sum(float(loss), float(stop.requested))
    if not (math.isfinite(mean) and math.isfinite(norm)):
        raise ConfigError(
            f"step {global_step + 1} (stage {stage.number}): loss {mean}, gradient norm {norm}. "
            f"Go back to a checkpoint with --resume_from_ckpt and a lower --stage{stage.number}_lr "
            f"or more --warmup_steps."
        )
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
    """Summed loss of a micro-batch: frozen encoders first, then the engine's module."""
    positions = logit_positions(cpu_batch.labels_BT).to(run.world.device)
    batch = cpu_batch.to(run.world.device)
    loss: Tensor = run.engine.module(
        batch.tokens_BT,
        batch.attention_mask_BT,
        batch.labels_BT,
        run.built.encoders.encode_images(batch.images_NCHW),
        batch.image_rows,
        run.built.encoders.encode_points(batch.points_MPC),
        batch.point_rows,
        trainable=trainable,
        logit_positions_S=positions,
    )
    return loss


@torch.no_grad()
def _validate(run: Run, stage: Stage, global_step: int) -> None:
    """Loss per supervised token on the validation data, for each modality mix of the stage."""
    if run.validation is None:
        return
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
        )
        for batch in batches:
            loss += float(_forward(run, batch, frozenset()))
            tokens += batch.num_supervised
        total_loss, total_tokens = run.world.sum(loss, float(tokens))
        losses[combo] = total_loss / total_tokens
    run.tracker.log_validation(step=global_step, stage=stage.number, losses=losses)


def _save(run: Run, at: Position) -> None:
    """Write a checkpoint (all ranks), then drop the ones that are no longer kept."""
    config, built = run.config, run.built
    sequence = {
        "target_format": config.data.target_format,
        "quantization_bits": config.data.quantization_bits,
        "max_seq_length": config.data.max_seq_length,
    }

    def state(steps_by_group: Mapping[str, int]) -> CheckpointState:
        return CheckpointState(
            position=at,
            identity=run.identity,
            config=to_flat(config),
            provenance=run.provenance,
            steps_by_group=steps_by_group,
        )

    def export(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        export_weights(folder, built, config.model, sequence=sequence, tensors=tensors)

    output_dir = config.run.output_dir
    checkpoint.save(
        checkpoint.step_folder(output_dir, at.global_step), run.engine, run.world, state=state, export=export
    )
    if run.world.is_main:
        checkpoint.prune(output_dir, keep=config.run.keep_last_n_checkpoints)
