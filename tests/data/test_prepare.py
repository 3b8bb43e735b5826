"""From JSON to points, views and captions; interrupted, resumed, and on bad models."""

import io
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cad_mllm.cad import omnicad, synth
from cad_mllm.cad.normalise import normalise
from cad_mllm.data import prepare as prepare_module
from cad_mllm.data.files import load_image, load_points
from cad_mllm.data.index import build_index
from cad_mllm.data.layout import CAPTION_KEY, Source
from cad_mllm.data.prepare import Failed, PrepareReport, prepare, print_report
from cad_mllm.data.sequence import TextTokenizer
from cad_mllm.data.stores import LooseFiles
from cad_mllm.errors import CadError, ConfigError, DataError

from .conftest import SPEC, contents

REAL_FILES = Path(__file__).parent / "omnicad" / "json"
IDS = ("0000/00000001_00001", "0000/00000002_00001", "0001/00000003_00001")


@pytest.fixture(scope="module")
def json_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed, sample_id in enumerate(IDS):
        path = root / f"{sample_id}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(omnicad.to_json(synth.make_program(seed)[0])))
    return root


def run(json_root: Path, out: Path, **changes: object) -> PrepareReport:
    settings: dict[str, object] = {"workers": 1, "points": 64, "views": 2, "size": 32}
    return prepare(json_root, out, **(settings | changes))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def prepared(json_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    report = run(json_root, out)
    assert (report.made, report.already_there, report.skipped) == (3, 0, ())
    return out


def test_the_layout_is_that_of_a_data_set(
    prepared: Path, json_root: Path, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    for sample_id in IDS:
        points_NC = load_points(prepared / "pcd" / f"{sample_id}.npz")
        assert points_NC.shape == (64, 6)
        assert np.abs(points_NC[:, :3]).max() <= 1.001
        assert np.linalg.norm(points_NC[:, 3:], axis=1) == pytest.approx(1, abs=2e-3)
        assert load_image(prepared / "img" / f"{sample_id}_001.png").size == (32, 32)
        assert (prepared / "json" / f"{sample_id}.json").read_bytes() == (
            json_root / f"{sample_id}.json"
        ).read_bytes()
    report = build_index(
        LooseFiles(Source.from_folder(prepared)),
        "train",
        tokenizer,
        SPEC,
        needs=frozenset({"points", "image"}),
        target_format="command",
        bits=8,
        max_skipped_fraction=0.0,
        output_dir=tmp_path,
        workers=0,
    )
    assert report.num_usable == 3


def test_the_scale_of_a_model_is_kept(prepared: Path, json_root: Path) -> None:
    normalised = normalise(omnicad.read(json_root / f"{IDS[0]}.json"))
    with np.load(prepared / "pcd" / f"{IDS[0]}.npz") as file:
        assert float(file["scale"]) == normalised.scale
        assert tuple(file["center"]) == normalised.center


def test_captions_made_from_a_program_say_so(prepared: Path) -> None:
    entries = json.loads((prepared / "txt" / "0000.json").read_text())
    assert [entry["id"] for entry in entries] == list(IDS[:2])
    assert {entry["caption_source"] for entry in entries} == {"template"}
    assert all("extrusion" in entry[CAPTION_KEY] for entry in entries)
    assert [entry["id"] for entry in json.loads((prepared / "txt" / "0001.json").read_text())] == [IDS[2]]


def test_the_number_of_workers_changes_nothing(prepared: Path, json_root: Path, tmp_path: Path) -> None:
    run(json_root, tmp_path / "again", workers=2)
    assert contents(tmp_path / "again") == contents(prepared)


@pytest.mark.usefixtures("no_worker_processes")
def test_what_an_interrupted_run_left_out_is_made_again(
    prepared: Path, json_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(json_root, out)
    (out / "pcd" / f"{IDS[0]}.npz").unlink()
    (out / "img" / f"{IDS[1]}_001.png").unlink()
    (out / "img" / "0000" / ".half.part.png").write_bytes(b"half a file")
    kept = out / "img" / f"{IDS[2]}_000.png"
    os.utime(kept, ns=(1, 1))
    report = run(json_root, out)
    assert (report.made, report.already_there) == (2, 1)
    assert kept.stat().st_mtime_ns == 1
    (out / "img" / "0000" / ".half.part.png").unlink()
    assert contents(out) == contents(prepared)


@pytest.mark.usefixtures("no_worker_processes")
def test_a_model_that_changed_is_made_again(json_root: Path, tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "out"
    shutil.copytree(json_root, models)
    run(models, out)
    before = load_points(out / "pcd" / f"{IDS[0]}.npz")
    (models / f"{IDS[0]}.json").write_bytes((json_root / f"{IDS[1]}.json").read_bytes())
    report = run(models, out)
    assert (report.made, report.already_there) == (1, 2)
    assert (load_points(out / "pcd" / f"{IDS[0]}.npz") != before).any()
    assert run(models, out).already_there == 3


@pytest.mark.usefixtures("no_worker_processes")
def test_bad_models_are_reported_and_left_out(json_root: Path, tmp_path: Path) -> None:
    models, out = tmp_path / "models", tmp_path / "out"
    (models / "0000").mkdir(parents=True)
    (models / f"{IDS[0]}.json").write_bytes((json_root / f"{IDS[0]}.json").read_bytes())
    (models / "0000" / "torn.json").write_text('{"entities": ')
    (models / "0000" / "back\\slash.json").write_text("{}")
    report = run(models, out)
    assert report.made == 1
    odd, skipped = report.skipped
    assert odd.reason == "id leaves the data folder"
    assert skipped.id == "0000/torn"
    assert skipped.seconds is not None
    written = json.loads((out / "prepare_report.json").read_text())
    assert written["skipped"][1]["id"] == "0000/torn"
    assert not (out / "json" / "0000" / "torn.json").exists()
    assert [entry["id"] for entry in json.loads((out / "txt" / "0000.json").read_text())] == [IDS[0]]
    text = io.StringIO()
    print_report(report, Console(file=text, width=120))
    assert "0000/torn" in text.getvalue()


def test_a_model_that_takes_too_long_is_left_out(
    json_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second_is_slow(fn: Any, items: list[Any], **_limits: float) -> Iterator[tuple[int, Any]]:
        yield 2, fn(items[2])
        yield 1, CadError("the model took longer than 60 s")
        yield 0, fn(items[0])

    monkeypatch.setattr(prepare_module, "run_limited", second_is_slow)
    report = run(json_root, tmp_path / "out")
    assert report.made == 2
    assert report.skipped == (Failed(IDS[1], "the model took longer than 60 s", None),)


@pytest.mark.usefixtures("no_worker_processes")
def test_given_captions_are_taken_over(json_root: Path, tmp_path: Path) -> None:
    texts = tmp_path / "captions"
    texts.mkdir()
    entries = [
        {"id": sample_id, CAPTION_KEY: f"part {sample_id}", "extra": 1} for sample_id in (*IDS, "0000/none")
    ]
    (texts / "0000.json").write_text(json.dumps(entries))
    run(json_root, tmp_path / "out", txt_root=texts)
    assert json.loads((tmp_path / "out" / "txt" / "0000.json").read_text()) == entries[:3]
    for broken in ("[", "{}", "[3]", '[{"id": ["x"]}]', "[{}]", "[" * 100_000):
        (texts / "0000.json").write_text(broken)
        with pytest.raises(DataError, match="captions"):
            run(json_root, tmp_path / "out", txt_root=texts)
    with pytest.raises(DataError, match="--txt_root"):
        run(json_root, tmp_path / "out", txt_root=texts / "0000.json")


@pytest.mark.usefixtures("no_worker_processes")
@pytest.mark.parametrize("in_place", [True, False])
def test_models_that_nobody_described_get_a_caption_beside_the_given_ones(
    in_place: bool, json_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    texts = out / "txt" if in_place else tmp_path / "captions"
    texts.mkdir(parents=True)
    given = {"id": IDS[0], CAPTION_KEY: "a part", "extra": 1}
    (texts / "0000.json").write_text(json.dumps([given]))
    run(json_root, out, txt_root=texts)
    first, second = json.loads((out / "txt" / "0000.json").read_text())
    (third,) = json.loads((out / "txt" / "0001.json").read_text())
    assert first == given
    assert [(one["id"], one["caption_source"]) for one in (second, third)] == [
        (IDS[1], "template"),
        (IDS[2], "template"),
    ]
    assert "extrusion" in second[CAPTION_KEY]
    if in_place:
        before = contents(out / "txt")
        run(json_root, out, txt_root=texts)
        assert contents(out / "txt") == before


@pytest.mark.usefixtures("no_worker_processes")
def test_captions_in_the_data_set_itself_are_never_lost(json_root: Path, tmp_path: Path) -> None:
    texts = tmp_path / "out" / "txt"
    texts.mkdir(parents=True)
    entries = [{"id": sample_id, CAPTION_KEY: "a part"} for sample_id in (IDS[0], "0000/not_yet_there")]
    (texts / "0000.json").write_text(json.dumps(entries))
    run(json_root, tmp_path / "out", txt_root=texts)
    assert json.loads((texts / "0000.json").read_text())[:2] == entries


@pytest.mark.usefixtures("no_worker_processes")
def test_a_folder_can_be_completed_in_place(json_root: Path, prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "data"
    for sample_id in IDS:
        path = out / "json" / f"{sample_id}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((json_root / f"{sample_id}.json").read_bytes())
    assert run(out / "json", out).made == 3
    assert contents(out) == contents(prepared)


def test_other_settings_are_not_mixed_into_a_folder(json_root: Path, prepared: Path) -> None:
    with pytest.raises(ConfigError, match="other settings"):
        run(json_root, prepared, points=65)


@pytest.mark.parametrize("make", [lambda root: None, lambda root: root.mkdir()])
def test_a_folder_without_models_is_named(make: object, tmp_path: Path) -> None:
    root = tmp_path / "none"
    make(root)  # type: ignore[operator]
    with pytest.raises(DataError, match="--json_root"):
        run(root, tmp_path / "out")


def test_an_out_that_cannot_be_written_is_named_before_any_work(json_root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ConfigError, match=r"--out .* cannot be written"):
            run(json_root, out)


def test_brackets_in_a_reason_are_shown_as_they_are() -> None:
    report = PrepareReport(made=0, already_there=0, skipped=(Failed("a[/b]", "[/x] [red]", None),), seconds=0)
    text = io.StringIO()
    print_report(report, Console(file=text, width=120))
    assert "a[/b]" in text.getvalue() and "[/x] [red]" in text.getvalue()


def test_views_differ(prepared: Path) -> None:
    views = [Image.open(prepared / "img" / f"{IDS[0]}_{view:03d}.png").tobytes() for view in range(2)]
    assert views[0] != views[1]


@pytest.mark.usefixtures("no_worker_processes")
def test_the_real_files_become_training_data(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    report = run(REAL_FILES, tmp_path / "out", views=1, size=16)
    assert report.skipped == ()
    assert report.made == 12
    index = build_index(
        LooseFiles(Source.from_folder(tmp_path / "out")),
        "train",
        tokenizer,
        replace(SPEC, max_seq_length=100_000),
        needs=frozenset({"points", "image"}),
        target_format="command",
        bits=8,
        max_skipped_fraction=0.0,
        output_dir=tmp_path,
        workers=0,
    )
    assert index.num_usable == 12


@pytest.mark.usefixtures("no_worker_processes")
def test_the_command_fails_if_it_made_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cad_mllm.commands import data

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "torn.json").write_text("{")
    words = ["--json_root", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(DataError, match="none of the 1 models"):
        data.prepare(words)
    assert "torn" in capsys.readouterr().out


def test_the_command_tells_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from cad_mllm.commands import data

    source = next((Path(__file__).parent / "omnicad" / "json").rglob("*.json"))
    copy = tmp_path / "in" / "0000" / source.name
    copy.parent.mkdir(parents=True)
    copy.write_bytes(source.read_bytes())
    words = ["--json_root", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert data.prepare([*words, "--workers", "1", "--views", "1", "--points", "64"]) == 0
    shown = capsys.readouterr().out
    assert "made" in shown and "skipped" in shown
    assert (tmp_path / "out" / "img" / "0000" / f"{source.stem}_000.png").is_file()
