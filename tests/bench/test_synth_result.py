"""The table of results: which rows there are, what is held to, and that held-out models are held out."""

import argparse
from pathlib import Path

import pytest

from cad_mllm.data.dummy import write_dummy_data
from cad_mllm.evaluate.files import find_shapes
from cad_mllm.evaluate.report import robustness_runs
from tests.bench.synth_result import (
    RETRIEVAL,
    RETRIEVAL_FITTED,
    Measurement,
    Row,
    checks,
    hold_out,
    settings,
)


def row(name: str, invalid: float = 0.0, cd: float | None = 1.0) -> Row:
    return Row(
        name=name,
        candidates=1,
        samples=10,
        invalid=invalid,
        cd_squared_median=cd,
        cd_squared_mean=cd,
        cd_median=cd,
        cd_mean=cd,
        f_score=1.0,
        iou=1.0,
        command_accuracy=1.0,
        generate_seconds=1.0,
        evaluate_seconds=1.0,
    )


def test_every_row_has_a_folder_and_the_curves_find_theirs(tmp_path: Path) -> None:
    folders = [setting.folder for setting in settings(8)]
    assert len(set(folders)) == len(folders) == 20
    assert folders[:3] == ["text+points", "text+points+image", "text"]
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    _, without_summary = robustness_runs(tmp_path / "text+points")
    assert len(without_summary) == 9
    best = [setting for setting in settings(8) if setting.candidates > 1]
    assert [setting.folder for setting in best if setting.worse.dropped] == ["text+points-dropped-0.5-best"]


def test_what_is_held_to_passes_or_fails_as_measured() -> None:
    rows = {
        RETRIEVAL: row(RETRIEVAL, cd=2.0),
        "text+points": row("text+points", invalid=0.06, cd=1.01),
        "text+points/dropped-0.5": row("text+points/dropped-0.5", cd=1.2),
        "text+points-best": row("text+points-best", invalid=0.01, cd=1.0),
        "text+points-best-fit": row("text+points-best-fit", cd=0.8),
        RETRIEVAL_FITTED: row(RETRIEVAL_FITTED, cd=0.7),
        "text-best": row("text-best", cd=None),
    }
    verdicts = {check.what: check.verdict for check in checks(rows, 8)}
    assert verdicts["greedy, text+points: share without a solid"] == "FAIL"
    assert verdicts["best of 8, text+points: share invalid"] == "pass"
    assert verdicts["median CD, best of 8: text+points over nearest training model"] == "pass"
    assert verdicts["median CD, greedy: text+points over nearest training model"] == "FAIL"
    assert verdicts["median CD squared, greedy: half of the points dropped over clean"] == "FAIL"
    assert verdicts["median CD squared, best of 8: half of the points dropped over clean"] == "not measured"
    assert verdicts["median CD, best of 8: text+points over text"] == "not measured"
    assert verdicts["median CD, best of 8: fitted text+points over nearest training model"] == "pass"
    assert verdicts["median CD, best of 8: the same, that fitted too"] == "FAIL"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight models to hold out of, three of which are trained on as well."""
    root = tmp_path_factory.mktemp("data")
    for name, count in (("train", 3), ("val", 8)):
        write_dummy_data(root / name, num_samples=count, seed=1, workers=1, points=2048, views=1, size=32)
    return root


def test_what_the_training_data_hold_is_not_held_out(data: Path, tmp_path: Path) -> None:
    assert hold_out(data / "val", data / "train", tmp_path / "held", 4, 1) == (4, 3)
    trained = find_shapes(data / "train", "--train").files
    held = find_shapes(tmp_path / "held", "--true").files
    assert sorted(held) == sorted(find_shapes(data / "val", "--true").files)[3:7]
    assert not held.keys() & trained.keys()
    assert len(list(tmp_path.glob("held/pcd/*/*.npz"))) == len(list(tmp_path.glob("held/img/*/*.png"))) == 4


def test_without_time_only_the_nearest_models_are_scored_and_that_is_said(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cad_mllm.generate.Generator.from_checkpoint", lambda path: None)
    arguments = argparse.Namespace(
        checkpoint=tmp_path, train=data / "train", val=data / "val", out=tmp_path / "out", samples=2
    )
    vars(arguments).update(
        best_of=8, fit=5, temperature=0.8, max_new_tokens=60, verified=1, seconds=0.0, workers=1
    )
    result = Measurement(arguments).run()
    assert result["not run for want of time"] == [
        *(setting.folder for setting in settings(8)),
        RETRIEVAL_FITTED,
    ]
    (nearest,) = result["rows"]  # type: ignore[misc]
    assert nearest["name"] == RETRIEVAL and nearest["samples"] == 2 and nearest["invalid"] == 0
    assert result["retrieval"]["same model found"] == 1  # type: ignore[index]
    assert {check["verdict"] for check in result["held to"]} == {"not measured"}  # type: ignore[attr-defined]


def test_the_nearest_models_are_fitted_to_the_points_of_those_that_are_sought(
    data: Path, tmp_path: Path
) -> None:
    hold_out(data / "val", data / "train", tmp_path / "held-out", 2, 1)
    measurement = Measurement(argparse.Namespace(out=tmp_path, fit=3, workers=1))
    for path in (tmp_path / "held-out/json").rglob("*.json"):
        copy = measurement.predictions(RETRIEVAL) / path.relative_to(tmp_path / "held-out/json")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    measurement.fit_retrieved()
    assert len(list(measurement.predictions(RETRIEVAL_FITTED).rglob("*.json"))) == 2
