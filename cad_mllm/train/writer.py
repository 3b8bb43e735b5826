"""Checkpoints written beside training: the step loop waits for a copy in host memory, and for nothing else.

Each rank copies its fp32 masters and moments, then a thread writes them; the ranks' threads tell each other
how it went over a process group of their own, and rank 0's seals the checkpoint. A write that fails (a full
disk) leaves the checkpoints before it as they were, and training goes on.
"""

import json
import os
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from cad_mllm.errors import CheckpointError
from cad_mllm.train.checkpoint import (
    COMPLETE,
    MASTER,
    STATE,
    TEMPORARY,
    CheckpointState,
    Position,
    ShardReader,
    digests_of,
    prune,
    step_folder,
    verify,
)
from cad_mllm.train.distributed import World
from cad_mllm.train.engine import Engine
from cad_mllm.train.optim import MOMENTS, Flat, get_step

Describe = Callable[[Position, Mapping[str, int]], CheckpointState]
"""What a checkpoint says of its run, given the position and the updates of each group's moments."""
Export = Callable[[Path, Mapping[str, Tensor]], None]
"""Write the trained weights, given by name (fp32, on the CPU, read when they are asked for), into a folder as
other tools load them."""

_REUSED_BYTES = 4 * 2**30
"""Host memory of a copy is page-locked and kept for the next one up to this size (LoRA's is about 1 GB)."""


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """A rank's part of a checkpoint, in host memory."""

    position: Position
    tensors: Mapping[str, Tensor]
    """`<kind>/<parameter>` -> 1-D fp32."""
    table: Mapping[str, object]
    """Parameter -> which of its elements these are."""
    steps_by_group: Mapping[str, int]


