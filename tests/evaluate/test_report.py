"""The page of an evaluation: whole without a network, safe against what is in it, working in a browser."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cad_mllm.cli import main
from cad_mllm.evaluate.files import Given
from cad_mllm.evaluate.gallery import choose, draw
from cad_mllm.evaluate.report import log_ticks, robustness_runs
from cad_mllm.evaluate.score import Outcome, Pair, Sample
from cad_mllm.evaluate.summary import METRICS

PLATE = "NZ0,0,127,254,254E60P0,0H254V254H0"
EVIL = '"><script>document.title="evil"</script><img src=x onerror=alert(1)>'


def put(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four ids: a good one, one that is off, one that fails, one without prediction; evil names and texts."""
    root = tmp_path_factory.mktemp("evaluation")
    evil_id = f"a/{EVIL.replace('/', '')}"
    texts = {"a/good": PLATE, "a/off": PLATE.replace("E60", "E200"), evil_id: EVIL}
    for name in (*texts, "a/none"):
        put(root / "true" / f"{name}.txt", PLATE)
    for name, text in texts.items():
        put(root / "pred" / f"{name}.txt", text)
    cloud = np.random.default_rng(0).uniform(-1, 1, (300, 6)).astype(np.float32)
    np.savez(root / "pred/cloud.npz", points=cloud)
    Image.new("RGB", (30, 20), "red").save(root / "pred/photo.png")
    lines: list[dict[str, str]] = [
        {"id": "a/good", "modalities": "text+points+image", "points": "cloud.npz", "image": "photo.png"},
        {"id": "a/off", "modalities": "text", "caption": EVIL},
        {"id": evil_id, "modalities": "text"},
    ]
    put(root / "pred/generated.jsonl", "\n".join(map(json.dumps, lines)))
    mean = {"value": 0.02, "low": 0.01, "high": 0.03}
    put(root / "out/noise-0.02/summary.json", json.dumps({"summary": {"lines": {"chamfer": {"mean": mean}}}}))
    put(root / "out/dropped-0.5/summary.json", "broken")
    folders = [f"--{name}={root / name}" for name in ("pred", "true", "out")]
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", *folders, "--workers=1"])
    assert ended.value.code == 0
    assert {path.name for path in (root / "out").iterdir() if path.is_file()} == {
        "report.html",
        "samples.csv",
        "summary.json",
    }
    return root / "out/report.html"


def text_of(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]*>", " ", page.read_text()))


def test_the_page_fetches_nothing_and_forbids_itself_to(page: Path) -> None:
    content = page.read_text()
    assert not re.search(r"https?:|src=\"(?!data:)|url\(|@import|<link", content)
    assert "default-src 'none'" in content


def test_names_captions_and_programs_are_text_not_markup(page: Path) -> None:
    content = page.read_text()
    assert content.count("<script>") == 1
    assert "onerror=alert(1)>" not in content
    assert EVIL in text_of(page)


def test_what_is_shown_is_what_was_found(page: Path) -> None:
    text = " ".join(text_of(page).split())
    assert "2 of 4 predictions give a solid that can be compared" in text
    assert "50.0 % fail" in text
    assert "no prediction with this id" in text
    assert "dropped-0.5/summary.json: no summary with a distance" in text
    for metric in METRICS:
        assert metric.label in text and metric.definition in text
    assert "CAD-MLLM, all modalities, points given" in text
    assert 'alt="Distance over noise' in page.read_text()


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
in_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium to open the page in: apt-get install chromium"
)

DRIVER = """<script>
const seen = () => cards.filter((card) => !card.hidden).map((card) => card.dataset.id);
const set = (id, value) => {
  const box = document.getElementById(id);
  box.value = value;
  box.dispatchEvent(new Event("change"));
};
const found = { title: document.title, first: gallery.children[0].dataset.outcome, all: seen().length };
set("order", "best"); found.best = gallery.children[0].dataset.id;
set("modality", "text+points+image"); found.filtered = seen(); set("modality", "");
set("outcome", "invalid"); found.invalid = seen().length; set("outcome", "");
set("least", "10"); found.far = seen().length; set("least", "0");
const card = cards.find((card) => card.dataset.id === "a/off");
card.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
found.turned = [...card.querySelectorAll(".turn img")].map((picture) => picture.style.transform);
found.broken = [...document.images].filter((picture) => picture.complete && !picture.naturalWidth).length;
found.pictures = document.images.length;
document.body.innerHTML = ""; document.body.id = "found"; document.body.textContent = JSON.stringify(found);
</script>"""


