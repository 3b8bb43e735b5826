"""Frozen encoders run once: what they give is read from the disk, by this run and the next."""

from pathlib import Path

import pytest
import torch

from cad_mllm.config import TrainConfig
from cad_mllm.data import batches
from cad_mllm.data.loader import eval_batches
from cad_mllm.errors import CheckpointError, ConfigError, ExitCode
from cad_mllm.model.encoders import FrozenEncoders, build_encoders
from cad_mllm.settings import parse_train_args
from cad_mllm.train import encode_ahead
from cad_mllm.train.distributed import world
from cad_mllm.train.run import prepare_run
from cad_mllm.train.trainer import train
from tests.data.deadly import DeadlyInputs
from tests.distributed.conftest import NUM_SAMPLES, write_data
from tests.distributed.runs import flags, losses


def configure(data: Path, root: Path, name: str, **more: object) -> TrainConfig:
    """A run of stage 3 whose last step runs into the next epoch: batches of three of the eight samples."""
    assert NUM_SAMPLES % 3
    given = {
        "start_from_stage": 3,
        "stage3_epochs": 2,
        "batch_size": 3,
        "gradient_accumulation_steps": 1,
        "val_data_path": data,
        "encoder_features": root / "features",
    }
    return parse_train_args(flags(data, root / name, ranks=1, zero=None, **(given | more)))


def feature_files(root: Path) -> list[Path]:
    return sorted((root / "features").rglob("*.safetensors"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "data")


def test_a_second_run_reads_what_the_first_one_computed(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(configure(data, tmp_path, "first")) == ExitCode.DONE
    computed = feature_files(tmp_path)
    assert len(computed) > NUM_SAMPLES
    assert f"{len(computed)} of them computed now" in capsys.readouterr().out

    def refuse(*_: object) -> None:
        raise AssertionError("it is on disk")

    monkeypatch.setattr(FrozenEncoders, "encode_images", refuse)
    monkeypatch.setattr(FrozenEncoders, "encode_points", refuse)
    monkeypatch.setattr(batches, "read_image", refuse)
    monkeypatch.setattr(batches, "read_points", refuse)
    assert train(configure(data, tmp_path, "second")) == ExitCode.DONE
    assert ", 0 of them computed now" in capsys.readouterr().out
    assert feature_files(tmp_path) == computed
    assert losses(tmp_path / "second") == losses(tmp_path / "first")
    assert (tmp_path / "second" / "skipped.jsonl").read_text() == ""


def test_what_is_read_is_what_the_encoders_give(data: Path, tmp_path: Path) -> None:
    config = configure(data, tmp_path, "run")
    with world(config.run) as alone:
        run = prepare_run(config, alone)
        run.tracker.close()
        assert run.validation is not None and run.validation_features is not None
        encoders = build_encoders(run.built.encoder_names, torch.float32)
        stored, original = (
            next(
                eval_batches(
                    run.validation, run.built.tokenizer, run.spec, combo="text+points+image", seed=7,
                    batch_size=NUM_SAMPLES, rank=0, world_size=1, num_workers=0, features=features,
                )
            ).batch
            for features in (run.validation_features, None)
        )  # fmt: skip
    for ours, theirs in (
        (run.built.encoders.encode_images(stored.images_NCHW), encoders.encode_images(original.images_NCHW)),
        (run.built.encoders.encode_points(stored.points_MPC), encoders.encode_points(original.points_MPC)),
    ):
        assert ours.shape[0] == NUM_SAMPLES
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(stored.tokens_BT, original.tokens_BT)


def test_damaged_features_cost_their_sample_and_the_line_says_which_file(data: Path, tmp_path: Path) -> None:
    with world(configure(data, tmp_path, "first").run) as alone:
        prepare_run(configure(data, tmp_path, "first"), alone).tracker.close()
    torn = next(path for path in feature_files(tmp_path) if "points-" in path.parts[-3])
    torn.write_bytes(torn.read_bytes()[:-9])
    config = configure(data, tmp_path, "second", max_skipped_fraction=0.5)
    assert train(config) == ExitCode.DONE
    skipped = (tmp_path / "second" / "skipped.jsonl").read_text()
    assert str(torn) in skipped and "delete the file" in skipped


@pytest.mark.usefixtures("deaths_noticed_soon")
@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_cloud_of_which_a_loader_process_dies_costs_its_sample(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    num_workers: int,
) -> None:
    whole = configure(data, tmp_path, "whole", encoder_features=tmp_path / "whole-features")
    with world(whole.run) as alone:
        prepare_run(whole, alone).tracker.close()
    monkeypatch.setattr(encode_ahead, "EncoderInputs", DeadlyInputs)
    config = configure(data, tmp_path, "run", num_workers=num_workers, max_skipped_fraction=0.5)
    assert train(config) == ExitCode.DONE
    of_all = len(list((tmp_path / "whole-features").rglob("*.safetensors")))
    assert len(feature_files(tmp_path)) == of_all - 1
    assert "points" in (tmp_path / "run" / "skipped.jsonl").read_text()
    said = capsys.readouterr().out.replace("\n", " ")
    # The same data are the validation's: it is tried twice.
    assert "not readable: 2, for instance points of" in said and "a loader process died of it" in said


def test_other_data_or_another_seed_of_the_points_is_computed_anew(data: Path, tmp_path: Path) -> None:
    other = write_data(tmp_path / "other", caption="A part.")
    kinds = []
    for name, where, seed in (("one", data, 7), ("two", data, 8), ("three", data, 7), ("four", other, 7)):
        config = configure(where, tmp_path, name, seed=seed)
        with world(config.run) as alone:
            prepare_run(config, alone).tracker.close()
        kinds.append(sorted(path.name.partition("-")[0] for path in (tmp_path / "features").iterdir()))
    # One folder for pictures and one for clouds; training and validation data are the same here.
    assert kinds == [
        ["image", "points"],
        ["image", "points", "points"],
        ["image", "points", "points"],
        ["image", "image", "points", "points", "points"],
    ]


def test_a_run_is_not_gone_on_with_other_points(data: Path, tmp_path: Path) -> None:
    assert train(configure(data, tmp_path, "run")) == ExitCode.DONE
    config = configure(data, tmp_path, "run", resume_from_ckpt="auto")
    with world(config.run) as alone:
        prepare_run(config, alone).tracker.close()
    words = flags(data, tmp_path / "run", ranks=1, zero=None, start_from_stage=3, resume_from_ckpt="auto")
    other = parse_train_args([*words, "--batch_size", "3", "--gradient_accumulation_steps", "1"])
    with pytest.raises(CheckpointError, match=r"--encoder_features"):
        train(other)


def test_encoders_that_train_have_nothing_to_keep(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--encoder_features .*--train_encoders"):
        configure(data, tmp_path, "run", train_encoders=True)
