"""From the archive to shards: what is in them, what is left out, and the same bytes whatever happens."""

import io
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cad_mllm.cad import codec, omnicad, synth, worker
from cad_mllm.cad.normalise import normalise
from cad_mllm.data import build as build_module
from cad_mllm.data.archive import Splits, open_archive
from cad_mllm.data.layout import ModelSettings
from cad_mllm.data.prepare_shards import ShardsReport, prepare_shards, print_shards_report
from cad_mllm.data.quality import Tokenizer
from cad_mllm.data.shards import ShardedSplit, read_manifest, verify
from cad_mllm.data.survey import Part
from cad_mllm.errors import CadError, ConfigError, DataError
from cad_mllm.model.presets import byte_tokenizer

from .conftest import contents

REAL_FILES = Path(__file__).parent / "omnicad"
SETTINGS = ModelSettings(points=64, views=2, size=32)
IDS = tuple(f"000{group}/0000000{number}_00001" for group in (0, 1) for number in (1, 2, 3))
TWIN = "0001/00000009_00001"
"""The same program as the first, in other words."""
BROKEN = {
    "0000/00000004_00001": b'{"entities": ',
    "0000/00000005_00001": b"\xff\xfe",
    "0000/00000006_00001": b"[" * 100_000,
    "0000/00000007_00001": b'{"entities": {}, "sequence": []}',
}


def whole(out: Path) -> dict[str, bytes]:
    """All files that say something."""
    return {name: content for name, content in contents(out).items() if not name.endswith(".lock")}


def model(seed: int, **changes: object) -> bytes:
    return json.dumps(omnicad.to_json(synth.make_program(seed)[0]) | changes).encode()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six models, one twice, four broken; captions for two, and for one that is not there."""
    path = tmp_path_factory.mktemp("download") / "Omni-CAD.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for seed, sample_id in enumerate(IDS):
            file.writestr(f"json/{sample_id}.json", model(seed))
        file.writestr(f"json/{TWIN}.json", model(0, properties={"note": "é"}))
        for sample_id, content in BROKEN.items():
            file.writestr(f"json/{sample_id}.json", content)
        entries = [{"id": i, "text caption": f"part {i}"} for i in (IDS[0], IDS[3], "0008/none")]
        file.writestr("txt/0000.json", json.dumps(entries))
    return path


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in this process: another one takes seconds to load the geometry kernel."""

    def run_here(
        fn: Callable[[Any], Any], items: Iterable[Any], **_limits: float
    ) -> Generator[tuple[int, Any], None, None]:
        for number, item in enumerate(items):
            try:
                yield number, fn(item)
            except CadError as error:
                yield number, error

    monkeypatch.setattr(worker, "run_limited", run_here)


def run(
    path: Path, out: Path, *, splits: Path | None = None, part: str = "0/1", **changes: Any
) -> ShardsReport:
    arguments: dict[str, Any] = {
        "splits": Splits(splits),
        "settings": SETTINGS,
        "rows": 2,
        "part": Part.parse(part),
        "tokenizer": None,
        "workers": 1,
        "seconds": 60,
    }
    return prepare_shards(open_archive(path), out, **(arguments | changes))


