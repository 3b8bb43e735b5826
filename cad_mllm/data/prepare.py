"""From a folder of Omni-CAD JSON to a data set: points with normals, views, captions.

Every file is written to a temporary name and renamed, and follows from its model alone: whatever the number
of workers, and wherever an earlier run was killed, the same files come out.
"""

import json
import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cad_mllm.cad import omnicad
from cad_mllm.cad.normalise import Normalised, normalise
from cad_mllm.cad.surface import Kernel
from cad_mllm.cad.worker import run_limited
from cad_mllm.data.atomic import atomic_path, make_writable, write_json
from cad_mllm.data.captions import SOURCE_KEY, TEMPLATE, template_caption
from cad_mllm.data.files import load_points
from cad_mllm.data.layout import (
    CAPTION_KEY,
    IMAGE_FOLDER,
    JSON_FOLDER,
    POINT_FOLDERS,
    TEXT_FOLDER,
    ModelSettings,
    id_fault,
    view_path,
    walk_files,
)
from cad_mllm.data.progress import SlowProgress
from cad_mllm.errors import CadError, ConfigError, DataError

REPORT_FILE = "prepare_report.json"

_SETTINGS_FILE = "prepare_settings.json"


@dataclass(frozen=True)
class Failed:
    """A model that was left out."""

    id: str
    reason: str
    seconds: float | None
    """Spent on it; None where the process was ended."""


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What a run of `prepare` did."""

    made: int
    already_there: int
    skipped: tuple[Failed, ...]
    """Sorted by id."""
    seconds: float


@dataclass(frozen=True)
class _Job:
    id: str
    json_root: Path
    out: Path
    settings: ModelSettings
    kernel: Kernel
    captioned: bool
    """Whether a template caption is wanted."""
    in_place: bool
    """Whether the JSON is in the data set already."""


@dataclass(frozen=True)
class _Done:
    made: bool
    caption: str | None


def prepare(
    json_root: Path,
    out: Path,
    *,
    txt_root: Path | None = None,
    workers: int,
    seconds: float = 60.0,
    points: int = 10_000,
    views: int = 8,
    size: int = 224,
    kernel: Kernel = Kernel.OPENCASCADE,
) -> PrepareReport:
    """Make `out/{json,txt,pcd,img}` from the models below `json_root`, each within `seconds`.

    Models whose files are complete are not made again. Captions are those of `txt_root`; models without one
    get one made from the program, marked `"caption_source": "template"`. Models that fail are left out and
    stand in the report (also written to `out/prepare_report.json`).
    Raises DataError if there are no models or the captions cannot be read, ConfigError if `out` was begun
    with other settings.
    """
    started = time.monotonic()
    settings = ModelSettings(points=points, views=views, size=size)
    ids = _model_ids(json_root)
    captions = {} if txt_root is None else _read_caption_files(txt_root)
    described = {entry["id"] for entries in captions.values() for entry in entries}
    _claim(out, settings)
    in_place = _same_folder(json_root, out / JSON_FOLDER)
    jobs = [
        _Job(sample_id, json_root, out, settings, kernel, sample_id not in described, in_place)
        for sample_id in ids
    ]
    done: dict[str, _Done] = {}
    failed: list[Failed] = []
    with SlowProgress("Preparing models", len(jobs)) as progress:
        for number, outcome in run_limited(_prepare_one, jobs, workers=workers, seconds=seconds):
            progress.advance()
            if isinstance(outcome, CadError):
                failed.append(Failed(ids[number], str(outcome), None))
            elif isinstance(outcome, Failed):
                failed.append(outcome)
            else:
                done[ids[number]] = outcome
    templates = {sample_id: one.caption for sample_id, one in sorted(done.items()) if one.caption}
    extended = _add_templates(captions, templates)
    if txt_root is not None and _same_folder(txt_root, out / TEXT_FOLDER):
        for name in extended:
            write_json(out / TEXT_FOLDER / name, captions[name])
    else:
        _write_caption_files(out / TEXT_FOLDER, captions, done.keys())
    report = PrepareReport(
        made=sum(one.made for one in done.values()),
        already_there=sum(not one.made for one in done.values()),
        skipped=tuple(sorted(failed, key=lambda one: one.id)),
        seconds=time.monotonic() - started,
    )
    write_json(out / REPORT_FILE, asdict(report))
    return report


def print_report(report: PrepareReport, console: Console) -> None:
    """The report as a table: counts, then each model that was left out and why."""
    table = Table(title=f"{report.seconds:.0f} s")
    table.add_column("models")
    table.add_column("", justify="right")
    for name, count in (
        ("made", report.made),
        ("already there", report.already_there),
        ("skipped", len(report.skipped)),
    ):
        table.add_row(name, str(count))
    console.print(table)
    if report.skipped:
        reasons = Table("skipped", "reason", "seconds")
        for one in report.skipped:
            seconds = "" if one.seconds is None else f"{one.seconds:.1f}"
            reasons.add_row(Text(one.id), Text(one.reason), seconds)  # as text: brackets are no markup
        console.print(reasons)


def _model_ids(json_root: Path) -> list[str]:
    if not json_root.is_dir():
        raise DataError(f"--json_root {json_root} is not a folder")
    ids = [name.removesuffix(".json") for name, _ in walk_files(json_root) if name.endswith(".json")]
    if not ids:
        raise DataError(f"--json_root {json_root} holds no .json file")
    return ids


def _claim(out: Path, settings: ModelSettings) -> None:
    """Write the settings down, so that no later run mixes files of another kind into the folder."""
    make_writable(out, "--out")
    path = out / _SETTINGS_FILE
    if path.is_file():
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = None
        if found != asdict(settings):
            raise ConfigError(
                f"{out} was begun with other settings ({path}): choose another --out, or remove the folder"
            )
        return
    write_json(path, asdict(settings))


def _prepare_one(job: _Job) -> _Done | Failed:
    """In a worker process: one model's files."""
    started = time.monotonic()
    try:
        fault = id_fault(job.id)
        if fault is not None:
            raise CadError(fault)
        source = job.json_root / f"{job.id}.json"
        normalised = normalise(omnicad.read(source))
        json_path, *_ = outputs = _outputs(job)
        complete = all(path.is_file() for path in outputs) and (
            job.in_place or json_path.read_bytes() == source.read_bytes()
        )
        if not complete:
            _make(job, source, normalised)
        caption = None
        if job.captioned:
            caption = template_caption(normalised.program, load_points(_points_path(job)))
        return _Done(made=not complete, caption=caption)
    except (CadError, OSError) as error:
        return Failed(job.id, str(error), time.monotonic() - started)


