"""Checkpoints: complete or not there, free of the world size, without pickle.

    <output_dir>/checkpoints/step-00000120/
        shards/rank-00000-of-00002.safetensors   this rank's fp32 masters and Adam moments, by parameter
        model/                                   the trained weights as plain peft / transformers load them
        state.json                               position, configuration, dataset fingerprint, provenance
        COMPLETE                                 sha256 of every file above; written last

A checkpoint is written under a temporary name, every file is fsynced, then the folder is renamed
(`writer.py`). A shard file says for each parameter which elements it holds, so any engine on any number of
ranks can read the state of any other. There is no RNG state to keep: every draw follows from (seed, step).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cad_mllm.data.atomic import atomic_path
from cad_mllm.errors import CheckpointError
from cad_mllm.model.names import stored_name
from cad_mllm.train.engine import Engine
from cad_mllm.train.optim import MOMENTS, Flat, replay_steps, set_step

COMPLETE = "COMPLETE"
STATE = "state.json"
MASTER = "master"
TEMPORARY = ".tmp-"
_BEST = "best.json"
_READ_AT_ONCE = 8
"""Files; more of them gain nothing on one volume."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where a run stands: `step` optimiser steps of `stage` are done, `global_step` in all."""

    stage: int
    step: int
    global_step: int
    stage_complete: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """What a checkpoint says of its run, beside the tensors."""

    position: Position
    identity: Mapping[str, object]
    """What must not differ on resume: model, data, order, batch. Flag name -> value."""
    config: Mapping[str, object]
    """All flags of the run, for the record."""
    provenance: Mapping[str, object]
    steps_by_group: Mapping[str, int]
    """Updates that each group's Adam moments have seen."""


def step_folder(output_dir: Path, global_step: int) -> Path:
    """Where the checkpoint after so many optimiser steps lies."""
    return output_dir / "checkpoints" / f"step-{global_step:08d}"


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


@dataclass(frozen=True, kw_only=True)
class Best:
    """The checkpoint with the lowest validation loss of the latest stage that has one."""

    stage: int
    global_step: int
    loss: float
    """Mean over the modality combinations of the stage."""


def read_best(output_dir: Path) -> Best | None:
    """The best checkpoint so far; None if nothing was validated yet."""
    try:
        return Best(**json.loads((output_dir / _BEST).read_text()))
    except (OSError, ValueError, TypeError):
        return None  # none yet, or torn: the next validation writes it anew


def note_validation(output_dir: Path, at: Position, loss: float) -> None:
    """The checkpoint at this position has this validation loss: is it the best one? (rank 0 only)"""
    best = read_best(output_dir)
    if best is None or at.stage > best.stage or (at.stage == best.stage and loss < best.loss):
        found = Best(stage=at.stage, global_step=at.global_step, loss=loss)
        with atomic_path(output_dir / _BEST) as temporary:
            temporary.write_text(json.dumps(asdict(found)))


def set_aside(output_dir: Path, *, after: int) -> Path | None:
    """Move what lies in `checkpoints/` behind step `after` out of the way: the run goes on without it.

    Damaged checkpoints that a resume passed over, and those of a run that is started anew or from an earlier
    point, would otherwise be the newest ones for the next `auto`. Returns where they are now, None if there
    were none.
    """
    best = read_best(output_dir)
    if best is not None and best.global_step > after:
        (output_dir / _BEST).unlink()
    passed_over = [folder for folder in _newest_first(output_dir) if _step_of(folder) > after]
    if not passed_over:
        return None
    numbers = (int(path.name.rpartition("-")[2]) for path in output_dir.glob("checkpoints-set-aside-*"))
    aside = output_dir / f"checkpoints-set-aside-{max(numbers, default=0) + 1}"
    aside.mkdir()
    for folder in passed_over:
        folder.rename(aside / folder.name)
    return aside


