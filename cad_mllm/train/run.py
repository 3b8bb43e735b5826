"""Set-up of a training run: all that the fit loop needs, built in the order in which mistakes are cheap."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cad_mllm.config import OptimConfig, TrainConfig
from cad_mllm.data.atomic import make_writable
from cad_mllm.data.augment import Augmentation
from cad_mllm.data.collate import SequenceSpec
from cad_mllm.data.dummy import write_dummy_data
from cad_mllm.data.features import FeatureFolder
from cad_mllm.data.index import Index, IndexReport, build_index, load_index
from cad_mllm.data.layout import Source, Split
from cad_mllm.data.loader import eval_samples, pack_stage
from cad_mllm.data.order import num_steps
from cad_mllm.data.packing import PackPlan
from cad_mllm.data.sequence import needed_modalities
from cad_mllm.data.stores import LooseFiles, Store, find_store
from cad_mllm.errors import CheckpointError
from cad_mllm.model.build import Built
from cad_mllm.model.export import export_weights
from cad_mllm.settings import to_flat
from cad_mllm.train import checkpoint, restarts
from cad_mllm.train.assemble import build_engine, build_networks, resolve_zero, sequence_spec
from cad_mllm.train.checkpoint import CheckpointState, Position
from cad_mllm.train.distributed import World
from cad_mllm.train.encode_ahead import encode_ahead
from cad_mllm.train.engine import Engine
from cad_mllm.train.lost import LostSamples
from cad_mllm.train.preflight import check_machines
from cad_mllm.train.provenance import provenance
from cad_mllm.train.stages import Stage, plan
from cad_mllm.train.tracking import RunTracker, Silent, Tracker
from cad_mllm.train.writer import CheckpointWriter

_VALIDATION_SHARE = 8
"""One validation sample for so many dummy samples (at least `_MIN_VALIDATION`)."""
_MIN_VALIDATION = 8


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run that is ready to fit."""

    config: TrainConfig
    world: World
    stages: tuple[Stage, ...]
    built: Built
    spec: SequenceSpec
    index: Index
    validation: Index | None
    features: FeatureFolder | None
    """Those of the training data, in place of its pictures and clouds."""
    validation_features: FeatureFolder | None
    engine: Engine
    tracker: Tracker
    writer: CheckpointWriter
    lost_samples: LostSamples
    packs: Mapping[int, PackPlan]
    """The packs of each stage, by its number; empty if batches are padded."""
    start: Position | None
    """Where the loaded checkpoint stands; None at a fresh start."""
    resumed_from: Path | None

    @property
    def newest_checkpoint(self) -> Path | None:
        """The newest complete one: of this process, or the one that it began with."""
        return self.writer.newest or self.resumed_from

    def total_steps(self, stage: Stage) -> int:
        """Optimiser steps of a stage."""
        if stage.number in self.packs:
            return self.packs[stage.number].num_steps
        return num_steps(len(self.index), stage.epochs, _global_batch(self.config, self.world))


def prepare_run(config: TrainConfig, world: World) -> Run:
    """Check everything, build everything, read the checkpoint.

    Raises:
        ConfigError, DataError, CheckpointError, PreflightError: whatever the user can mend.
    """
    stages = plan(config.curriculum)
    output_dir = config.run.output_dir
    make_writable(output_dir, "--output_dir")
    zero = resolve_zero(config, world)
    checked = check_machines(config, zero, world)
    checked.require()
    resume = _find_checkpoint(config, world)
    state = checkpoint.read_state(resume) if resume is not None else None
    if config.run.resume_from_ckpt == "auto":
        world.from_main(lambda: _count_start(config, state))
    stores = _stores(config, world)
    built = build_networks(config, zero, world)
    spec = sequence_spec(config, built)
    reports = [_index(config, world, built, spec, stages, split, store) for split, store in stores.items()]
    indices = [load_index(report.path) for report in reports]
    identity = _identity(config, _global_batch(config, world), indices[0].fingerprint)
    if state is not None and resume is not None:
        _check_identity(resume, state.identity, identity)
    features: list[FeatureFolder] = []
    notes = list(built.notes)
    if config.data.encoder_features is not None:
        built, features, line = encode_ahead(config, built, spec, stages, indices, world)
        notes.append(line)
    passed_over = world.from_main(lambda: _set_aside(config, resume, state))
    engine = build_engine(config, built, zero, world, log_dir=output_dir)
    if state is not None and resume is not None:
        checkpoint.load(resume, engine, state)
    tracker: Tracker = Silent()
    if world.is_main:
        done = state.position.global_step if state is not None else 0
        tracker = RunTracker(config.run, run_config=to_flat(config), resumed_step=done)
    described = (*notes, *(_describe(report) for report in reports))
    for line in (_describe_world(world), _describe_step(config.optim, world), *checked.warnings, *described):
        tracker.say(line)
    if resume is not None:
        tracker.say(f"resumed from {resume}")
    elif config.run.resume_from_ckpt == "auto":
        tracker.say(f"no checkpoint in {output_dir} yet: starting from the beginning")
    if passed_over is not None:
        tracker.say(f"checkpoints that this run goes on without are now in {passed_over}")
    if len(indices) == 1:
        tracker.say("no validation data (--val_data_path): training loss only")
    elif len(used := eval_samples(len(indices[1]))) < len(indices[1]):
        tracker.say(f"validation loss on {len(used)} of {len(indices[1])} samples, evenly spread")
    origin = provenance(
        checked.ranks,
        deepspeed_config=zero.config if zero is not None else None,
        dataset=indices[0].fingerprint,
    )
    return Run(
        config=config,
        world=world,
        stages=stages,
        built=built,
        spec=spec,
        index=indices[0],
        validation=indices[1] if len(indices) > 1 else None,
        features=features[0] if features else None,
        validation_features=features[1] if len(features) > 1 else None,
        engine=engine,
        tracker=tracker,
        writer=_writer(config, built, engine, world, identity, tracker, origin),
        lost_samples=LostSamples(
            world=world,
            output_dir=output_dir,
            num_samples=len(indices[0]),
            max_fraction=config.data.max_skipped_fraction,
            say=tracker.say,
        ),
        packs=_pack(config, world, spec, indices[0], stages),
        start=state.position if state is not None else None,
        resumed_from=resume,
    )


