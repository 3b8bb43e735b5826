"""The whole of `cad-mllm evaluate`, on folders as they come: good, broken, hostile and incomplete."""

import csv
import json
import subprocess
from pathlib import Path

import pytest
import trimesh

from cad_mllm.cad import codec
from cad_mllm.cad.normalise import normalise
from cad_mllm.cli import main
from cad_mllm.data.dummy import write_dummy_data
from cad_mllm.errors import DataError
from cad_mllm.evaluate import run
from cad_mllm.evaluate.files import InShard
from cad_mllm.evaluate.report import write_report
from cad_mllm.evaluate.score import Outcome, Pair, Sample, score
from tests.cad.shapes import CUBE, DRILLED
from tests.data.sharding import shard_folder
from tests.evaluate.hanging import hang_on_hang
from tests.kernel import CAD_MLLM, without_opencascade

PLATE = "NZ0,0,127,254,254E60P0,0H254V254H0"
TALLER = PLATE.replace("E60", "E70")


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("evaluation")
    for name in ("good", "near", "none", "bad", "bomb", "mesh"):
        put(root / f"true/a/{name}.txt", PLATE)
    put(root / "pred/a/good.txt", PLATE)
    put(root / "pred/a/near.txt", TALLER)
    put(root / "pred/a/bad.txt", PLATE[:25])
    put(root / "pred/a/bomb.txt", "N" * 300_000)
    opened = trimesh.creation.box((2.0, 2.0, 0.5))
    opened.update_faces([True] * 11 + [False])
    opened.export(root / "pred/a/mesh.stl")
    put(root / "true/a/broken.json", '{"entities": {}}')
    put(root / "pred/a/broken.txt", PLATE)
    put(root / "pred/stray.txt", PLATE)
    put(root / "train.txt", f"{PLATE}\nnonsense\n")
    return root


@pytest.fixture(scope="module")
def evaluation(folders: Path) -> run.Evaluation:
    return run.evaluate(
        folders / "pred", folders / "true", training=folders / "train.txt", workers=1, seconds=30.0
    )


def by_id(evaluation: run.Evaluation) -> dict[str, Sample]:
    return {sample.id: sample for sample in evaluation.samples}


def test_every_id_of_both_folders_has_an_outcome(evaluation: run.Evaluation) -> None:
    assert {name: sample.outcome.value for name, sample in by_id(evaluation).items()} == {
        "a/bad": "invalid",
        "a/bomb": "invalid",
        "a/broken": "unusable truth",
        "a/good": "scored",
        "a/mesh": "scored",
        "a/near": "scored",
        "a/none": "missing",
        "stray": "extra",
    }
    assert evaluation.summary.counts["invalid"] == 2
    assert evaluation.summary.lines["f_score"].of == 6
    assert "breaks off" in by_id(evaluation)["a/bad"].reason


def test_figures_are_those_of_the_files(evaluation: run.Evaluation) -> None:
    good, near, mesh = (by_id(evaluation)[f"a/{name}"].figures for name in ("good", "near", "mesh"))
    assert good is not None and near is not None and mesh is not None
    assert (good["iou"], good["command_accuracy"], good["parameter_accuracy"]) == (pytest.approx(1), 1.0, 1.0)
    assert good["chamfer"] == pytest.approx(good["chamfer_floor"], rel=0.05)  # type: ignore[arg-type]
    assert near["chamfer"] > 1.1 * near["chamfer_floor"]  # type: ignore[operator]
    assert near["iou"] == pytest.approx(60 / 70)
    assert near["parameter_accuracy"] == pytest.approx(9 / 11)  # the extent, and with it the corner
    assert (good["commands"], good["characters"]) == (7, len(PLATE) - 1)  # centred: z is 97
    assert mesh["iou"] is None and mesh["command_accuracy"] is None
    assert mesh["dangling_edge_length"] > 0  # type: ignore[operator]
    assert "not closed" in by_id(evaluation)["a/mesh"].notes


def test_novelty_is_counted_among_predicted_programs(evaluation: run.Evaluation) -> None:
    assert evaluation.summary.novel is not None and evaluation.summary.training is not None
    assert evaluation.summary.novel.value == 0.5  # of good and near; mesh is no program
    assert (evaluation.summary.training.programs, evaluation.summary.training.unusable) == (1, 1)


def test_tables_hold_every_id(evaluation: run.Evaluation, tmp_path: Path) -> None:
    run.write_tables(tmp_path / "out", evaluation)
    with (tmp_path / "out/samples.csv").open(newline="") as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert rows.keys() == by_id(evaluation).keys()
    assert float(rows["a/near"]["iou"]) == by_id(evaluation)["a/near"].figures["iou"]  # type: ignore[index]
    assert rows["a/bad"]["iou"] == ""
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["summary"]["lines"]["iou"]["covers"] == 2
    assert {entry["id"] for entry in summary["failures"]} == {
        "a/bad",
        "a/bomb",
        "a/broken",
        "a/none",
        "stray",
    }


