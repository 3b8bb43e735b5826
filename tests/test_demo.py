"""The demo: its pictures of the inputs, and (slow) the whole of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cad_mllm.demo import HeldOut, draw_input, run_demo


def held_out(*, points: bool, image: Path | None) -> HeldOut:
    corners_N3 = np.array([(x, y, z) for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=np.float32)
    points_NC = np.concatenate([corners_N3, corners_N3 / np.sqrt(3)], axis=1).astype(np.float32)
    return HeldOut(
        id="0000/00000001_00001",
        caption="A cube",
        modalities="any",
        points_NC=points_NC if points else None,
        image=image,
    )


def test_the_picture_of_an_input_shows_all_that_was_given_besides_the_caption(tmp_path: Path) -> None:
    view = tmp_path / "view.png"
    Image.new("RGB", (224, 224), "red").save(view)
    assert draw_input(held_out(points=False, image=None), tmp_path / "none.png") is None
    widths = {}
    for name, sample in {
        "points": held_out(points=True, image=None),
        "image": held_out(points=False, image=view),
        "both": held_out(points=True, image=view),
    }.items():
        path = draw_input(sample, tmp_path / "inputs" / f"{name}.png")
        assert path is not None
        with Image.open(path) as picture:
            widths[name] = picture.width
    assert widths["both"] == widths["points"] + widths["image"]


def test_all_points_of_a_cloud_are_in_the_picture(tmp_path: Path) -> None:
    path = draw_input(held_out(points=True, image=None), tmp_path / "points.png")
    assert path is not None
    with Image.open(path) as picture:
        ink = np.argwhere(np.asarray(picture.convert("L")) < 250)
    corners = {tuple(np.round(pixel / 8).astype(int)) for pixel in ink}
    assert len(ink) == 8 * 4  # each point is a dot of 2 x 2 pixels
    assert len(corners) >= 8
    assert ink.min() > 0 and ink.max() < picture.width - 1


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_demo_leaves_what_it_promises(tmp_path: Path) -> None:
    report = run_demo(tmp_path / "demo", Console())
    assert report.name == "report.html"
    assert (tmp_path / "demo" / "loss.png").is_file()
    samples = sorted((tmp_path / "demo" / "generated").glob("*.txt"))
    solids = sorted((tmp_path / "demo" / "generated").glob("*.step"))
    assert len(samples) == 8
    assert len(solids) >= len(samples) / 2
    html = report.read_text(encoding="utf-8")
    assert f"<b>{len(solids)} of 8</b>" in html
    assert html.count("No solid") == 8 - len(solids)