@pytest.fixture(scope="module")
def prepared(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With real worker processes."""
    out = tmp_path_factory.mktemp("prepared")
    report = run(archive, out, workers=2)
    assert (report.built, report.shards_made, report.missing) == (6, 3, ())
    assert 100 < report.peak_mb < 600
    return out


def test_each_model_is_a_row_with_all_that_training_needs(prepared: Path, archive: Path) -> None:
    manifest = read_manifest(prepared)
    verify(prepared, manifest)
    assert [shard.rows for shard in manifest.splits["train"]] == [2, 2, 2]
    train = ShardedSplit(prepared, "train")
    assert list(train.ids) == list(IDS)
    for number, sample_id in enumerate(IDS):
        row = train.row(number)
        source = json.loads(zipfile.ZipFile(archive).read(f"json/{sample_id}.json"))
        assert json.loads(row.json) == source
        assert ": " not in row.json, "minified"
        normalised = normalise(omnicad.parse(source))
        assert row.command_8 == codec.encode(normalised.program, bits=8)
        assert row.command_10 == codec.encode(normalised.program, bits=10)
        assert (row.scale, row.center) == (normalised.scale, normalised.center)
        assert row.num_extrudes == len(normalised.program.extrudes)
        assert row.points.shape == (64, 6)
        assert np.linalg.norm(row.points[:, 3:].astype(float), axis=1) == pytest.approx(1, abs=2e-3)
        assert [Image.open(io.BytesIO(view)).size for view in row.views] == [(32, 32)] * 2


def test_a_model_without_a_caption_has_one_that_says_so(prepared: Path) -> None:
    train = ShardedSplit(prepared, "train")
    sources = dict(zip(train.ids, train.column("caption_source"), strict=True))
    assert {key for key, source in sources.items() if source == "given"} == {IDS[0], IDS[3]}
    assert set(sources.values()) == {"given", "template"}
    assert train.row(0).caption == f"part {IDS[0]}"
    assert "extrusion" in train.row(1).caption


def test_every_rejected_model_is_listed_with_its_reason(prepared: Path) -> None:
    lines = [json.loads(line) for line in (prepared / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["id"]: (line["stage"], line["reason"]) for line in lines}
    assert reasons.keys() == {*BROKEN, TWIN}
    assert reasons[TWIN] == ("duplicate", f"the same quantised program as {IDS[0]}")
    assert [reasons[sample_id][1].partition(":")[0] for sample_id in BROKEN] == [
        "is not valid JSON",
        "is not UTF-8 text",
        "is nested too deep for a CAD JSON file",
        "the model builds nothing",
    ]
    assert [line["id"] for line in lines] == sorted(reasons)
    html = (prepared / "report.html").read_text()
    for sample_id in (*reasons, "0008/none"):
        assert sample_id in html
    assert html.count("<img") == 6
    assert "http" not in html, "it fetches nothing"


@pytest.mark.usefixtures("here")
def test_parts_in_any_order_make_the_same_data_set(prepared: Path, archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    second = run(archive, out, part="1/2")
    assert second.missing == ("train/00000.arrow", "train/00002.arrow")
    assert not (out / "dataset.json").exists()
    text = io.StringIO()
    print_shards_report(second, out, Console(file=text, width=120))
    assert "2 shards of other parts are missing, first train/00000.arrow" in text.getvalue()
    first = run(archive, out, part="0/2")
    assert (first.missing, first.shards_made, first.rows) == ((), 2, {"train": 6})
    assert whole(out) == whole(prepared)
    again = run(archive, out, part="1/2")
    assert (again.shards_there, again.built) == (1, 0)
    assert whole(out) == whole(prepared)


@pytest.mark.usefixtures("here")
def test_more_parts_than_shards_do_no_harm(prepared: Path, archive: Path, tmp_path: Path) -> None:
    for number in (4, 3, 0, 1, 2):
        report = run(archive, tmp_path / "out", part=f"{number}/5")
    assert report.missing == ()
    assert whole(tmp_path / "out") == whole(prepared)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "harm",
    [
        lambda out: flip(out / "train" / "00001.arrow"),
        lambda out: os.truncate(out / "train" / "00001.arrow", 700),
        lambda out: (out / "train" / "00001.arrow").unlink(),
        lambda out: flip(out / "prepare" / "train-00001.json"),
        lambda out: os.truncate(out / "prepare" / "train-00001.json", 50),
        lambda out: flip(out / "prepare" / "read-00000.json"),
        lambda out: (out / "dataset.json").unlink(),
    ],
)
def test_what_is_not_whole_is_never_trusted(
    harm: Callable[[Path], None], prepared: Path, archive: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(archive, out)
    harm(out)
    run(archive, out)
    assert whole(out) == whole(prepared)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.usefixtures("here")
def test_a_shard_of_another_part_that_is_damaged_is_named(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(archive, out, part="0/2")
    flip(out / "train" / "00002.arrow")
    with pytest.raises(DataError, match=r"train/00002.arrow was changed or damaged"):
        run(archive, out, part="1/2")
    assert not (out / "dataset.json").exists()
    assert run(archive, out, part="0/2").missing == ()


@pytest.mark.usefixtures("here")
def test_splits_keep_the_same_program_apart(archive: Path, tmp_path: Path) -> None:
    """The twin of a training model is not validated on; a model in no split is left out."""
    splits = tmp_path / "splits.json"
    bases = {"train": ["0000/00000001", "0000/00000002"], "test": ["0001/00000009", "0001/00000001"]}
    splits.write_text(json.dumps(bases))
    report = run(archive, tmp_path / "out", splits=splits)
    assert report.rows == {"train": 2, "val": 1}
    assert report.rejected == {"duplicate": 1, "split": 7}
    assert list(ShardedSplit(tmp_path / "out", "val").ids) == [IDS[3]]


@pytest.mark.usefixtures("here")
def test_other_input_is_not_mixed_in(archive: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(archive, out)
    splits = tmp_path / "splits.json"
    splits.write_text('{"train": []}')
    for changes, named in (
        ({"settings": replace(SETTINGS, points=65)}, "points"),
        ({"rows": 3}, "rows"),
        ({"splits": splits}, "split_file"),
    ):
        with pytest.raises(ConfigError, match=f"begun with another {named}"):
            run(archive, out, **changes)
    with pytest.raises(ConfigError, match="begun with another archive"):
        run(REAL_FILES, out)


@pytest.mark.usefixtures("here")
def test_an_archive_of_which_nothing_can_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "torn.json").write_text("{")
    with pytest.raises(DataError, match=r"none of the models.*rejected.jsonl says why"):
        run(tmp_path, tmp_path / "out")
    assert "torn" in (tmp_path / "out" / "rejected.jsonl").read_text()
    assert not (tmp_path / "out" / "dataset.json").exists()


@pytest.mark.usefixtures("here")
def test_points_alone_need_no_views(archive: Path, tmp_path: Path) -> None:
    run(archive, tmp_path / "out", settings=replace(SETTINGS, views=0))
    assert ShardedSplit(tmp_path / "out", "train").row(0).views == ()
    assert "made without views" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("here")
def test_a_model_that_cannot_be_built_is_left_out_of_its_shard(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build_module.build_model

    def refuse(sample_id: str, *arguments: Any) -> Any:
        if sample_id in (IDS[1], IDS[2], IDS[3]):
            raise CadError("the CAD kernel found no surface to triangulate")
        return real(sample_id, *arguments)

    monkeypatch.setattr(build_module, "build_model", refuse)
    report = run(archive, tmp_path / "out")
    assert report.rejected["build"] == 3
    assert list(ShardedSplit(tmp_path / "out", "train").ids) == [IDS[0], IDS[4], IDS[5]]
    files = [shard.file for shard in read_manifest(tmp_path / "out").splits["train"]]
    assert files == ["train/00000.arrow", "train/00002.arrow"], "an empty shard is no shard"
    assert "no surface to triangulate" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.usefixtures("here")
def test_tokens_are_counted_with_the_tokenizer_that_is_named(archive: Path, tmp_path: Path) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "bytes")
    run(archive, tmp_path / "out", tokenizer=Tokenizer(str(tmp_path / "bytes")))
    html = (tmp_path / "out" / "report.html").read_text()
    notes = re.findall(
        r"<h3>(Tokens|Characters) of the command text, 8 bits.*?</h3><p class=.note.>(.*?)</p>", html
    )
    (_, tokens), (_, characters) = notes
    assert tokens == characters, "a byte is a token"
    with pytest.raises(ConfigError, match="--tokenizer"):
        Tokenizer(str(tmp_path / "none"))


@pytest.mark.parametrize("text", ["1", "1/", "/2", "a/b", "-1/2", "2/2", "0/0", "1/2/3", "¹/²"])
def test_a_part_is_a_number_of_a_number(text: str) -> None:
    with pytest.raises(ConfigError, match="--part"):
        Part.parse(text)


# --- kills and full disks: the command in a process of its own ---------------------------------------------


def command(path: Path, out: Path) -> list[str]:
    call = (
        "import sys; from cad_mllm.cli import main; "
        f"main(['prepare', '--archive', {str(path)!r}, '--out', {str(out)!r}, '--workers', '1', "
        "'--points', '64', '--views', '0', '--rows_per_shard', '2'])"
    )
    return [sys.executable, "-c", call]


def check_kills(path: Path, tmp_path: Path, kills: int) -> None:
    """Kill the command and its workers `kills` times as they run; a folder that gets finished is compared."""
    rng = random.Random(7)
    started = time.monotonic()
    subprocess.run(command(path, tmp_path / "undisturbed"), check=True, capture_output=True)
    undisturbed = time.monotonic() - started
    expected = whole(tmp_path / "undisturbed")
    folder = 0
    while kills:
        out = tmp_path / str(folder)
        process = subprocess.Popen(
            command(path, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        try:
            process.wait(rng.uniform(0.2, 1.0) * undisturbed)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            kills -= process.wait() == -signal.SIGKILL
            continue
        assert process.returncode == 0
        assert whole(out) == expected
        folder += 1
    subprocess.run(command(path, tmp_path / str(folder)), check=True, capture_output=True)
    assert whole(tmp_path / str(folder)) == expected


@pytest.mark.distributed
def test_kills_change_nothing(archive: Path, tmp_path: Path) -> None:
    check_kills(archive, tmp_path, kills=2)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1200)
def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    check_kills(REAL_FILES, tmp_path, kills=20)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    "file", ["prepare/settings.json", "prepare/read-00000.json", "train/00000.arrow", "report.html"]
)
def test_a_full_disk_ends_with_3_and_leaves_nothing_to_trust(
    file: str, prepared: Path, archive: Path, tmp_path: Path
) -> None:
    """The kernel refuses to let a file grow, as it does on a full disk, by the last byte of `file`."""
    out = tmp_path / "out"
    room = (prepared / file).stat().st_size - 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(DataError, match="cannot be written") as refused:
            run(archive, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert refused.value.exit_code == 3
    assert not (out / "dataset.json").exists()
    assert not list(out.rglob("*.part.*"))
    run(archive, out)
    assert whole(out) == whole(prepared)
