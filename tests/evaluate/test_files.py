"""Which files belong together, and what names and side files may hold."""

import json
import os
from pathlib import Path

import pytest

from cad_mllm.errors import DataError
from cad_mllm.evaluate.files import UNKNOWN_MODALITIES, find_shapes, read_inputs


def put(path: Path, content: str = "x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


def test_an_id_is_the_path_without_suffix_and_the_file_that_says_most_stands_for_it(tmp_path: Path) -> None:
    for name in (
        "a/1.step",
        "a/1.json",
        "a/1.txt",
        "a/1.png",
        "2.0.STL",
        "3.txt",
        ".hidden.txt",
        ".git/4.txt",
    ):
        put(tmp_path / name)
    found = find_shapes(tmp_path, "--pred")
    assert {key: path.name for key, path in found.files.items()} == {
        "a/1": "1.json",
        "2.0": "2.0.STL",
        "3": "3.txt",
    }
    assert found.unreadable == []


def test_of_a_data_folder_the_models_are_read_and_not_the_captions(tmp_path: Path) -> None:
    put(tmp_path / "json/0000/1.json")
    put(tmp_path / "txt/0000.json")
    assert list(find_shapes(tmp_path, "--true").files) == ["0000/1"]


@pytest.mark.parametrize("name", ["gone", "file"])
def test_a_folder_that_is_none_is_named_with_its_flag(name: str, tmp_path: Path) -> None:
    put(tmp_path / "file")
    with pytest.raises(DataError, match=rf"--true .*{name}: cannot be read"):
        find_shapes(tmp_path / name, "--true")


def test_a_folder_inside_that_cannot_be_read_is_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "open/1.txt")
    put(tmp_path / "shut/2.txt")
    scandir = os.scandir

    def guarded(path: str) -> object:  # root may read everything: the refusal is played
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    found = find_shapes(tmp_path, "--pred")
    assert list(found.files) == ["open/1"]
    assert found.unreadable == ["'shut': Permission denied"]


def test_links_in_a_circle_pipes_and_odd_names_do_no_harm(tmp_path: Path) -> None:
    put(tmp_path / "a/1.txt")
    (tmp_path / "a/around").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "pipe.stl")  # would wait for ever for a writer
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nothing")
    put(tmp_path / 'a/"<script>.txt')
    put(tmp_path / "a/back\\slash.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe.txt")).write_text("x")
    found = find_shapes(tmp_path, "--pred")
    assert sorted(found.files) == ['a/"<script>', "a/1"]
    assert len(found.unreadable) == 2
    assert all(line.isascii() for line in found.unreadable)


def test_what_was_given_comes_from_the_side_file_and_the_true_data(tmp_path: Path) -> None:
    predicted, true = tmp_path / "pred", tmp_path / "true"
    put(true / "txt/0000.json", json.dumps([{"id": "0000/1", "text caption": "A plate"}, {"id": "0000/2"}]))
    put(true / "img/0000/1_000.png")
    picture = put(predicted / "in/3.png")
    lines = [
        {"id": "0000/1", "modalities": "text+image"},
        {"id": "0000/3", "modalities": "text", "caption": "Mine", "image": "in/3.png", "points": "in/3.npz"},
        {"id": "0000/4", "image": "in/gone.png", "error": None, "was_cut": False},
    ]
    put(predicted / "generated.jsonl", "\n".join(map(json.dumps, lines)))
    inputs = read_inputs(predicted, true)
    first, third, fourth = (inputs.of(f"0000/{i}") for i in (1, 3, 4))
    assert (first.modalities, first.caption) == ("text+image", "A plate")
    assert first.image == true / "img/0000/1_000.png"
    assert (third.caption, third.image, third.points) == ("Mine", picture, None)
    assert (fourth.modalities, fourth.image) == (UNKNOWN_MODALITIES, None)
    assert inputs.of("0000/5").caption == ""
    assert inputs.unreadable == []


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[" * 50_000,
        "[1]",
        '{"id": 5}',
        '{"id": "../../etc/passwd"}',
        '{"id": "/etc/passwd"}',
        '{"id": "a", "image": "../secret.png"}',
        '{"id": "a", "image": "/etc/passwd"}',
        '{"id": "a", "modalities": "text+smell"}',
    ],
)
def test_a_line_that_is_wrong_or_leaves_the_folder_is_listed_and_the_next_one_read(
    line: str, tmp_path: Path
) -> None:
    put(tmp_path / "secret.png")
    put(tmp_path / "pred/generated.jsonl", line + '\n{"id": "b", "modalities": "text"}\n')
    inputs = read_inputs(tmp_path / "pred", tmp_path / "true")
    assert len(inputs.unreadable) == 1
    assert inputs.of("a").image is None
    assert inputs.of("b").modalities == "text"


@pytest.mark.parametrize(
    "content", ["nonsense", '{"id": 1}', '[1, {"id": []}, {"id": "a", "text caption": 7}]']
)
def test_broken_captions_cost_nothing_but_themselves(content: str, tmp_path: Path) -> None:
    put(tmp_path / "true/txt/0000.json", content)
    put(tmp_path / "true/txt/0001.json", '[{"id": "b", "text caption": "B"}]')
    inputs = read_inputs(tmp_path, tmp_path / "true")
    assert inputs.of("a").caption == ""
    assert inputs.of("b").caption == "B"


def test_half_a_character_does_not_end_the_writing_of_the_page(tmp_path: Path) -> None:
    put(tmp_path / "generated.jsonl", '{"id": "a", "caption": "A \\ud800 plate"}')
    assert read_inputs(tmp_path, tmp_path).of("a").caption.encode() == b"A ? plate"
