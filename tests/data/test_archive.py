"""The archive as it is downloaded, or as somebody made it to do harm: what is read, what is left out, why."""

import json
import os
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from cad_mllm.cad.jsonfile import MAX_FILE_BYTES
from cad_mllm.data import archive as archive_module
from cad_mllm.data.archive import Archive, Splits, open_archive, open_folders
from cad_mllm.errors import CadError, DataError

A, B, C = "0000/00000001_00001", "0000/00000001_00002", "0001/00000002_00001"

Contents = dict[str, bytes | str]


def as_folder(root: Path, contents: Contents) -> Path:
    for name, content in contents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def as_zip(root: Path, contents: Contents) -> Path:
    root.parent.mkdir(parents=True, exist_ok=True)
    path = root.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in contents.items():
            file.writestr(name, content)
    return path


Write = Callable[[Path, Contents], Path]
both = pytest.mark.parametrize("write", [as_folder, as_zip])


def models(*ids: str, root: str = "") -> Contents:
    return {f"{root}json/{sample_id}.json": f'{{"of": "{sample_id}"}}' for sample_id in ids}


def captions(*pairs: tuple[str, object]) -> str:
    return json.dumps([{"id": sample_id, "text caption": text} for sample_id, text in pairs])


@both
def test_models_and_captions_are_joined_by_id(write: Write, tmp_path: Path) -> None:
    texts: Contents = {"txt/0000.json": captions((A, "a"), (B, "b")), "txt/0001.json": captions((C, "c"))}
    archive = open_archive(write(tmp_path / "data", models(C, A, B) | texts))
    assert archive.ids == (A, B, C)
    assert archive.rejected == ()
    assert json.loads(archive.read(B)) == {"of": B}
    found = archive.captions()
    assert {key: (one.text, one.source) for key, one in found.by_id.items()} == {
        A: ("a", "given"),
        B: ("b", "given"),
        C: ("c", "given"),
    }
    assert (found.faults, found.orphans) == ([], set())


def test_a_zip_file_may_hold_one_folder_and_what_an_operating_system_adds(tmp_path: Path) -> None:
    extra: Contents = {
        "__MACOSX/json/0000/x.json": "",
        "Omni/json/0000/._x.json": "",
        "Omni/readme.txt": "",
        "Omni/deeper/json/0000/y.json": "{}",
    }
    archive = open_archive(as_zip(tmp_path / "data", models(A, root="Omni/") | extra))
    assert archive.ids == (A,)
    assert archive.rejected == ()


def test_names_that_leave_the_archive_are_left_out(tmp_path: Path) -> None:
    names = ["../../etc/x.json", "/abs/x.json", "json/../../x.json", "json/0000/a\\b.json", "json//x.json"]
    archive = open_archive(as_zip(tmp_path / "data", models(A) | dict.fromkeys(names, "{}")))
    assert archive.ids == (A,)
    assert {one.reason for one in archive.rejected} == {"id leaves the data folder"}
    assert len(archive.rejected) == len(names)


def test_links_are_not_followed(tmp_path: Path) -> None:
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    folder = as_folder(tmp_path / "data", models(A))
    (folder / "json" / f"{B}.json").symlink_to(secret)
    archive = open_archive(folder)
    with pytest.raises(CadError, match="is a link"):
        archive.read(B)

    path = as_zip(tmp_path / "zip", models(A))
    link = zipfile.ZipInfo(f"json/{B}.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(link, str(secret))
    archive = open_archive(path)
    assert archive.ids == (A,)
    assert [(one.id, one.reason) for one in archive.rejected] == [(B, "is a link: put the file itself there")]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_id_that_is_there_twice_is_left_out(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "data", models(A, B))
    for text in ("one", "two"):
        with zipfile.ZipFile(path, "a") as file:
            file.writestr(f"json/{B}.json", text)
    archive = open_archive(path)
    assert archive.ids == (A,)
    assert [(one.id, one.reason) for one in archive.rejected] == [(B, "the archive holds this id twice")]


def test_a_large_file_is_refused_by_its_size(tmp_path: Path) -> None:
    """200 MB of JSON, which takes no disk here and must take no memory."""
    folder = as_folder(tmp_path / "data", models(A, B))
    os.truncate(folder / "json" / f"{B}.json", 200_000_000)
    with pytest.raises(CadError, match=r"200,000,000 bytes are more than the 20,000,000"):
        open_archive(folder).read(B)
    bomb: Contents = {f"json/{B}.json": b" " * (MAX_FILE_BYTES + 1)}
    with pytest.raises(CadError, match="bytes are more than"):
        open_archive(as_zip(tmp_path / "bomb", models(A) | bomb)).read(B)


def test_a_zip_bomb_that_lies_about_its_size_does_not_go_off(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "data", {f"json/{A}.json": b" " * 10_000_000})
    content = path.read_bytes()
    honest = struct.pack("<I", 10_000_000)
    assert content.count(honest) == 2, "local header and directory"
    path.write_bytes(content.replace(honest, struct.pack("<I", 100)))
    archive = open_archive(path)
    with pytest.raises(CadError, match="cannot be read from the archive"):
        archive.read(A)


def test_a_damaged_member_costs_itself(tmp_path: Path) -> None:
    path = as_zip(tmp_path / "data", models(A, B))
    content = bytearray(path.read_bytes())
    content[content.index(f"json/{A}.json".encode()) + len(f"json/{A}.json") + 3] ^= 0xFF
    path.write_bytes(content)
    archive = open_archive(path)
    with pytest.raises(CadError, match="cannot be read from the archive"):
        archive.read(A)
    assert json.loads(archive.read(B)) == {"of": B}


@pytest.mark.parametrize("content", [b"", b"PK\3\4 torn", b"{}"])
def test_what_is_no_zip_file_is_named(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "Omni-CAD.zip"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"--archive .*Omni-CAD.zip"):
        open_archive(path)


@both
def test_an_archive_without_models_is_named(write: Write, tmp_path: Path) -> None:
    for contents in ({"txt/0000.json": "[]"}, {"json/readme.txt": ""}):
        with pytest.raises(DataError, match="--archive"):
            open_archive(write(tmp_path / f"data{len(contents)}", dict(contents)))
    with pytest.raises(DataError, match="--archive"):
        open_archive(tmp_path / "absent")
    with pytest.raises(DataError, match="--json_root"):
        open_folders(tmp_path / "absent", None)


def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = as_folder(tmp_path / "data", models(A, C))
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "0001":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)  # not by mode: these tests may run as root
    with pytest.raises(DataError, match=r"cannot read .*0001: Permission denied"):
        open_archive(folder)