def _describe_world(world: World) -> str:
    device = "CPU" if world.device.type == "cpu" else torch.cuda.get_device_name(world.device)
    return f"world size {world.size}: {world.local_size} on this machine, {device}"


def _describe_step(optim: OptimConfig, world: World) -> str:
    micro_batches = optim.gradient_accumulation_steps * world.size
    if optim.pack_tokens:
        return f"each step: {micro_batches} x {optim.pack_tokens:,} tokens, packed"
    samples = micro_batches * optim.batch_size
    return f"each step: {micro_batches} x {optim.batch_size} = {samples} samples, padded"


def _global_batch(config: TrainConfig, world: World) -> int:
    """Rows of one optimiser step, over all micro-batches and ranks."""
    return config.optim.rows * config.optim.gradient_accumulation_steps * world.size


def _find_checkpoint(config: TrainConfig, world: World) -> Path | None:
    """Rank 0 reads and verifies; all ranks get its answer, also when it is an error."""
    wanted = config.run.resume_from_ckpt
    if wanted is None:
        return None
    return world.from_main(lambda: checkpoint.find(wanted, config.run.output_dir, _say_early))


def _count_start(config: TrainConfig, state: CheckpointState | None) -> None:
    done = state.position.global_step if state is not None else 0
    limit = config.run.max_restarts_without_progress
    restarts.count_start(config.run.output_dir, global_step=done, limit=limit)


def _set_aside(config: TrainConfig, resume: Path | None, state: CheckpointState | None) -> Path | None:
    """Move away the checkpoints behind the start of this run; where they are now.

    At a fresh start these are all: a later `auto` would mistake them for this run's.
    """
    output_dir = config.run.output_dir
    is_own = resume is not None and resume.resolve().parent == (output_dir / "checkpoints").resolve()
    done = state.position.global_step if state is not None and is_own else -1
    return checkpoint.set_aside(output_dir, after=done)


