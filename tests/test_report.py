"""The report: complete in itself, honest about failures, safe against what captions and programs hold."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from cad_mllm.errors import DataError
from cad_mllm.report import ReportSample, plot_loss, read_metrics, write_report


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    records: list[dict[str, object]] = [
        {"step": step, "stage": 1 + (step - 1) // 4, "loss": 3.0 / step, "lr/lm": 1e-3}
        for step in range(1, 13)
    ]
    records.insert(4, {"step": 4, "stage": 1, "val_loss": {"text": 1.0}})
    records.append({"step": 12, "stage": 3, "val_loss": {"text": 0.9, "text+points": 0.8}})
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def picture(path: Path, colour: str) -> Path:
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def sample(tmp_path: Path, **changes: object) -> ReportSample:
    values: dict[str, object] = {
        "id": "0000/00000001_00001",
        "caption": "A plate",
        "modalities": "text+points",
        "input_view": picture(tmp_path / "input.png", "red"),
        "truth_view": picture(tmp_path / "truth.png", "green"),
        "prediction_view": picture(tmp_path / "prediction.png", "blue"),
        "prediction_text": "S1,2;",
        "error": None,
        "step": tmp_path / "out" / "step" / "a.step",
    }
    return ReportSample(**{**values, **changes})  # type: ignore[arg-type]


def failed(tmp_path: Path, error: str = "the profile is not closed") -> ReportSample:
    return sample(tmp_path, prediction_view=None, step=None, error=error)


class Page(HTMLParser):
    """Tags with their attributes, and the text of the page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def pictures(self) -> dict[str, bytes]:
        """Alternative text -> file content of each picture."""
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                uri, alt = attributes["src"], attributes["alt"]
                assert uri is not None and alt is not None
                assert uri.startswith("data:image/png;base64,")
                found[alt] = base64.b64decode(uri.split(",", 1)[1], validate=True)
        return found


def test_the_page_fetches_nothing(tmp_path: Path, metrics: Path) -> None:
    path = write_report(tmp_path / "out", [sample(tmp_path), failed(tmp_path)], metrics, {"steps": 12})
    html = path.read_text()
    assert not re.search(r"https?:|//cdn|url\(|@import|<script|<link", html)
    links = [attributes["href"] for tag, attributes in Page(path).tags if tag == "a"]
    assert links == ["step/a.step"]


def test_each_picture_stands_in_its_own_column(tmp_path: Path, metrics: Path) -> None:
    shown = sample(tmp_path)
    pictures = Page(write_report(tmp_path / "out", [shown], metrics, {})).pictures()
    assert pictures["Input of 0000/00000001_00001"] == (tmp_path / "input.png").read_bytes()
    assert pictures["Generated solid for 0000/00000001_00001"] == (tmp_path / "prediction.png").read_bytes()
    assert pictures["True model of 0000/00000001_00001"] == (tmp_path / "truth.png").read_bytes()


def test_a_failure_shows_its_reason_and_no_generated_picture(tmp_path: Path, metrics: Path) -> None:
    page = Page(write_report(tmp_path / "out", [failed(tmp_path, "it leaks at edge 3")], metrics, {}))
    assert "it leaks at edge 3" in page.text
    assert "No solid" in page.text
    assert not any(alt.startswith("Generated") for alt in page.pictures())
    assert any("failed" in (attributes.get("class") or "") for _, attributes in page.tags)


def test_the_headline_counts_the_solids(tmp_path: Path, metrics: Path) -> None:
    samples = [sample(tmp_path), failed(tmp_path), sample(tmp_path)]
    text = " ".join(Page(write_report(tmp_path / "out", samples, metrics, {"ranks": 2})).text.split())
    assert "2 of 3 held-out inputs gave a solid" in text
    assert "ranks 2" in text


def test_captions_and_programs_are_text_not_markup(tmp_path: Path, metrics: Path) -> None:
    evil = "<script>alert(1)</script><img src=x>"
    samples = [sample(tmp_path, caption=evil, prediction_text=evil), failed(tmp_path, evil)]
    page = Page(write_report(tmp_path / "out", samples, metrics, {evil: evil}))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(evil) == 5
    page.pictures()


def test_an_input_of_text_alone_says_so(tmp_path: Path, metrics: Path) -> None:
    page = Page(write_report(tmp_path / "out", [sample(tmp_path, input_view=None)], metrics, {}))
    assert "the caption alone" in page.text


@pytest.mark.parametrize("change", [{"error": "x"}, {"prediction_view": None}])
def test_a_sample_has_either_a_solid_or_a_reason(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(AssertionError):
        sample(tmp_path, **change)


def test_metrics_are_read_back(metrics: Path) -> None:
    read = read_metrics(metrics)
    assert read.steps == list(range(1, 13))
    assert read.losses == [3.0 / step for step in range(1, 13)]
    assert read.stages == [1] * 4 + [2] * 4 + [3] * 4
    assert read.validation == {"text": [(4, 1.0), (12, 0.9)], "text+points": [(12, 0.8)]}


def test_the_loss_picture_is_drawn(tmp_path: Path, metrics: Path) -> None:
    plot_loss(metrics, tmp_path / "new" / "loss.png")
    with Image.open(tmp_path / "new" / "loss.png") as drawn:
        assert drawn.width > 1000
        assert len(drawn.convert("RGB").getcolors(1 << 20) or []) > 50


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "holds no training step"),
        ('{"step": 1, "stage": 1, "val_loss": {"text": 1}}\n', "holds no training step"),
        ('{"step": 1, "loss": 2}\n', "not a metrics file"),
        ("nonsense\n", "not a metrics file"),
        ("[1]\n[]\n", "not a metrics file"),
    ],
)
def test_metrics_that_are_none_are_refused(content: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match=expected):
        read_metrics(path)


def test_missing_metrics_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: cannot read"):
        read_metrics(tmp_path / "gone.jsonl")