def test_without_opencascade_polygon_models_are_compared_and_it_is_said(
    evaluation: run.Evaluation, folders: Path, tmp_path: Path
) -> None:
    put(tmp_path / "pred/a/good.txt", PLATE)
    put(tmp_path / "pred/a/near.txt", TALLER)
    put(tmp_path / "pred/a/bad.step", "ISO-10303-21;")
    command = [*CAD_MLLM, "evaluate", "--pred", str(tmp_path / "pred")]
    command += ["--true", str(folders / "true"), "--out", str(tmp_path / "out"), "--workers", "1"]
    hidden = without_opencascade(tmp_path / "hidden")
    done = subprocess.run(command, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "solids of programs are polygon models" in done.stdout
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["builder"] == "polygons"
    reasons = {entry["id"]: entry["reason"] for entry in summary["failures"]}
    assert "OpenCASCADE alone" in reasons["a/bad"]
    with (tmp_path / "out/samples.csv").open(newline="") as file:
        near = next(row for row in csv.DictReader(file) if row["id"] == "a/near")
    figures = by_id(evaluation)["a/near"].figures
    assert figures is not None
    for name in ("iou", "chamfer", "f_score"):
        assert float(near[name]) == pytest.approx(figures[name], rel=0.02)


def test_the_same_folders_give_the_same_figures(evaluation: run.Evaluation, folders: Path) -> None:
    pair = evaluation.files["a/near"]
    assert score(pair) == by_id(evaluation)["a/near"]
    elsewhere = Pair("another id", pair.true, pair.predicted)  # drawn from another seed
    assert score(elsewhere).figures != by_id(evaluation)["a/near"].figures


# --- time, memory, a crash ----------------------------------------------------------------------------------


def test_a_pair_that_hangs_is_the_fault_of_the_side_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "score", hang_on_hang)
    pairs = [
        Pair("both well", Path("t"), Path("p")),
        Pair("prediction hangs", Path("t"), Path("hang")),
        Pair("truth hangs", Path("hang"), Path("p")),
        Pair("no prediction", Path("t"), None),
    ]
    samples = {sample.id: sample for sample in run.score_all(pairs, workers=2, seconds=1.0)}
    assert {name: sample.outcome for name, sample in samples.items()} == {
        "both well": Outcome.SCORED,
        "prediction hangs": Outcome.INVALID,
        "truth hangs": Outcome.UNUSABLE_TRUTH,
        "no prediction": Outcome.MISSING,
    }
    assert "longer than 1 s" in samples["prediction hangs"].reason


# --- what the user got wrong --------------------------------------------------------------------------------


def test_folders_that_have_no_name_in_common_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "pred/0000_1.txt", PLATE)
    put(tmp_path / "true/0000/1.txt", PLATE)
    with pytest.raises(DataError, match="has the name of one"):
        run.evaluate(tmp_path / "pred", tmp_path / "true", training=None, workers=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no shape files"):
        run.evaluate(tmp_path / "pred", tmp_path / "empty", training=None, workers=1)


def test_a_training_set_without_programs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--train .*holds no program"):
        run.training_set(put(tmp_path / "train.txt", "nothing\n"), workers=1, seconds=10)
    with pytest.raises(DataError, match=r"--train .*cannot be read"):
        run.training_set(tmp_path / "gone", workers=1, seconds=10)


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["--pred", "{0}/gone", "--true", "{0}/true"], 3, "--pred"),
        (["--pred", "{0}/pred", "--true", "{0}/train.txt"], 3, "--true"),
        (["--pred", "{0}/pred", "--true", "{0}/true", "--train", "{0}/gone"], 3, "--train"),
        (["--pred", "{0}/pred", "--true", "{0}/true", "--out", "{0}/train.txt"], 2, "--out"),
        (["--pred", "{0}/pred", "--true", "{0}/true", "--workers", "-1"], 2, "--workers"),
        (["--true", "{0}/true"], 2, "--pred"),
    ],
)
def test_a_mistake_ends_in_one_line_and_the_documented_code(
    argv: list[str], code: int, words: str, folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *(word.format(folders) for word in argv)])
    error = capsys.readouterr().err
    assert ended.value.code == code
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert "Traceback" not in error


def test_a_sharded_data_set_is_a_truth_and_a_training_set(tmp_path: Path) -> None:
    loose, root = tmp_path / "loose", tmp_path / "shards"
    write_dummy_data(loose, num_samples=8, seed=1, workers=1, points=64, views=1, size=32)
    shard_folder(loose, root, rows=2, num_val=3)
    held = sorted(path.relative_to(loose / "json").as_posix()[:-5] for path in loose.glob("json/*/*.json"))[
        5:
    ]
    lines = ""
    for sample_id in held[:2]:
        put(tmp_path / f"pred/{sample_id}.json", (loose / f"json/{sample_id}.json").read_bytes())
        lines += json.dumps({"id": sample_id, "modalities": "text+points+image"}) + "\n"
    put(tmp_path / "pred/generated.jsonl", lines)
    found = run.evaluate(tmp_path / "pred", root, training=root, workers=1)
    as_loose = run.evaluate(tmp_path / "pred", loose, training=None, workers=1)
    assert found.summary.counts == {**as_loose.summary.counts, "missing": 1}
    assert found.summary.training is not None and found.summary.training.models == 5
    figures = {s.id: s.figures for s in as_loose.samples}
    assert all(s.figures == figures[s.id] for s in found.samples)
    assert all(found.inputs.of(key).caption == as_loose.inputs.of(key).caption != "" for key in held)
    (tmp_path / "out").mkdir()
    assert "could not be drawn" not in write_report(tmp_path / "out", found, workers=1).read_text()
    first = found.inputs.of(held[0])
    assert isinstance(first.points, InShard) and first.points.points().shape == (64, 6)
    assert isinstance(first.image, InShard) and first.image.image().size == (32, 32)


def test_text_of_ten_bits_is_compared_at_eight(tmp_path: Path) -> None:
    true = put(tmp_path / "t.txt", codec.encode(normalise(DRILLED).program, bits=8))
    predicted = put(tmp_path / "p.txt", codec.encode(normalise(DRILLED).program, bits=10))
    figures = score(Pair("x", true, predicted)).figures
    assert figures is not None
    assert figures["command_accuracy"] == figures["parameter_accuracy"] == 1.0
    assert figures["iou"] == pytest.approx(1.0, abs=0.02)
    assert codec.encode(normalise(CUBE).program) != true.read_text()
