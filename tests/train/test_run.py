"""The set-up of a run: mistakes that cost nothing to find are found first."""

from pathlib import Path

import pytest

from cad_mllm.errors import CheckpointError, ConfigError
from cad_mllm.settings import parse_train_args
from cad_mllm.train.distributed import world
from cad_mllm.train.run import prepare_run
from cad_mllm.train.trainer import train
from tests.distributed.conftest import write_data
from tests.distributed.runs import flags


def test_an_output_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    argv = ["--llm_model_name", "tiny", "--device", "cpu", "--output_dir", str(tmp_path / "file" / "out")]
    with pytest.raises(ConfigError, match=r"--output_dir .* cannot be written"):
        train(parse_train_args(argv))


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        ({"batch_size": 2}, "each step: 3 x 2 = 6 samples, padded"),
        ({"pack_tokens": 1024}, "each step: 3 x 1,024 tokens, packed"),
    ],
)
def test_a_run_says_what_a_step_is(
    batches: dict[str, object], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_data(tmp_path / "data")
    given = {"gradient_accumulation_steps": 3, "max_seq_length": 1024, **batches}
    config = parse_train_args(flags(data, tmp_path / "run", ranks=1, zero=None, **given))
    with world(config.run) as alone:
        prepare_run(config, alone).tracker.close()
    assert said in capsys.readouterr().out.splitlines()


def test_a_resumed_run_that_packs_otherwise_is_told_what_was_set(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    given = {"max_seq_length": 1024, "stage1_epochs": 1, "stage2_epochs": 0, "stage3_epochs": 0}
    padded = flags(data, tmp_path / "run", ranks=1, zero=None, **given)
    train(parse_train_args(padded))
    with pytest.raises(CheckpointError, match="with --pack_tokens = off, this run has 1024"):
        train(parse_train_args([*padded, "--pack_tokens", "1024", "--resume_from_ckpt", "auto"]))