def _writer(
    config: TrainConfig,
    built: Built,
    engine: Engine,
    world: World,
    identity: Mapping[str, object],
    tracker: Tracker,
    origin: Mapping[str, object],
) -> CheckpointWriter:
    sequence = {
        "target_format": config.data.target_format,
        "quantization_bits": config.data.quantization_bits,
        "max_seq_length": config.data.max_seq_length,
    }

    def describe(position: Position, steps_by_group: Mapping[str, int]) -> CheckpointState:
        return CheckpointState(
            position=position,
            identity=identity,
            config=to_flat(config),
            provenance=origin,
            steps_by_group=steps_by_group,
        )

    def export(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        export_weights(folder, built, config.model, sequence=sequence, tensors=tensors)

    return CheckpointWriter(
        engine,
        world,
        config.run.output_dir,
        keep=config.run.keep_last_n_checkpoints,
        describe=describe,
        export=export,
        say=tracker.say,
    )


def _stores(config: TrainConfig, world: World) -> dict[Split, Store]:
    """Where the samples of each split are; dummy data are written here, by rank 0."""
    if not config.data.create_dummy_data:
        found: dict[Split, Store | None] = {
            "train": find_store(config.data, "train"),
            "val": find_store(config.data, "val"),
        }
        return {split: store for split, store in found.items() if store is not None}
    root, seed, wanted = config.run.output_dir / "dummy_data", config.run.seed, config.data.num_dummy_samples
    sizes: dict[Split, int] = {"train": wanted, "val": max(_MIN_VALIDATION, wanted // _VALIDATION_SHARE)}

    def write() -> None:
        for offset, (split, size) in enumerate(sizes.items()):
            workers = max(1, config.data.num_workers * world.local_size)
            write_dummy_data(root / split, num_samples=size, seed=seed + offset, workers=workers)

    world.from_main(write)
    return {split: LooseFiles(Source.from_folder(root / split)) for split in sizes}


def _index(
    config: TrainConfig,
    world: World,
    built: Built,
    spec: SequenceSpec,
    stages: tuple[Stage, ...],
    split: Split,
    store: Store,
) -> IndexReport:
    return world.from_main(
        lambda: build_index(
            store,
            split,
            built.tokenizer,
            spec,
            needs=needed_modalities(stage.mix for stage in stages),
            target_format=config.data.target_format,
            bits=config.data.quantization_bits,
            max_skipped_fraction=config.data.max_skipped_fraction,
            output_dir=config.run.output_dir,
            workers=max(1, config.data.num_workers * world.local_size),
            augmented=split == "train" and augmentation(config).parts,
        )
    )


def augmentation(config: TrainConfig) -> Augmentation:
    """How the training samples are augmented; validation never is."""
    data = config.data
    return Augmentation(
        prefix=data.augment_prefix, removal=data.augment_removal, caption_dropout=data.caption_dropout
    )


def _pack(
    config: TrainConfig, world: World, spec: SequenceSpec, index: Index, stages: tuple[Stage, ...]
) -> dict[int, PackPlan]:
    """Rank 0 plans for all."""
    if not config.optim.pack_tokens:
        return {}
    return world.from_main(
        lambda: {
            stage.number: pack_stage(
                index,
                spec,
                seed=config.run.seed,
                stage=stage.number,
                mix=stage.mix,
                epochs=stage.epochs,
                pack_tokens=config.optim.pack_tokens,
                packs_per_step=config.optim.gradient_accumulation_steps * world.size,
                augmentation=augmentation(config),
            )
            for stage in stages
        }
    )


def _identity(config: TrainConfig, global_batch: int, fingerprint: str) -> dict[str, object]:
    """What a resumed run must share with the run that wrote the checkpoint, to go on where it stopped."""
    model, data = config.model, config.data
    return {
        "--llm_model_name": model.llm_model_name,
        "--use_lora": model.use_lora,
        "--lora_r": model.lora_r if model.use_lora else None,
        "--lora_alpha": model.lora_alpha if model.use_lora else None,
        "--vision_model_name": model.vision_model_name,
        "--point_encoder": model.point_encoder,
        "--train_encoders": model.train_encoders or None,
        "--target_format": data.target_format,
        "--quantization_bits": data.quantization_bits,
        "--max_seq_length": data.max_seq_length,
        # None where it is off, as in checkpoints from before there was such a flag
        "--augment_prefix": data.augment_prefix or None,
        "--augment_removal": data.augment_removal or None,
        "--caption_dropout": data.caption_dropout or None,
        # The points of a cloud are then the same in every epoch.
        "--encoder_features (given or not)": data.encoder_features is not None or None,
        "--seed": config.run.seed,
        "--pack_tokens": config.optim.pack_tokens or None,
        "global batch (--batch_size x --gradient_accumulation_steps x ranks)": global_batch,
        "training data (fingerprint)": fingerprint,
    }


def _check_identity(folder: Path, saved: Mapping[str, object], now: Mapping[str, object]) -> None:
    for name, value in now.items():
        if saved.get(name) != value:
            before, here = ("off" if one is None else one for one in (saved.get(name), value))
            raise CheckpointError(
                f"{folder} was trained with {name} = {before}, this run has {here}. "
                f"Use the same value, "
                f"or start afresh in another --output_dir without --resume_from_ckpt."
            )


def _describe(report: IndexReport) -> str:
    """What a person must know of the data before the training starts."""
    line = f"{report.split} data: {report.num_usable} samples"
    if report.num_too_long:
        line += f"; {report.num_too_long} longer than --max_seq_length dropped ({report.too_long_share:.1%})"
    if report.num_with_parts is not None:
        line += f"; {report.num_with_parts} of several features can be augmented"
    if report.num_skipped:
        reasons = ", ".join(f"{n} x {why}" for why, n in report.reasons.items())
        line += f"; {report.num_skipped} set aside, see skipped.jsonl ({reasons})"
    return line


def _say_early(message: str) -> None:
    """Before there is a tracker: rank 0's finding, on the console."""
    print(message, flush=True)
