"""Which samples are usable, what happens to the others, and when an index may be used again."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.normalise import normalise
from cad_mllm.data import files
from cad_mllm.data.index import IndexReport, load_index
from cad_mllm.data.layout import CAPTION_KEY, Source
from cad_mllm.data.sequence import TextTokenizer, prompt_ids, target_ids
from cad_mllm.data.stores import LooseFiles
from cad_mllm.errors import ConfigError, DataError

from .conftest import SPEC, Folder

MakeFolder = Callable[..., Folder]
Build = Callable[..., IndexReport]

FAULTY = 2
"""The sample that each test below breaks."""


def break_json(folder: Folder) -> None:
    folder.file("json", FAULTY).write_text('{"entities": ')


def empty_program(folder: Folder) -> None:
    folder.file("json", FAULTY).write_text("{}")


def remove_model(folder: Folder) -> None:
    folder.file("json", FAULTY).unlink()


def remove_caption(folder: Folder) -> None:
    folder.write_captions([entry for n, entry in enumerate(folder.captions()) if n != FAULTY])


def blank_caption(folder: Folder) -> None:
    entries = folder.captions()
    entries[FAULTY][CAPTION_KEY] = "  "
    folder.write_captions(entries)


def surrogate_caption(folder: Folder) -> None:
    entries = folder.captions()
    entries[FAULTY][CAPTION_KEY] = "half a pair \ud800"
    folder.write_captions(entries)


def remove_points(folder: Folder) -> None:
    folder.file("pcd", FAULTY).unlink()


def write_points(folder: Folder, points: np.ndarray, key: str = "points") -> None:
    np.savez(folder.file("pcd", FAULTY), **{key: points})


def cloud(rows: int = 7, columns: int = 6) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(rows, columns))


def nan_points(folder: Folder) -> None:
    points = cloud()
    points[3, 1] = np.nan
    write_points(folder, points)


def zero_normals(folder: Folder) -> None:
    write_points(folder, np.concatenate([cloud(columns=3), np.zeros((7, 3))], axis=1))


def pickled_points(folder: Folder) -> None:
    write_points(folder, np.array([{"a": 1}], dtype=object))


def huge_image(folder: Folder) -> None:
    Image.new("1", (10_000, 10_000)).save(folder.file("img", FAULTY))


def image_without_white(folder: Folder) -> None:
    Image.new("F", (8, 8)).save(folder.file("img", FAULTY), format="TIFF")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-20])


def truncated_image(folder: Folder) -> None:
    path = folder.root / "img" / f"{folder.ids[FAULTY]}_001.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:6000])


BREAKS: list[tuple[str, Callable[[Folder], None]]] = [
    ("unusable model", break_json),
    ("unusable model", empty_program),
    ("no model", remove_model),
    ("no caption", remove_caption),
    ("empty caption", blank_caption),
    ("caption is not valid text", surrogate_caption),
    ("no points", remove_points),
    ("unreadable points", lambda folder: truncate(folder.file("pcd", FAULTY))),
    ("unreadable points", pickled_points),
    ("unreadable points", lambda folder: write_points(folder, cloud(), key="other")),
    ("points that are not finite (NaN or infinite)", nan_points),
    ("points that are not finite (NaN or infinite)", lambda folder: write_points(folder, cloud() * 1e300)),
    ("points of a wrong form", lambda folder: write_points(folder, cloud(columns=4))),
    ("points without normals", lambda folder: write_points(folder, cloud(columns=3))),
    ("points without normals", zero_normals),
    ("no points in the file", lambda folder: write_points(folder, cloud(rows=0))),
    ("no image", lambda folder: folder.file("img", FAULTY).unlink()),
    ("unreadable image", truncated_image),
    ("unreadable image", huge_image),
    ("unreadable image", image_without_white),
    ("unreadable image", lambda folder: folder.file("img", FAULTY).write_bytes(b"not a picture")),
]


def skipped_lines(tmp_path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("category, spoil", BREAKS)
def test_a_bad_sample_is_set_aside_with_its_reason(
    category: str, spoil: Callable[[Folder], None], make_folder: MakeFolder, build: Build, tmp_path: Path
) -> None:
    folder = make_folder()
    spoil(folder)
    report = build(folder)
    assert report.reasons == {category: 1}
    assert (report.num_candidates, report.num_usable, report.num_skipped) == (6, 5, 1)
    (line,) = skipped_lines(tmp_path)
    assert line["id"] == folder.ids[FAULTY]
    assert line["split"] == "train"
    assert line["file"].startswith(str(folder.root))
    assert line["reason"].startswith(category)
    assert folder.ids[FAULTY] not in load_index(report.path).ids


def test_nobody_is_advised_to_unpickle_a_file(make_folder: MakeFolder, build: Build, tmp_path: Path) -> None:
    folder = make_folder()
    pickled_points(folder)
    build(folder)
    (line,) = skipped_lines(tmp_path)
    assert line["reason"] == "unreadable points: no array of numbers in it"


def test_points_that_unpack_to_more_than_the_machine_has_are_not_unpacked(
    make_folder: MakeFolder, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(2)
    np.savez_compressed(folder.file("pcd", 1), points=np.ones((10_000, 6)))
    assert folder.file("pcd", 1).stat().st_size < 10_000
    assert build(folder).reasons == {}
    monkeypatch.setattr(files, "MAX_POINTS_BYTES", 10_000)
    os.utime(folder.file("pcd", 1), ns=(1, 1))
    assert build(folder).reasons == {"unreadable points": 1}


def test_points_without_normals_name_the_remedy(
    make_folder: MakeFolder, build: Build, tmp_path: Path
) -> None:
    folder = make_folder()
    write_points(folder, cloud(columns=3))
    build(folder)
    assert "cad-mllm prepare" in skipped_lines(tmp_path)[0]["reason"]


@pytest.mark.parametrize(
    "bad_id", ["../../secret", "0000/../../x", "/etc/passwd", "0000\\x", "0000/a\0b", "", "0000//x"]
)
def test_an_id_that_leaves_the_folder_is_refused(
    bad_id: str, make_folder: MakeFolder, build: Build, tmp_path: Path
) -> None:
    folder = make_folder(2)
    (tmp_path / "secret.json").write_text(folder.file("json", 0).read_text())
    folder.write_captions([*folder.captions(), {"id": bad_id, CAPTION_KEY: "outside"}])
    report = build(folder)
    assert report.reasons == {"id leaves the data folder": 1}
    assert len(load_index(report.path)) == 2


@pytest.mark.parametrize("entry", [7, {}, {"id": 3}, ["0000/x"]])
def test_a_caption_entry_without_an_id_is_set_aside(
    entry: object, make_folder: MakeFolder, build: Build
) -> None:
    folder = make_folder(2)
    folder.write_captions([*folder.captions(), entry])
    assert build(folder).reasons == {"caption entry without an id": 1}


def test_an_unreadable_caption_file_is_reported_with_its_models(
    make_folder: MakeFolder, build: Build
) -> None:
    folder = make_folder(3)
    (folder.root / "txt" / "0001.json").write_text("[{")
    assert build(folder).reasons == {"unreadable captions": 1}
    folder.caption_file.write_text("[")
    with pytest.raises(DataError, match=r"none of 5 train samples is usable: 0 are .* no caption \(3\)"):
        build(folder)


def test_only_the_modalities_that_the_run_uses_are_asked_for(make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder()
    remove_points(folder)
    assert build(folder, needs=frozenset({"image"})).num_skipped == 0
    assert build(folder, needs=frozenset()).num_skipped == 0
    assert build(folder, needs=frozenset({"points"})).num_skipped == 1


def test_too_many_bad_samples_end_the_run(make_folder: MakeFolder, build: Build, tmp_path: Path) -> None:
    folder = make_folder(10)
    remove_points(folder)
    assert build(folder, max_skipped_fraction=0.1).num_skipped == 1
    with pytest.raises(DataError) as error:
        build(folder, max_skipped_fraction=0.05)
    for part in (
        "1 of 10",
        "10.0%",
        "no points (1)",
        str(tmp_path / "out" / "skipped.jsonl"),
        "--max_skipped_fraction",
    ):
        assert part in str(error.value)


def test_too_long_targets_are_counted_apart_and_never_cut(
    make_folder: MakeFolder, build: Build, tmp_path: Path
) -> None:
    folder = make_folder(8)
    full = load_index(build(folder, output_dir=tmp_path / "full").path)
    lengths = full.num_prompt_tokens + full.num_target_tokens + SPEC.image_tokens + SPEC.point_tokens
    limit = int(np.sort(lengths)[4])
    report = build(folder, spec=replace(SPEC, max_seq_length=limit))
    assert report.num_too_long == int((lengths > limit).sum()) > 0
    assert report.num_skipped == 0
    assert report.too_long_share == report.num_too_long / 8
    kept = load_index(report.path)
    assert [full.record(n) for n in range(8) if lengths[n] <= limit] == [
        kept.record(n) for n in range(len(kept))
    ]
    with pytest.raises(DataError, match=r"8 are longer than --max_seq_length 5"):
        build(folder, spec=replace(SPEC, max_seq_length=5))


def test_modalities_that_are_not_used_take_no_room(make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder(4)
    full = load_index(build(folder).path)
    longest = int((full.num_prompt_tokens + full.num_target_tokens).max())
    assert build(folder, spec=replace(SPEC, max_seq_length=longest), needs=frozenset()).num_too_long == 0
    assert build(folder, spec=replace(SPEC, max_seq_length=longest)).num_too_long > 0


def test_a_record_holds_what_is_learned(
    make_folder: MakeFolder, build: Build, tokenizer: TextTokenizer
) -> None:
    folder = make_folder()
    index = load_index(build(folder).path)
    record = index.record(1)
    program = normalise(omnicad.read(folder.file("json", 1))).program
    assert record.target == codec.encode(program, bits=8)
    assert record.caption == "part 1"
    assert index.target(1) == target_ids(tokenizer, [record.target])[0]
    assert index.prompt(1) == prompt_ids(tokenizer, ["part 1"])[0]
    assert index.num_tokens(1) == (len(index.prompt(1)), len(index.target(1)))
    assert (index.num_prompt_tokens[1], index.num_target_tokens[1]) == index.num_tokens(1)
    assert index.num_views(1) == 2
    text = load_index(build(folder, target_format="json").path).record(1).target
    assert json.loads(text) == json.loads(folder.file("json", 1).read_text())
    assert ", " not in text


def test_an_index_is_used_again_while_nothing_changes(make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder()
    remove_points(folder)
    first = build(folder)
    before = first.path.stat().st_mtime_ns
    again = build(folder)
    assert (first.reused, again.reused) == (False, True)
    assert again == replace(first, reused=True)
    assert again.path.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: os.utime(folder.file("json", 0), ns=(1, 1)),
        lambda folder: folder.file("pcd", 0).unlink(),
        lambda folder: folder.file("img", 0).write_bytes(b"x"),
        lambda folder: folder.write_captions(folder.captions()[1:]),
    ],
)
def test_an_index_is_rebuilt_when_a_file_changes(
    change: Callable[[Folder], None], make_folder: MakeFolder, build: Build
) -> None:
    folder = make_folder()
    build(folder)
    change(folder)
    assert not build(folder).reused


@pytest.mark.parametrize(
    "change", [{"bits": 10}, {"needs": frozenset()}, {"spec": replace(SPEC, max_seq_length=4000)}]
)
def test_an_index_is_rebuilt_when_a_setting_changes(
    change: dict[str, object], make_folder: MakeFolder, build: Build
) -> None:
    folder = make_folder()
    build(folder)
    assert not build(folder, **change).reused


def test_an_index_is_rebuilt_when_the_list_of_skipped_samples_is_gone(
    make_folder: MakeFolder, build: Build, tmp_path: Path
) -> None:
    folder = make_folder()
    remove_points(folder)
    build(folder)
    (tmp_path / "out" / "skipped.jsonl").unlink()
    assert not build(folder).reused
    assert len(skipped_lines(tmp_path)) == 1


@pytest.mark.parametrize("keep", [0, 10, 400, -1, -200])
def test_a_torn_index_is_never_trusted(keep: int, make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder()
    report = build(folder)
    whole = report.path.read_bytes()
    report.path.write_bytes(whole[:keep])
    with pytest.raises(DataError, match="damaged"):
        load_index(report.path)
    assert not build(folder).reused
    assert report.path.read_bytes() == whole


def test_the_fingerprint_follows_the_contents(make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder()
    fingerprint = load_index(build(folder).path).fingerprint
    os.utime(folder.file("json", 0), ns=(1, 1))
    assert load_index(build(folder).path).fingerprint == fingerprint
    assert load_index(build(folder, bits=10).path).fingerprint != fingerprint
    entries = folder.captions()
    entries[0][CAPTION_KEY] = "another"
    folder.write_captions(entries)
    assert load_index(build(folder).path).fingerprint != fingerprint


def test_workers_find_the_same(make_folder: MakeFolder, build: Build, tmp_path: Path) -> None:
    folder = make_folder(130)
    remove_points(folder)
    here, there = (
        build(folder, output_dir=tmp_path / "here"),
        build(folder, output_dir=tmp_path / "there", workers=2),
    )
    assert here.path.read_bytes() == there.path.read_bytes()


def test_the_splits_share_one_list_of_skipped_samples(
    make_folder: MakeFolder, build: Build, tmp_path: Path
) -> None:
    folder = make_folder()
    remove_points(folder)
    build(folder)
    lines = (tmp_path / "out" / "skipped.jsonl").read_text()
    val_line = lines.replace('"train"', '"val"')
    (tmp_path / "out" / "skipped.jsonl").write_text(val_line + lines)
    build(folder, bits=10)
    assert (tmp_path / "out" / "skipped.jsonl").read_text() == val_line + lines


def test_a_folder_that_a_stage_needs_must_be_given(make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder()
    source = replace(Source.from_folder(folder.root), images=None)
    with pytest.raises(ConfigError, match="--omnicad_img_root"):
        build(folder, store=LooseFiles(source))
    assert build(folder, store=LooseFiles(source), needs=frozenset({"points"})).num_usable == 6
    with pytest.raises(DataError, match="cad-mllm prepare"):
        build(folder, store=LooseFiles(replace(source, images=folder.root / "nowhere")))


def test_a_name_too_long_for_a_file_is_set_aside(make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder(2)
    long_id = f"0000/{'x' * 249}"
    (folder.root / "json" / f"{long_id}.json").write_text(folder.file("json", 0).read_text())
    folder.write_captions([*folder.captions(), {"id": long_id, CAPTION_KEY: "long"}])
    assert build(folder, needs=frozenset({"image"})).reasons == {"unreadable file": 1}


def test_hidden_files_are_no_samples(make_folder: MakeFolder, build: Build) -> None:
    folder = make_folder(2)
    (folder.root / "json" / "0000" / ".begun.part.json").write_text("{")
    (folder.root / "txt" / ".0000.part.json").write_text("[")
    assert build(folder).num_candidates == 2