def chromium(tmp_path: Path, page: Path, *arguments: str) -> str:
    """What a headless browser prints that opens the page."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=5000"]
    command = [CHROMIUM, *flags, f"--user-data-dir={tmp_path / 'profile'}", *arguments, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@in_chromium
def test_order_filters_and_turning_work_in_a_browser(page: Path, tmp_path: Path) -> None:
    driven = put(tmp_path / "driven.html", page.read_text().replace("</body>", DRIVER + "</body>"))
    dom = chromium(tmp_path, driven, "--dump-dom")
    shown = re.search(r'<body id="found">(.*?)</body>', dom, re.DOTALL)
    assert shown, dom[-2000:]
    found = json.loads(html.unescape(shown.group(1)))
    assert found["title"] == "CAD-MLLM evaluation: 2 of 4 predictions"
    assert (found["first"], found["best"]) == ("invalid", "a/good")
    assert found["all"] == 4
    assert found["filtered"] == ["a/good"]
    assert found["invalid"] == 1
    assert found["far"] == 3  # the failures, and the plate of another height
    assert found["turned"] == ["translateX(-25%)"] * 2  # the prediction and the truth together
    assert found["broken"] == 0
    assert found["pictures"] == 2 + 1 + 4 + 2  # plots, one input, true models, predictions


@in_chromium
def test_the_page_is_drawn(page: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    chromium(tmp_path, page, "--window-size=1400,3600", f"--screenshot={picture}")
    with Image.open(picture) as opened:
        drawn = np.asarray(opened.convert("RGB")).astype(int)
    assert drawn.shape == (3600, 1400, 3)
    failed = (np.abs(drawn - [253, 236, 234]) <= 2).all(axis=2)  # the background of a failure
    assert failed.sum() > 20_000
    solid = (np.abs(drawn - drawn.mean(axis=2, keepdims=True)) < 16).all(axis=2) & (drawn.mean(axis=2) < 190)
    assert solid[1800:].sum() > 20_000  # grey bodies in the gallery


# --- what is shown of many ----------------------------------------------------------------------------------


def many() -> list[Sample]:
    values: dict[str, float | None] = {metric.name: 0.0 for metric in METRICS}
    scored = [
        Sample(f"s{i:03d}", Outcome.SCORED, figures={**values, "chamfer": i / 1000}) for i in range(200)
    ]
    failed = [Sample(f"f{i:03d}", Outcome.INVALID, "it leaks") for i in range(50)]
    return [*scored, *failed, Sample("extra", Outcome.EXTRA)]


def test_of_many_samples_failures_the_worst_and_an_even_spread_are_shown() -> None:
    samples = many()
    chosen = choose(samples, {sample.id: "text" for sample in samples}, limit=60)
    names = [sample.id for sample in chosen]
    assert len(names) == len(set(names)) == 60
    assert names[:15] == [f"f{i:03d}" for i in range(15)]
    assert names[15:35] == [f"s{i:03d}" for i in range(199, 179, -1)]
    steps = -np.diff([int(name[1:]) for name in names[35:]])
    assert names[-1] == "s000" and steps.min() >= 6 and steps.max() <= 8


def test_every_modality_is_shown_and_few_samples_all() -> None:
    samples = many()
    modalities = {sample.id: "rare" if sample.id in ("s003", "s004") else "text" for sample in samples}
    chosen = choose(samples, modalities, limit=60)
    assert {"s003", "s004"} <= {sample.id for sample in chosen}
    assert len(choose(samples[:5], modalities)) == 5
    assert choose([], {}) == []


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.4, 6.6, [0.5, 1, 2, 5]),
        (0.3, 450, [1, 10, 100]),
        (1.1, 1.9, [1.1, 1.9]),
        (1e-6, 1e3, [1e-6, 1e-4, 1e-2, 1, 100]),
    ],
)
def test_a_logarithmic_axis_has_few_round_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert log_ticks(low, high) == pytest.approx(ticks)


def test_runs_with_worse_points_are_found_by_the_names_of_their_folders(tmp_path: Path) -> None:
    summary = {"summary": {"lines": {"chamfer": {"mean": {"value": 0.02, "low": 0.01, "high": 0.03}}}}}
    for name in ("noise-0.05", "noise-.01", "dropped-0.95", "noise-2", "noise-x", "other"):
        put(tmp_path / name / "summary.json", json.dumps(summary))
    put(
        tmp_path / "dropped-0.2/summary.json", json.dumps({"summary": {"lines": {"chamfer": {"mean": None}}}})
    )
    put(tmp_path / "noise-0.03", "a file")
    said = [{"noise": 0.0, "dropped": 0.5}]
    put(tmp_path / "dropped-0.5/summary.json", json.dumps({**summary, "worse": said}))
    put(tmp_path / "noise-0.5/summary.json", json.dumps({**summary, "worse": said}))
    runs, unusable = robustness_runs(tmp_path)
    assert [(entry.kind, entry.level) for entry in runs] == [
        ("dropped", 0.5),
        ("dropped", 0.95),
        ("noise", 0.01),
        ("noise", 0.05),
    ]
    assert [line.partition("/")[0] for line in unusable] == ["dropped-0.2", "noise-0.5"]


def test_an_input_that_is_a_bomb_or_broken_is_not_shown_and_costs_nothing_else(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.npz"
    np.savez_compressed(bomb, points=np.ones((10, 6), dtype=np.float32))
    content = bytearray(bomb.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = (2**32 - 2).to_bytes(4, "little")  # unpacked: 4 GB
    bomb.write_bytes(content)
    picture = put(tmp_path / "broken.png", "no picture")
    pair = Pair("a", put(tmp_path / "true.txt", PLATE), None)
    givens = {"a": Given(points=bomb), "b": Given(image=picture), "c": Given(points=tmp_path / "gone.npz")}
    drawn = draw([(replace(pair, id=name), given) for name, given in givens.items()], workers=1, seconds=30)
    for name in givens:
        assert drawn[name].given is None
        assert drawn[name].truth is not None