def prune(output_dir: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` step checkpoints (0: none); the best and those at stage ends stay."""
    if keep == 0:
        return
    best = read_best(output_dir)
    candidates = [
        folder
        for folder in _newest_first(output_dir)
        if (folder / COMPLETE).exists()
        and not read_state(folder).position.stage_complete
        and not (best is not None and _step_of(folder) == best.global_step)
    ]
    for old in candidates[keep:]:
        # Renamed first, so that a half-removed folder is never taken for a checkpoint.
        doomed = old.with_name(TEMPORARY + old.name)
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(old, doomed)
        shutil.rmtree(doomed)


def find(resume_from: str, output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The checkpoint that `--resume_from_ckpt` means; None if `auto` finds that there is none yet.

    With `auto` a damaged checkpoint is named and the one before it is taken.

    Raises:
        CheckpointError: the named one is damaged or missing, or there are checkpoints and none is usable.
    """
    if resume_from != "auto":
        folder = Path(resume_from)
        if not (folder / COMPLETE).exists() and (folder / "checkpoints").is_dir():
            newest = find("auto", folder, say)
            if newest is None:
                raise _none_usable(folder)
            return newest
        damage = verify(folder)
        if damage is not None:
            raise CheckpointError(f"--resume_from_ckpt {folder}: {damage}. Name another one, or use auto.")
        return folder
    candidates = _newest_first(output_dir)
    for folder in candidates:
        damage = verify(folder)
        if damage is None:
            return folder
        say(f"checkpoint {folder.name} is not usable ({damage}); trying the one before it")
    if candidates:
        raise _none_usable(output_dir)
    return None


def _none_usable(output_dir: Path) -> CheckpointError:
    return CheckpointError(
        f"no usable checkpoint in {output_dir / 'checkpoints'}. Restore one, or start afresh in another "
        f"--output_dir: a run does not start from scratch over a failed resume."
    )


def _newest_first(output_dir: Path) -> list[Path]:
    """The folders that are named as step checkpoints, whole or not."""
    found = (output_dir / "checkpoints").glob("step-*")
    return sorted((f for f in found if f.name.removeprefix("step-").isdigit()), key=_step_of, reverse=True)


def verify(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, in a few words; None if it is whole."""
    if not folder.is_dir():
        return "no such folder"
    try:
        manifest = json.loads((folder / COMPLETE).read_text())
        files: Mapping[str, str] = manifest["sha256"]
        found = digests_of([folder / name for name in files])
        for (name, written), read in zip(files.items(), found, strict=True):
            if read != written:
                return f"{name} does not match its checksum"
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        return f"unreadable: {e}"
    return None


def read_state(folder: Path) -> CheckpointState:
    """Read what a (verified) checkpoint says of its run.

    Raises:
        CheckpointError: it was written by another version and says something else.
    """
    try:
        raw = json.loads((folder / STATE).read_text())
        return CheckpointState(**{**raw, "position": Position(**raw["position"])})
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise CheckpointError(
            f"{folder / STATE}: not the state of a checkpoint of this version ({e})."
        ) from e


def load(folder: Path, engine: Engine, state: CheckpointState) -> None:
    """Read masters and moments into the engine, whatever engine and world size wrote them.

    Raises:
        CheckpointError: a parameter is missing or has another size.
    """
    reader = ShardReader(folder / "shards")
    with torch.no_grad():
        for flat in engine.flats:
            _read_flat(reader, flat, flat.master, MASTER)
            optimizer_state = engine.optimizer.state[flat.master]
            for key in MOMENTS:
                optimizer_state[key] = torch.zeros_like(flat.master)
                _read_flat(reader, flat, optimizer_state[key], key)
            set_step(engine.optimizer, flat, state.steps_by_group.get(flat.group, 0))
        replay_steps(engine.optimizer, engine.flats)
    engine.refresh()


def _read_flat(reader: "ShardReader", flat: Flat, target: Tensor, kind: str) -> None:
    for f in flat.fragments:
        target[f.offset : f.offset + f.length].copy_(reader.read(kind, f.name, f.start, f.length, f.numel))


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Elements [start, start + length) of a flattened parameter, in one shard file."""

    start: int
    length: int
    path: Path
    name: str
    """In that file."""


class ShardReader(Mapping[str, Tensor]):
    """Parameters and moments of a checkpoint, from the pieces that its ranks wrote.

    As a mapping: the whole master weights, fp32, in their own shapes, each read when it is asked for.

    Raises:
        CheckpointError: a file is unreadable, or elements are missing.
    """

    def __init__(self, folder: Path) -> None:
        self._pieces: dict[str, list[_Piece]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._open: dict[Path, safe_open] = {}
        for path in sorted(folder.glob("rank-*.safetensors")):
            try:
                handle = safe_open(path, framework="pt")
                table = json.loads(handle.metadata()["fragments"])
                self._open[path] = handle
            except (OSError, SafetensorError, ValueError, KeyError, TypeError) as e:
                raise CheckpointError(f"{path}: not a readable shard ({e}).") from e
            for name, piece in table.items():
                length = handle.get_slice(f"{MASTER}/{name}").get_shape()[0]
                found = _Piece(start=piece["start"], length=length, path=path, name=name)
                self._pieces.setdefault(stored_name(name), []).append(found)
                self._shapes[stored_name(name)] = tuple(piece["shape"])
        if not self._pieces:
            raise CheckpointError(f"{folder}: no shards of a checkpoint in here.")

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._pieces))

    def __len__(self) -> int:
        return len(self._pieces)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        numel = int(torch.Size(shape).numel())
        return self.read(MASTER, name, 0, numel, numel).view(shape)

    def read(self, kind: str, name: str, start: int, length: int, numel: int) -> Tensor:
        """Elements [start, start + length) of a flattened parameter of `numel` elements."""
        if name not in self._pieces:
            raise CheckpointError(
                f"the checkpoint has no {name}: it belongs to another model or to other LoRA settings."
            )
        held = int(torch.Size(self._shapes[name]).numel())
        if held != numel:
            raise CheckpointError(f"{name} has {held} elements in the checkpoint and {numel} in this model.")
        out, filled = torch.empty(length), 0
        for piece in self._pieces[name]:
            low, high = max(start, piece.start), min(start + length, piece.start + piece.length)
            if low < high:
                held_here = self._open[piece.path].get_slice(f"{kind}/{piece.name}")
                part = held_here[low - piece.start : high - piece.start]
                out[low - start : high - start] = part
                filled += high - low
        if filled != length:
            raise CheckpointError(
                f"the checkpoint's shards lack elements of {name}: a shard file is missing."
            )
        return out


def digests_of(paths: Sequence[Path]) -> list[str]:
    """sha256 of each file, several read at once: of an 8B LM with its optimiser state they are 115 GB."""

    def sha256_of(path: Path) -> str:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:
        return list(pool.map(sha256_of, paths))
