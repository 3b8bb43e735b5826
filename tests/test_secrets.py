"""Keys and passwords of the environment appear in nothing that a run leaves behind."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cad_mllm.cli import run_and_exit
from cad_mllm.errors import ConfigError, ExitCode, without_credentials
from cad_mllm.train import restarts
from tests.distributed.conftest import write_data
from tests.distributed.runs import flags

ROOT = Path(__file__).resolve().parent.parent
MARK = "planted"
SECRETS = {
    "WANDB_API_KEY": f"0123456789abcdef0123456789abcdef1{MARK}",
    "HF_TOKEN": f"hf_{MARK}",
    "HF_ENDPOINT": f"http://user:{MARK}@127.0.0.1:9",
    "HTTP_PROXY": f"http://user:{MARK}@127.0.0.1:9",
    "https_proxy": f"http://{MARK}@127.0.0.1:9",
    "AWS_SECRET_ACCESS_KEY": MARK,
    "CAD_MLLM_SOMETHING": MARK,
}
URL = f"https://user:{MARK}@mirror.example/models"


def holding(folder: Path, text: str) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_run_leaves_no_secret_behind(tmp_path: Path) -> None:
    """Output folder with checkpoints and W&B's files, console, home folder."""
    output_dir, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, **SECRETS, "WANDB_MODE": "offline", "HOME": str(home), "TMPDIR": str(home)}
    data = write_data(tmp_path / "data")
    stages = {"stage1_epochs": 1, "stage2_epochs": 0, "stage3_epochs": 0}
    words = flags(data, output_dir, ranks=1, zero=None, use_wandb=True, **stages)
    command = [sys.executable, "cad_mllm/train_curriculum.py", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert MARK not in done.stdout + done.stderr
    # The search finds what is there, also inside checkpoints and W&B's files ...
    assert {"state.json", "cad_mllm.json"} <= {path.name for path in holding(output_dir, "tiny")}
    assert list(output_dir.glob("wandb/offline-run-*/run-*.wandb"))
    # ... and no secret.
    assert holding(tmp_path, MARK) == []


def test_what_libraries_quote_is_told_without_user_and_password(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quoted = f"We couldn't connect to '{URL}', nor to http://{MARK}@a:9/b"
    assert without_credentials(quoted) == (
        "We couldn't connect to 'https://***@mirror.example/models', nor to http://***@a:9/b"
    )
    assert without_credentials("mail a@b.c, see https://c.d/e@f") == "mail a@b.c, see https://c.d/e@f"

    def fail(error: Exception) -> ExitCode:
        logging.getLogger("a library").warning("thrown while requesting %s", URL)
        restarts.note_error(tmp_path, 0, error)
        raise error

    for error in (ConfigError(quoted), RuntimeError(quoted)):
        with pytest.raises(SystemExit):
            run_and_exit(lambda error=error: fail(error))
        assert "mirror.example" in (tmp_path / "last_error.txt").read_text()
        assert holding(tmp_path, MARK) == []
    told = capsys.readouterr().err
    assert told.count("mirror.example") >= 2 and MARK not in told