class CheckpointWriter:
    """Writes the checkpoints of a run. Every rank calls every method, in the same order."""

    def __init__(
        self,
        engine: Engine,
        world: World,
        output_dir: Path,
        *,
        keep: int,
        describe: Describe,
        export: Export,
        say: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._world = world.fork()
        self._output_dir = output_dir
        self._keep = keep
        self._describe = describe
        self._export = export
        self._say = say
        size = sum(
            flat.master.numel() * flat.master.element_size() * (1 + len(MOMENTS)) for flat in engine.flats
        )
        self._is_reused = size <= _REUSED_BYTES
        # Offloaded state is in host memory already, and twice may be too much: the loop waits instead.
        self._is_offloaded = world.device.type == "cuda" and any(f.master.is_cpu for f in engine.flats)
        self._buffers: dict[tuple[int, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._outcome: Exception | str | None = None
        self._saved: Path | None = None

    @property
    def newest(self) -> Path | None:
        """The newest checkpoint that this process has completed."""
        return self._saved

    def save(self, position: Position) -> None:
        """Copy the state, and write it while training goes on (offloaded state: write it before that).

        Waits for the write before it; says so if that one failed.
        """
        self._wait()
        snapshot = self._snapshot(position)
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()
        if self._is_offloaded:
            self._thread.join()

    def finish(self) -> None:
        """Wait until everything is on the disk.

        Raises:
            CheckpointError: the newest checkpoint could not be written.
        """
        failure = self._wait()
        if failure is not None:
            raise CheckpointError(
                f"{failure}. The checkpoints before it are untouched; make room or mend the volume, and go "
                f"on with --resume_from_ckpt auto."
            )

    def let_finish(self) -> None:
        """Wait for a write under way, whatever comes of it: the run is ending with an error of its own."""
        if self._thread is not None:
            self._thread.join()

    def _wait(self) -> str | None:
        """Why the last write failed, on every rank alike; None if it did not."""
        if self._thread is None:
            return None
        self._thread.join()
        self._thread = None
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Exception):
            raise outcome  # of a lost peer, or a bug: not the disk's
        if outcome is not None:
            self._say(f"WARNING: {outcome}. Training goes on; the next save tries again.")
        return outcome

    def _snapshot(self, position: Position) -> _Snapshot:
        tensors: dict[str, Tensor] = {}
        table: dict[str, object] = {}
        for number, flat in enumerate(self._engine.flats):
            state = self._engine.optimizer.state[flat.master]
            for kind, source in {MASTER: flat.master.detach(), **_moments(flat, state)}.items():
                copied = self._copy((number, kind), source)
                for f in flat.fragments:
                    tensors[f"{kind}/{f.name}"] = copied[f.offset : f.offset + f.length]
            for f in flat.fragments:
                table[f.name] = {"start": f.start, "numel": f.numel, "shape": list(f.shape)}
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        steps = {flat.group: get_step(self._engine.optimizer, flat) for flat in self._engine.flats}
        return _Snapshot(position=position, tensors=tensors, table=table, steps_by_group=steps)

    def _copy(self, key: tuple[int, str], source: Tensor) -> Tensor:
        """The tensor, in host memory that the next steps do not write to."""
        if self._is_offloaded:
            return source
        if not self._is_reused:
            return source.to("cpu", copy=True)
        buffer = self._buffers.get(key)
        if buffer is None:
            pinned = self._world.device.type == "cuda"
            buffer = torch.empty(source.numel(), dtype=torch.float32, pin_memory=pinned)
            self._buffers[key] = buffer
        return buffer.copy_(source, non_blocking=True)

    def _run(self, snapshot: _Snapshot) -> None:
        """The thread's work. What it raises is raised by the next `save` or `finish`."""
        try:
            self._outcome = self._write(snapshot)
        except Exception as error:
            self._outcome = error

    def _write(self, snapshot: _Snapshot) -> str | None:
        """Write one checkpoint, with all ranks' threads; why it failed, on every rank alike."""
        folder = step_folder(self._output_dir, snapshot.position.global_step)
        temporary = folder.with_name(TEMPORARY + folder.name)
        failure: str | None = None
        try:
            failure = self._world.from_main(lambda: _try(lambda: _make_empty(temporary)))
            if failure is None:
                own = _try(lambda: self._write_shard(temporary / "shards", snapshot))
                failures = self._world.gather(own)
                failure = next((reason for reason in failures if reason is not None), None)
            if failure is None:
                failure = self._world.from_main(lambda: _try(lambda: self._seal(temporary, folder, snapshot)))
        finally:
            if self._world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
        if failure is not None:
            return f"could not write {folder}: {failure}"
        self._saved = folder
        if self._world.is_main:
            left = _try(lambda: prune(self._output_dir, keep=self._keep))
            if left is not None:
                self._say(f"WARNING: an old checkpoint could not be removed: {left}")
        return None

    def _write_shard(self, shards: Path, snapshot: _Snapshot) -> None:
        path = shards / f"rank-{self._world.rank:05d}-of-{self._world.size:05d}.safetensors"
        save_file(dict(snapshot.tensors), path, metadata={"fragments": json.dumps(snapshot.table)})
        _fsync(path)

    def _seal(self, temporary: Path, folder: Path, snapshot: _Snapshot) -> None:
        """Rank 0: add the export and the state, mark the folder complete, give it its name."""
        (temporary / "model").mkdir()
        self._export(temporary / "model", ShardReader(temporary / "shards"))
        state = self._describe(snapshot.position, snapshot.steps_by_group)
        (temporary / STATE).write_text(json.dumps(asdict(state), indent=1, default=str))
        _mark_complete(temporary)
        if folder.exists() and verify(folder) is None:
            return  # the same step of the same run, whole: nothing is gained by replacing it
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        _fsync(folder.parent)


def _moments(flat: Flat, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Adam's moments of a buffer; zero where it has not been updated yet."""
    return {key: state[key] if key in state else torch.zeros_like(flat.master) for key in MOMENTS}


def _make_empty(temporary: Path) -> None:
    for left_by_a_kill in temporary.parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left_by_a_kill)
    (temporary / "shards").mkdir(parents=True)


def _try(work: Callable[[], None]) -> str | None:
    """What the disk has against it, in words; None if the work is done."""
    try:
        work()
    except (OSError, SafetensorError) as error:
        return str(error)
    return None


def _mark_complete(folder: Path) -> None:
    """Write COMPLETE: from here on the folder is a checkpoint. Everything is on the disk before it."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    digests = dict(zip(names, digests_of(files), strict=True))
    for path in files:
        _fsync(path)
    mark = folder / COMPLETE
    mark.write_text(json.dumps({"sha256": digests}, indent=1))
    _fsync(mark)
    for directory in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        _fsync(directory)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
