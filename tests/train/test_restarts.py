"""Restarts that get nowhere end for good, and say what stood in the way."""

from pathlib import Path

import pytest

from cad_mllm.errors import ExitCode, PreflightError
from cad_mllm.train import restarts


def starts(output_dir: Path, number: int, *, global_step: int = 7, limit: int = 5) -> None:
    for _ in range(number):
        restarts.count_start(output_dir, global_step=global_step, limit=limit)


def test_the_start_after_five_restarts_in_vain_ends_with_the_last_error(tmp_path: Path) -> None:
    starts(tmp_path, 6)  # the first start and five restarts
    restarts.note_error(tmp_path, 3, RuntimeError("the NIC is\nbroken"))
    with pytest.raises(PreflightError, match=r"rank 3: RuntimeError: the NIC is broken") as caught:
        starts(tmp_path, 1)
    assert "--max_restarts_without_progress" in str(caught.value)
    assert caught.value.exit_code is ExitCode.PREFLIGHT < 128


def test_a_newer_checkpoint_begins_the_count_again(tmp_path: Path) -> None:
    starts(tmp_path, 6, global_step=7)
    starts(tmp_path, 6, global_step=8)


def test_a_run_that_ends_well_clears_the_count(tmp_path: Path) -> None:
    starts(tmp_path, 6)
    restarts.clear(tmp_path)
    starts(tmp_path, 6)
    restarts.clear(tmp_path)
    restarts.clear(tmp_path)


def test_zero_means_that_no_restart_is_allowed(tmp_path: Path) -> None:
    starts(tmp_path, 1, limit=0)
    with pytest.raises(PreflightError, match="none was left behind"):
        starts(tmp_path, 1, limit=0)


def test_a_torn_count_is_no_obstacle(tmp_path: Path) -> None:
    starts(tmp_path, 3)
    (tmp_path / "restarts.json").write_text('{"global_')
    starts(tmp_path, 1)