@both
def test_captions_that_cannot_be_used_are_noted_one_by_one(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_module, "MAX_TEXT_BYTES", 250_000)
    texts: Contents = {
        "txt/0.json": captions((A, "first"), ("0009/none", "x"), (B, 7), (C, " "), (C, "\ud800")),
        "txt/1.json": captions((A, "second"), (A, "first")),
        "txt/2.json": '[{"text caption": "x"}, 3]',
        "txt/3.json": b'[{"id": "\xff"}]',
        "txt/4.json": "[" * 100_000,
        "txt/5.json": "{}",
        "txt/6.json": "[",
        "txt/7.json": " " * 250_001,
    }
    found = open_archive(write(tmp_path / "data", models(A, B, C) | texts)).captions()
    assert {key: one.text for key, one in found.by_id.items()} == {A: "first"}
    assert found.orphans == {"0009/none"}
    text = "\n".join(found.faults)
    for expected in (
        f'txt/0.json, entry 3: {B} has no "text caption" that is a text',
        f"txt/0.json, entry 4: {C} has no",
        f"txt/0.json, entry 5: {C} has no",
        f"txt/1.json, entry 1: {A} has another caption already, which stays",
        "txt/2.json, entry 1: has no id",
        "txt/2.json, entry 2: has no id",
        "txt/3.json: is not UTF-8 text: byte 9 is wrong",
        "txt/4.json: is nested too deep",
        "txt/5.json: is not a list",
        "txt/6.json: is not valid JSON",
        "txt/7.json: 250,001 bytes are more than the 250,000 that are read",
    ):
        assert expected in text
    assert len(found.faults) == 11


def test_captions_keep_their_label(tmp_path: Path) -> None:
    entries = [
        {"id": sample_id, "text caption": "x", "caption_source": label}
        for sample_id, label in ((A, "template"), (B, "procedural"), (C, "who knows"))
    ]
    archive = open_archive(as_folder(tmp_path, models(A, B, C) | {"txt/0.json": json.dumps(entries)}))
    sources = {key: one.source for key, one in archive.captions().by_id.items()}
    assert sources == {A: "template", B: "procedural", C: "given"}


@both
def test_the_fingerprint_tells_one_archive_from_another(write: Write, tmp_path: Path) -> None:
    def fingerprint(contents: Contents) -> str:
        return open_archive(write(tmp_path / "data", contents)).fingerprint

    first = fingerprint(models(A) | {"txt/0.json": "[]"})
    assert fingerprint(models(A) | {"txt/0.json": "[1]"}) != first
    assert fingerprint(models(A, B) | {"txt/0.json": "[]"}) != first


def test_a_split_file_names_base_ids(tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ["0000/00000001"], "test": [C]}))
    splits = Splits(path)
    assert [splits.of(sample_id) for sample_id in (A, B, C)] == ["train", "train", "val"]
    assert splits.of("0000/00000003_00001") is None
    assert Splits(None).of("anything") == "train"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[", "is not valid JSON"),
        ("[" * 100_000, "nested too deep"),
        (b"\xff", "not UTF-8"),
        ("[]", "must be an object with lists of base ids under train"),
        ('{"training": []}', "must be an object"),
        ('{"train": "x"}', "train must be a list"),
        ('{"train": [3]}', "train must be a list"),
        ('{"train": ["a"], "test": ["a"]}', "a is in two splits"),
        (None, "cannot be read"),
    ],
)
def test_a_bad_split_file_is_named(text: str | bytes | None, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "splits.json"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=rf"--split_file .*splits.json.*{expected}"):
        Splits(path)


def test_reading_costs_no_more_than_the_member(tmp_path: Path) -> None:
    """A file that grew since it was listed is noticed, not read to its end."""
    folder = as_folder(tmp_path, models(A))
    archive: Archive = open_archive(folder)
    with (folder / "json" / f"{A}.json").open("ab") as file:
        file.write(b" " * 100)
    with pytest.raises(CadError, match="was changed while"):
        archive.read(A)
