"""A checkpoint is whole or not there; a damaged one is named, and a run never starts over in silence."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from cad_mllm.errors import CheckpointError
from cad_mllm.train import checkpoint
from cad_mllm.train.checkpoint import CheckpointState, Position, ShardReader, step_folder
from cad_mllm.train.distributed import World
from cad_mllm.train.engine import PlainEngine, reset_groups
from cad_mllm.train.optim import Flat, Fragment
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
        device=ALONE.device,
    )


def train_steps(engine: PlainEngine, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        engine.backward(engine.module(torch.randn(5, 4)).square().sum())
        engine.step({"lm": 0.1})


def save(engine: PlainEngine, output_dir: Path, step: int, *, stage_complete: bool = False) -> Path:
    def state(steps_by_group: Mapping[str, int]) -> CheckpointState:
        at = Position(stage=1, step=step, global_step=step, stage_complete=stage_complete)
        return CheckpointState(
            position=at, identity={"--seed": 1}, config={}, provenance={}, steps_by_group=steps_by_group
        )

    def export(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        (folder / "names.json").write_text(json.dumps(sorted(tensors)))

    folder = step_folder(output_dir, step)
    checkpoint.save(folder, engine, ALONE, state=state, export=export)
    return folder


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
        engine = small_engine()
        flat = whole[start:end].clone()
        piece = Fragment(name="w", numel=10, shape=(2, 5), start=start, offset=0, length=end - start)
        engine.flats = (Flat(group="lm", master=flat, fragments=(piece,)),)
        checkpoint._write_shard(folder / f"rank-{rank:05d}-of-00002.safetensors", engine)
    reader = ShardReader(folder)
    assert torch.equal(reader.full("w"), whole.view(2, 5))
    assert torch.equal(reader.read("master", "w", 4, 4, 10), whole[4:8])
    (folder / "rank-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lack elements of w"):
        ShardReader(folder).full("w")


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


def test_auto_starts_afresh_only_where_nothing_is(tmp_path: Path) -> None:
    assert checkpoint.find("auto", tmp_path, print) is None
    with pytest.raises(CheckpointError, match="no such folder"):
        checkpoint.find(str(tmp_path / "gone"), tmp_path, print)


def test_an_output_folder_can_be_named_instead_of_a_checkpoint(tmp_path: Path) -> None:
    folder = save(small_engine(), tmp_path / "earlier", 4)
    assert checkpoint.find(str(tmp_path / "earlier"), tmp_path, print) == folder


def test_a_save_that_was_killed_leaves_nothing_that_looks_like_a_checkpoint(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def export(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        raise Killed

    kept = save(small_engine(), tmp_path, 1)
    with pytest.raises(Killed):
        checkpoint.save(step_folder(tmp_path, 2), small_engine(), ALONE, state=lambda s: None, export=export)  # type: ignore[arg-type, return-value]
    assert checkpoint.find("auto", tmp_path, print) == kept
    assert save(small_engine(), tmp_path, 2) == checkpoint.find("auto", tmp_path, print)


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    def export(folder: Path, tensors: Mapping[str, Tensor]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match=r"No space left.*untouched"):
        checkpoint.save(step_folder(tmp_path, 1), small_engine(), ALONE, state=lambda s: None, export=export)  # type: ignore[arg-type, return-value]


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
