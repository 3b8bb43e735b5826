"""The set-up of a run: mistakes that cost nothing to find are found first."""

from pathlib import Path

import pytest

from cad_mllm.errors import ConfigError
from cad_mllm.settings import parse_train_args
from cad_mllm.train.trainer import train


def test_an_output_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    flags = ["--llm_model_name", "tiny", "--device", "cpu", "--output_dir", str(tmp_path / "file" / "out")]
    with pytest.raises(ConfigError, match=r"--output_dir .* cannot be written"):
        train(parse_train_args(flags))