def _points_path(job: _Job) -> Path:
    return job.out / POINT_FOLDERS[0] / f"{job.id}.npz"


def _outputs(job: _Job) -> list[Path]:
    views = [view_path(job.out / IMAGE_FOLDER, job.id, view) for view in range(job.settings.views)]
    return [job.out / JSON_FOLDER / f"{job.id}.json", _points_path(job), *views]


def _make(job: _Job, source: Path, normalised: Normalised) -> None:
    # What builds and draws is needed only where models are built: training on ready data does without.
    from cad_mllm.data.build import build_model, warm_up

    warm_up(job.kernel)
    json_path, points_path, *view_paths = _outputs(job)
    points_NC, images = build_model(job.id, normalised, job.settings, job.kernel)
    for path in (json_path, points_path, *view_paths):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(points_path) as temporary:
        np.savez(
            temporary,
            points=points_NC,
            scale=np.float64(normalised.scale),
            center=np.asarray(normalised.center, dtype=np.float64),
        )
    for path, image in zip(view_paths, images, strict=True):
        with atomic_path(path) as temporary:
            image.save(temporary)
    if not job.in_place:
        with atomic_path(json_path) as temporary:
            temporary.write_bytes(source.read_bytes())


CaptionFiles = dict[str, list[dict[str, Any]]]
"""File name below txt/ -> entries."""


def _read_caption_files(root: Path) -> CaptionFiles:
    if not root.is_dir():
        raise DataError(f"--txt_root {root} is not a folder")
    files: CaptionFiles = {}
    for name, _ in walk_files(root):
        if not name.endswith(".json"):
            continue
        try:
            entries = json.loads((root / name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"captions {root / name} cannot be read: {error}") from error
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("id"), str) for entry in entries
        ):
            raise DataError(f'captions {root / name} must be a list of {{"id": ..., "{CAPTION_KEY}": ...}}')
        files[name] = entries
    if not files:
        raise DataError(f"--txt_root {root} holds no .json file")
    return files


def _add_templates(files: CaptionFiles, captions: Mapping[str, str]) -> set[str]:
    """Put template captions into the files of their models' groups; the names of these files."""
    extended = set()
    for sample_id, caption in captions.items():
        name = f"{sample_id.rpartition('/')[0].replace('/', '-') or 'captions'}.json"
        files.setdefault(name, []).append({"id": sample_id, CAPTION_KEY: caption, SOURCE_KEY: TEMPLATE})
        extended.add(name)
    return extended


def _write_caption_files(folder: Path, files: CaptionFiles, made: Collection[str]) -> None:
    """Only the captions of models that are there: training counts one without a model as a fault."""
    for name, entries in files.items():
        write_json(folder / name, [entry for entry in entries if entry["id"] in made])


def _same_folder(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
