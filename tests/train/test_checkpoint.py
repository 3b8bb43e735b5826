"""A checkpoint is whole or not there; a damaged one is named, and a run never starts over in silence."""

import json
import os
import shutil
import subprocess
import threading
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cad_mllm.errors import CheckpointError
from cad_mllm.train import checkpoint
from cad_mllm.train.checkpoint import CheckpointState, Position, ShardReader, step_folder
from cad_mllm.train.distributed import World
from cad_mllm.train.engine import PlainEngine, reset_groups
from cad_mllm.train.writer import CheckpointWriter, Export
from cad_mllm.train.zero import OptimizerSettings

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), control=None)


def small_engine(seed: int = 0, width: int = 3) -> PlainEngine:
    torch.manual_seed(seed)
    module = nn.Linear(4, width)
    return PlainEngine(
        module,
        {"lm": list(module.named_parameters())},
        OptimizerSettings(),
        max_grad_norm=1.0,
    )


def train_steps(engine: PlainEngine, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        engine.backward(engine.module(torch.randn(5, 4)).square().sum())
        engine.step({"lm": 0.1})


def describe(position: Position, steps_by_group: Mapping[str, int]) -> CheckpointState:
    return CheckpointState(
        position=position, identity={"--seed": 1}, config={}, provenance={}, steps_by_group=steps_by_group
    )


def export_names(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    (folder / "names.json").write_text(json.dumps(sorted(tensors)))


def writer_of(
    engine: PlainEngine, output_dir: Path, *, export: Export = export_names, keep: int = 0
) -> CheckpointWriter:
    return CheckpointWriter(
        engine, ALONE, output_dir, keep=keep, describe=describe, export=export, say=lambda message: None
    )


def at_step(step: int, *, stage_complete: bool = False) -> Position:
    return Position(stage=1, step=step, global_step=step, stage_complete=stage_complete)


def save(engine: PlainEngine, output_dir: Path, step: int, *, stage_complete: bool = False) -> Path:
    writer = writer_of(engine, output_dir)
    writer.save(at_step(step, stage_complete=stage_complete))
    writer.finish()
    return step_folder(output_dir, step)


def test_load_brings_back_weights_moments_and_position(tmp_path: Path) -> None:
    straight = small_engine()
    reset_groups(straight, {"lm"})
    train_steps(straight, 3)
    folder = save(straight, tmp_path, 3)
    train_steps(straight, 2)

    resumed = small_engine(seed=99)
    state = checkpoint.read_state(folder)
    checkpoint.load(folder, resumed, state)
    assert state.position == Position(stage=1, step=3, global_step=3, stage_complete=False)
    assert state.steps_by_group == {"lm": 3}
    train_steps(resumed, 2)
    for ours, theirs in zip(resumed.module.parameters(), straight.module.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_reading_does_not_depend_on_who_wrote_which_elements(tmp_path: Path) -> None:
    """Two ranks that hold interleaved pieces of a parameter are read by one that holds all of it."""
    folder = tmp_path / "shards"
    folder.mkdir()
    whole = torch.arange(10.0)
    for rank, (start, end) in enumerate([(0, 6), (6, 10)]):
        piece = {"w": {"start": start, "numel": 10, "shape": [2, 5]}}
        tensors = {f"{kind}/w": whole[start:end].clone() for kind in ("master", "exp_avg", "exp_avg_sq")}
        path = folder / f"rank-{rank:05d}-of-00002.safetensors"
        save_file(tensors, path, metadata={"fragments": json.dumps(piece)})
    reader = ShardReader(folder)
    assert torch.equal(reader["w"], whole.view(2, 5))
    assert torch.equal(reader.read("master", "w", 4, 4, 10), whole[4:8])
    (folder / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lack elements of w"):
        ShardReader(folder)["w"]


def test_the_export_reads_one_weight_at_a_time(tmp_path: Path) -> None:
    """All of them in fp32 are 33 GB of an 8B LM, in the host memory of rank 0."""
    read: list[weakref.ref[Tensor]] = []

    def one_by_one(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        for name in tensors:
            assert all(earlier() is None for earlier in read)
            value = tensors[name]
            read.append(weakref.ref(value))
            del value

    writer = writer_of(small_engine(), tmp_path, export=one_by_one)
    writer.save(at_step(1))
    writer.finish()
    assert len(read) == 2


@pytest.mark.parametrize("written", ["q_proj", "attention.query"], ids=["by 5.23", "by 5.17"])
def test_state_is_read_under_the_names_that_any_transformers_wrote(tmp_path: Path, written: str) -> None:
    """Weights and moments of a trained DINOv2; between the versions its attention was renamed."""

    def engine(query: str) -> PlainEngine:
        module = nn.Linear(4, 3, bias=False)
        name = f"image_projector.encoder.dinov2.encoder.layer.0.attention.{query}.weight"
        return PlainEngine(
            module,
            {"lm": [(name, module.weight)]},
            OptimizerSettings(),
            max_grad_norm=1.0,
        )

    straight, resumed = engine(written), engine("attention.query")
    reset_groups(straight, {"lm"})
    train_steps(straight, 3)
    folder = save(straight, tmp_path, 3)
    train_steps(straight, 2)
    checkpoint.load(folder, resumed, checkpoint.read_state(folder))
    train_steps(resumed, 2)
    assert torch.equal(resumed.module.weight, straight.module.weight)


def test_another_model_is_refused(tmp_path: Path) -> None:
    folder = save(small_engine(), tmp_path, 1)
    with pytest.raises(
        CheckpointError, match="weight has 12 elements in the checkpoint and 20 in this model"
    ):
        checkpoint.load(folder, small_engine(width=5), checkpoint.read_state(folder))


def damage_truncate(folder: Path) -> None:
    shard = next((folder / "shards").iterdir())
    shard.write_bytes(shard.read_bytes()[:-7])


def damage_flip(folder: Path) -> None:
    shard = next((folder / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(bytes(content))


def damage_unfinished(folder: Path) -> None:
    (folder / "COMPLETE").unlink()


def damage_missing(folder: Path) -> None:
    (folder / "state.json").unlink()


def damage_garbage(folder: Path) -> None:
    (folder / "COMPLETE").write_text("{")


DAMAGES = [damage_truncate, damage_flip, damage_unfinished, damage_missing, damage_garbage]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__.removeprefix("damage_"))
def test_auto_takes_the_one_before_a_damaged_checkpoint_and_says_so(tmp_path: Path, damage: object) -> None:
    engine, said = small_engine(), []
    older, newest = save(engine, tmp_path, 1), save(engine, tmp_path, 2)
    assert checkpoint.find("auto", tmp_path, said.append) == newest
    assert not said
    damage(newest)  # type: ignore[operator]
    assert checkpoint.find("auto", tmp_path, said.append) == older
    assert len(said) == 1 and newest.name in said[0]
    with pytest.raises(CheckpointError):  # asked for by name, it is an error
        checkpoint.find(str(newest), tmp_path, said.append)
    damage(older)  # type: ignore[operator]
    with pytest.raises(CheckpointError, match="does not start from scratch"):
        checkpoint.find("auto", tmp_path, said.append)


def test_a_file_cut_at_any_4_kib_border_is_noticed(tmp_path: Path) -> None:
    older = save(small_engine(width=500), tmp_path, 1)
    newest = save(small_engine(width=500), tmp_path, 2)
    cuts = 0
    for path in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = path.read_bytes()
        for length in range(0, len(whole), 4096):
            path.write_bytes(whole[:length])
            assert checkpoint.find("auto", tmp_path, lambda message: None) == older, (path, length)
            cuts += 1
        path.write_bytes(whole)
    assert cuts > 8
    assert checkpoint.find("auto", tmp_path, print) == newest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root and the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_costs_a_checkpoint_and_not_the_one_before(small_disk: Path) -> None:
    engine = small_engine(width=500)  # 3 x 10 kB of state, and the export
    older = save(engine, small_disk, 1)
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize - 8192))
    writer = writer_of(engine, small_disk)
    writer.save(at_step(2))
    with pytest.raises(CheckpointError, match=r"[Nn]o space left"):
        writer.finish()
    assert checkpoint.find("auto", small_disk, print) == older
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == [older.name]
    filler.unlink()
    writer.save(at_step(3))
    writer.finish()
    assert checkpoint.find("auto", small_disk, print) == step_folder(small_disk, 3)


def test_auto_starts_afresh_only_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoint.find("auto", tmp_path, print) is None
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.find(str(tmp_path / "gone"), tmp_path, print)


def test_an_output_folder_can_be_named_instead_of_a_checkpoint(tmp_path: Path) -> None:
    folder = save(small_engine(), tmp_path / "earlier", 4)
    assert checkpoint.find(str(tmp_path / "earlier"), tmp_path, print) == folder


def test_a_write_that_fails_leaves_the_older_checkpoint_and_the_next_one_succeeds(tmp_path: Path) -> None:
    full = True

    def export(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        if full:
            raise OSError(28, "No space left on device")
        export_names(folder, tensors)

    older = save(small_engine(), tmp_path, 1)
    said: list[str] = []
    writer = writer_of(small_engine(), tmp_path, export=export)
    writer._say = said.append
    writer.save(at_step(2))
    writer.save(at_step(3))  # tells of the one before, and tries again
    assert len(said) == 1 and "No space left" in said[0] and "Training goes on" in said[0]
    with pytest.raises(CheckpointError, match=r"No space left.*untouched"):
        writer.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [older.name]
    full = False
    writer.save(at_step(4))
    writer.finish()
    assert checkpoint.find("auto", tmp_path, print) == step_folder(tmp_path, 4) == writer.newest


def test_what_a_kill_left_behind_is_no_checkpoint_and_goes_with_the_next_save(tmp_path: Path) -> None:
    kept = save(small_engine(), tmp_path, 1)
    torn = kept.with_name(".tmp-step-00000002")
    shutil.copytree(kept, torn)
    assert checkpoint.find("auto", tmp_path, print) == kept
    assert save(small_engine(), tmp_path, 3) == checkpoint.find("auto", tmp_path, print)
    assert not torn.exists()


def test_the_copy_is_of_the_moment_of_the_save_whatever_training_does_meanwhile(tmp_path: Path) -> None:
    engine = small_engine()
    reset_groups(engine, {"lm"})
    train_steps(engine, 1)
    expected = [p.detach().clone() for p in engine.module.parameters()]
    may_write = threading.Event()

    def export(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        assert may_write.wait(30)

    writer = writer_of(engine, tmp_path, export=export)
    writer.save(at_step(1))  # comes back although nothing is written yet
    train_steps(engine, 3)
    may_write.set()
    writer.finish()
    resumed = small_engine(seed=5)
    checkpoint.load(step_folder(tmp_path, 1), resumed, checkpoint.read_state(step_folder(tmp_path, 1)))
    assert all(torch.equal(p, e) for p, e in zip(resumed.module.parameters(), expected, strict=True))


def test_a_whole_checkpoint_of_the_same_step_is_left_alone_and_a_damaged_one_replaced(tmp_path: Path) -> None:
    folder = save(small_engine(), tmp_path, 1)
    before = (folder / "COMPLETE").stat().st_ino
    assert save(small_engine(), tmp_path, 1) == folder
    assert (folder / "COMPLETE").stat().st_ino == before
    damage_truncate(folder)
    save(small_engine(), tmp_path, 1)
    assert checkpoint.verify(folder) is None


def test_checkpoints_behind_the_start_are_moved_away_not_deleted(tmp_path: Path) -> None:
    """Or keep-last-N counts damaged ones as the newest, and removes the good ones."""
    engine = small_engine()
    for step in (1, 2, 3):
        save(engine, tmp_path, step)
    damage_truncate(step_folder(tmp_path, 3))
    assert checkpoint.find("auto", tmp_path, print) == step_folder(tmp_path, 2)
    aside = checkpoint.set_aside(tmp_path, after=2)
    assert aside is not None and [path.name for path in aside.iterdir()] == [step_folder(tmp_path, 3).name]
    assert checkpoint.set_aside(tmp_path, after=2) is None
    again = checkpoint.set_aside(tmp_path, after=-1)  # a run that starts anew
    assert again is not None and again != aside and len(list(again.iterdir())) == 2
    assert checkpoint.find("auto", tmp_path, print) is None


def test_the_best_is_kept_however_old_it_is(tmp_path: Path) -> None:
    engine = small_engine()
    for step, loss in ((1, 3.0), (2, 1.5), (3, 2.0), (4, 1.6)):
        save(engine, tmp_path, step)
        checkpoint.note_validation(tmp_path, at_step(step), loss)
        checkpoint.prune(tmp_path, keep=1)
    best = checkpoint.read_best(tmp_path)
    assert best is not None and (best.global_step, best.loss) == (2, 1.5)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == [step_folder(tmp_path, step).name for step in (2, 4)]


def test_the_best_is_one_of_the_latest_stage_and_of_this_run(tmp_path: Path) -> None:
    """Losses over other modalities do not compare; a checkpoint that was set aside is nobody's best."""
    checkpoint.note_validation(tmp_path, at_step(5), 1.0)
    later = Position(stage=2, step=1, global_step=9, stage_complete=False)
    checkpoint.note_validation(tmp_path, later, 2.0)
    best = checkpoint.read_best(tmp_path)
    assert best is not None and best.global_step == 9
    checkpoint.set_aside(tmp_path, after=9)
    assert checkpoint.read_best(tmp_path) == best
    checkpoint.set_aside(tmp_path, after=8)
    assert checkpoint.read_best(tmp_path) is None


def test_the_newest_n_and_the_stage_ends_are_kept(tmp_path: Path) -> None:
    engine = small_engine()
    for step in range(1, 7):
        save(engine, tmp_path, step, stage_complete=step == 2)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        step_folder(tmp_path, step).name for step in (2, 5, 6)
    ]
    checkpoint.prune(tmp_path, keep=0)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3
