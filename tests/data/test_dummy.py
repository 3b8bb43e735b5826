"""Procedural data: in the layout of real data, the same for the same seed, never mixed."""

import json
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest

from cad_mllm.cad.surface import Kernel
from cad_mllm.cad.synth import Complexity
from cad_mllm.data import dummy
from cad_mllm.data.files import load_image, load_points
from cad_mllm.data.index import build_index, load_index
from cad_mllm.data.layout import Source
from cad_mllm.data.sequence import TextTokenizer
from cad_mllm.data.stores import LooseFiles
from cad_mllm.errors import ConfigError

from .conftest import SPEC, contents

write_dummy_data = partial(dummy.write_dummy_data, points=64, views=2, size=32)


@pytest.mark.usefixtures("no_worker_processes")
def test_dummy_data_are_usable_data(tmp_path: Path, tokenizer: TextTokenizer) -> None:
    root = tmp_path / "dummy"
    write_dummy_data(root, 5, seed=1, workers=1)
    report = build_index(
        LooseFiles(Source.from_folder(root)),
        "train",
        tokenizer,
        SPEC,
        needs=frozenset({"points", "image"}),
        target_format="command",
        bits=8,
        max_skipped_fraction=0.0,
        output_dir=tmp_path / "out",
        workers=0,
    )
    assert (report.num_usable, report.num_too_long) == (5, 0)
    index = load_index(report.path)
    assert len({index.record(number).target for number in range(5)}) == 5
    assert load_points(root / "pcd" / f"{index.ids[0]}.npz").shape == (64, 6)
    assert load_image(root / "img" / f"{index.ids[0]}_001.png").size == (32, 32)


@pytest.mark.usefixtures("no_worker_processes")
def test_the_same_seed_gives_the_same_files_and_is_not_done_twice(tmp_path: Path) -> None:
    write_dummy_data(tmp_path / "a", 3, seed=1, workers=1)
    write_dummy_data(tmp_path / "b", 3, seed=1, workers=2)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")}
    write_dummy_data(tmp_path / "a", 3, seed=1, workers=1)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "a").rglob("*")} == times


@pytest.mark.usefixtures("no_worker_processes")
def test_some_varied_parts_have_the_caption_of_a_model_that_nobody_described(tmp_path: Path) -> None:
    write_dummy_data(tmp_path, 9, seed=1, workers=1, complexity=Complexity.VARIED)
    entries = json.loads((tmp_path / "txt/0000.json").read_text())
    assert len({entry["id"] for entry in entries}) == len(entries) == 9
    assert Counter(entry["caption_source"] for entry in entries) == {"procedural": 7, "template": 2}


@pytest.mark.usefixtures("no_worker_processes")
def test_an_interrupted_run_is_completed(tmp_path: Path) -> None:
    root = tmp_path / "dummy"
    write_dummy_data(root, 3, seed=1, workers=1)
    whole = contents(root)
    marker = root / "dummy_data.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "complete": False}))
    next(root.glob("pcd/*/*.npz")).unlink()
    next(root.glob("json/*/*.json")).unlink()
    write_dummy_data(root, 3, seed=1, workers=1)
    assert contents(root) == whole


@pytest.mark.usefixtures("no_worker_processes")
def test_a_run_that_was_killed_while_it_began_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / ".dummy_data.part.json").write_text('{"num')
    write_dummy_data(tmp_path, 1, seed=1, workers=1)
    assert not list(tmp_path.glob(".*"))


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: cannot be written"):
        write_dummy_data(tmp_path / "file", 1, seed=1, workers=1)


@pytest.mark.parametrize("change", [{"num_samples": 4}, {"seed": 2}])
def test_other_data_are_not_mixed_in(change: dict[str, int], tmp_path: Path) -> None:
    root = tmp_path / "dummy"
    root.mkdir()
    marker = {"num_samples": 3, "seed": 1, "complexity": "simple", "points": 64, "views": 2, "size": 32}
    marker |= {"kernel": "opencascade", "complete": True}
    (root / "dummy_data.json").write_text(json.dumps(marker))
    write_dummy_data(root, 3, seed=1, workers=1)
    with pytest.raises(ConfigError, match=str(root)):
        write_dummy_data(root, **({"num_samples": 3, "seed": 1, "workers": 1} | change))


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="other data"):
        write_dummy_data(tmp_path, 3, seed=1, workers=1)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_without_opencascade_the_data_are_made_of_polygon_models(tmp_path: Path) -> None:
    """In a process where its import fails; the workers' function runs there too."""
    script = """
import sys
sys.modules["OCP"] = None
from pathlib import Path
from cad_mllm.cad.synth import Complexity
from cad_mllm.data import dummy, prepare
prepare.run_limited = lambda fn, jobs, **_: ((number, fn(job)) for number, job in enumerate(jobs))
dummy.write_dummy_data(Path(sys.argv[1]), 4, 1, 1, complexity=Complexity.REAL, points=64, views=2, size=32)
"""
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "OpenCASCADE is not installed: points and views are made of polygon models\n"
    clouds = sorted(tmp_path.glob("pcd/*/*.npz"))
    assert len(clouds) == 4 and len(list(tmp_path.glob("img/*/*.png"))) == 8
    assert all(load_points(cloud).shape == (64, 6) for cloud in clouds)
    assert json.loads((tmp_path / "dummy_data.json").read_text())["kernel"] == "polygons"


def test_what_was_begun_with_another_kernel_is_not_completed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "dummy"
    root.mkdir()
    marker: dict[str, object] = {"num_samples": 3, "seed": 1, "complexity": "simple", "points": 64}
    marker |= {"views": 2, "size": 32, "kernel": "opencascade", "complete": False}
    (root / "dummy_data.json").write_text(json.dumps(marker))
    monkeypatch.setattr(dummy, "installed_kernel", lambda: Kernel.POLYGONS)
    with pytest.raises(ConfigError, match="begun with opencascade"):
        write_dummy_data(root, 3, seed=1, workers=1)
    (root / "dummy_data.json").write_text(json.dumps({**marker, "complete": True}))
    write_dummy_data(root, 3, seed=1, workers=1)


@pytest.mark.usefixtures("no_worker_processes")
def test_many_models_are_composed_in_jobs_and_come_out_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dummy_data(tmp_path / "at once", 5, seed=1, workers=1)
    monkeypatch.setattr(dummy, "_MODELS_PER_JOB", 2)
    monkeypatch.setattr(dummy, "run_limited", lambda fn, jobs, **_: [(n, fn(jobs[n])) for n in (2, 0, 1)])
    write_dummy_data(tmp_path / "in jobs", 5, seed=1, workers=1)
    assert contents(tmp_path / "in jobs") == contents(tmp_path / "at once")
