"""What `cad-mllm data inspect` tells of a data set, in both layouts."""

import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cad_mllm.cli import main
from cad_mllm.data.inspect import SPEC, InspectSettings, inspect
from cad_mllm.data.sequence import TextTokenizer, prompt_ids, target_ids
from cad_mllm.errors import DataError

from .conftest import Folder
from .sharding import shard_folder

MakeFolder = Callable[..., Folder]
EMBEDDINGS = SPEC.image_tokens + SPEC.point_tokens


def shown(location: Path, tokenizer: TextTokenizer, **changes: object) -> str:
    out = StringIO()
    settings = InspectSettings(workers=1, **changes)  # type: ignore[arg-type]
    inspect(str(location), tokenizer, settings, Console(file=out, width=200))
    return out.getvalue()


def cells(text: str) -> list[list[str]]:
    return [
        [cell.strip() for cell in line.strip("│┃\n").split("│")]
        for line in text.splitlines()
        if line.startswith("│")
    ]


@pytest.mark.parametrize("layout", ["loose", "shards"])
def test_the_sequence_is_shown_token_by_token(
    layout: str, make_folder: MakeFolder, tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    folder = make_folder(5)
    root = shard_folder(folder.root, tmp_path / "shards") if layout == "shards" else folder.root
    text = shown(root, tokenizer, sample_id=folder.ids[3])
    target = re.search(r"target:\s+(\S+)", text)
    assert target is not None and f"sample {folder.ids[3]}" in text and "caption: part 3" in text
    rows = [row for row in cells(text) if len(row) == 5 and row[1] in ("image", "points", "prompt", "target")]
    assert rows[0] == ["0..255", "image", "", "256 embeddings", ""]
    assert rows[1] == ["256..512", "points", "", "257 embeddings", ""]
    prompt, learned = prompt_ids(tokenizer, ["part 3"])[0], target_ids(tokenizer, [target[1]])[0]
    assert [int(row[2]) for row in rows[2:]] == [*prompt, *learned]
    assert [int(row[0]) for row in rows[2:]] == list(range(EMBEDDINGS, EMBEDDINGS + len(rows) - 2))
    assert [row[4] for row in rows[2:]] == [""] * len(prompt) + ["yes"] * len(learned)
    total = EMBEDDINGS + len(prompt) + len(learned)
    assert f"{total} positions, {len(learned)} supervised; text+points+image" in text


def test_the_splits_are_counted(make_folder: MakeFolder, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    root = shard_folder(make_folder(9).root, tmp_path / "shards", num_val=3)
    text = shown(root, tokenizer, split="val")
    overview = [row[:3] + row[4:] for row in cells(text) if row[0] in ("train", "val")]
    assert overview == [["train", "6", "6", "6 given"], ["val", "3", "3", "3 given"]]
    assert "checksums: all 3 shards are intact" in text
    assert shown(root, tokenizer, seed=1, split="val") != text


def test_what_cannot_be_used_is_counted_with_its_reason(
    make_folder: MakeFolder, tokenizer: TextTokenizer
) -> None:
    folder = make_folder(4)
    folder.file("json", 2).unlink()
    folder.file("pcd", 1).unlink()
    text = shown(folder.root, tokenizer, sample_id=folder.ids[1])
    assert ["train", "4", "3, 1 no model"] in [row[:3] for row in cells(text)]
    assert "points:  none" in text and "text+image" in text


def test_every_damaged_shard_is_named(
    make_folder: MakeFolder, tokenizer: TextTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = shard_folder(make_folder(9).root, tmp_path / "shards")
    (root / "train/00002.arrow").write_bytes((root / "train/00002.arrow").read_bytes()[:-4])
    content = bytearray((root / "train/00000.arrow").read_bytes())
    content[-100] ^= 1
    (root / "train/00000.arrow").write_bytes(content)
    with pytest.raises(SystemExit) as exit_request:
        main(["data", "inspect", str(root)])
    assert exit_request.value.code == 3
    said = capsys.readouterr()
    assert "00000.arrow" in said.out and "00002.arrow" in said.out and "00001.arrow" not in said.out
    assert "2 of the 3 shards" in said.err


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"sample_id": "0000/nothing"}, "try an id such as 0000/00000000_00001"),
        ({"split": "val"}, "no val split"),
    ],
)
def test_what_is_not_there_is_said(
    changes: dict[str, object], complaint: str, make_folder: MakeFolder, tokenizer: TextTokenizer
) -> None:
    folder = make_folder(3)
    with pytest.raises(DataError, match=complaint):
        shown(folder.root, tokenizer, **changes)


def test_a_folder_that_is_not_there_is_named_without_the_flags_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_request:
        main(["data", "inspect", str(tmp_path / "gone")])
    assert exit_request.value.code == 3
    said = capsys.readouterr().err
    assert f"{tmp_path / 'gone'}: there is no folder" in said and "--" not in said
