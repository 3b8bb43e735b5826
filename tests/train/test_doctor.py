"""`cad-mllm doctor` as a person calls it, and the same checks at the start of a training."""

import json
from pathlib import Path

import pytest

from cad_mllm.cli import main
from cad_mllm.errors import PreflightError
from cad_mllm.settings import parse_train_args
from cad_mllm.train import machine, preflight
from cad_mllm.train.checks import Finding
from cad_mllm.train.distributed import world
from cad_mllm.train.run import prepare_run
from cad_mllm.train.trainer import train
from tests.distributed.conftest import write_data
from tests.distributed.runs import flags

TINY = ["--config", "configs/train/tiny.yaml", "--num_dummy_samples", "2"]
ONE_STAGE = {"stage2_epochs": 0, "stage3_epochs": 0}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def in_the_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def exit_code(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_request:
        main(["doctor", *argv])
    assert isinstance(exit_request.value.code, int)
    return exit_request.value.code


def test_a_healthy_machine_is_a_table_a_file_and_exit_0(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "HF_ENDPOINT", "NCCL_DEBUG_FILE"):
        monkeypatch.setenv(name, "http://user:planted@mirror")
    report, output_dir = tmp_path / "report" / "doctor.json", tmp_path / "out"
    assert exit_code(*TINY, "--output_dir", str(output_dir), "--json", str(report)) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines()[0].split() == ["check", "found", "verdict", "remedy"]
    assert "1 rank on 1 host" in shown and "0 REFUSED" in shown.splitlines()[-1]
    told = json.loads(report.read_text())
    assert {finding["verdict"] for finding in told["findings"]} == {"ok"}
    assert told["ranks"][0]["versions"]["torch"]
    assert "planted" not in shown + report.read_text()
    assert not output_dir.exists(), "the doctor leaves nothing behind"


def test_a_refusal_is_exit_5_with_the_remedy_and_the_same_for_a_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_free_bytes", lambda folder: 1000)
    report = tmp_path / "doctor.json"
    words = [*TINY, "--num_workers", "1", "--output_dir", str(tmp_path / "out")]
    assert exit_code(*words, "--json", str(report)) == 5
    shown = capsys.readouterr().out
    assert "2 REFUSED" in shown and "Remove old runs" in shown
    refused = [f["check"] for f in json.loads(report.read_text())["findings"] if f["verdict"] == "REFUSED"]
    assert refused == ["/dev/shm", "disk"]
    with pytest.raises(PreflightError, match=r"(?s)^/dev/shm: .*--num_workers.\ndisk: .*Remove old runs"):
        train(parse_train_args(words))


def test_the_start_of_a_training_says_warnings_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    warning = Finding(check="room", found="it is warm", verdict="warning", remedy="Open a window")
    fine = Finding(check="light", found="it is bright")
    monkeypatch.setattr(preflight, "CHECKS", (lambda ranks, demand: warning, lambda ranks, demand: fine))
    data = write_data(tmp_path / "data")
    config = parse_train_args(flags(data, tmp_path / "out", ranks=1, zero=None, **ONE_STAGE))
    with world(config.run) as ranks:
        prepare_run(config, ranks).tracker.close()
    shown = capsys.readouterr().out.splitlines()
    assert shown.count("WARNING: room: it is warm. Open a window.") == 1
    assert not any("bright" in line for line in shown)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--output-dirr", "x"], "unknown flag"),
        (["--llm_model_name", "/no/such/model", "--device", "cpu"], "its configuration cannot be loaded"),
        ([*TINY, "--attn_implementation", "flash_attention_2"], "flash_attention_2 needs a GPU"),
        ([*TINY, "--json", "/proc/no/doctor.json"], "--json /proc/no/doctor.json: cannot be written"),
    ],
)
def test_other_mistakes_keep_their_exit_code(
    argv: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*argv, "--output_dir", str(tmp_path / "out")) == 2
    assert words in capsys.readouterr().err
