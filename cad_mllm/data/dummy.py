"""Procedural models with captions, points and views, in the layout of real data and through the same path."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from cad_mllm.cad import omnicad, synth
from cad_mllm.cad.surface import Kernel, installed_kernel
from cad_mllm.cad.worker import run_limited
from cad_mllm.data.atomic import make_writable, write_json
from cad_mllm.data.captions import PROCEDURAL, SOURCE_KEY
from cad_mllm.data.layout import CAPTION_KEY, JSON_FOLDER, TEXT_FOLDER
from cad_mllm.data.order import stable_hash
from cad_mllm.data.prepare import prepare
from cad_mllm.data.progress import SlowProgress
from cad_mllm.errors import CadError, ConfigError, DataError

POINTS = 4096

_MARKER = "dummy_data.json"
_MODELS_PER_GROUP = 1000
_WITHOUT_CAPTION = 4
"""The last of so many varied models has no caption of its own, and so gets a template's, as real models do
that nobody described: what is trained on varied parts alone shall not be lost on those."""
_MODELS_PER_JOB = 250
_SECONDS_PER_JOB = 600.0
"""Hundreds of times what it takes."""


@dataclass(frozen=True)
class _Job:
    """Models to write, by their numbers."""

    root: Path
    numbers: range
    seed: int
    complexity: synth.Complexity


def write_dummy_data(
    root: Path,
    num_samples: int,
    seed: int,
    workers: int,
    *,
    complexity: synth.Complexity = synth.Complexity.SIMPLE,
    points: int = POINTS,
    views: int = 8,
    size: int = 224,
) -> None:
    """Write `num_samples` models below `root`, the same ones for the same seed, with `workers` processes.

    Each has a cloud of `points` and `views` pictures of `size` pixels square (drawing them takes most of the
    time). Where OpenCASCADE is not installed, points and pictures are those of polygon models, and a line on
    stderr says so.

    A folder that this wrote completely with the same arguments is left alone, one that was interrupted is
    completed. Raises ConfigError for a folder with other contents.
    """
    wanted: dict[str, int | str] = {
        "num_samples": num_samples,
        "seed": seed,
        "complexity": complexity.value,
        "points": points,
        "views": views,
        "size": size,
    }
    kernel = installed_kernel()
    marker = root / _MARKER
    if _claimed(root, marker, wanted, kernel):
        return
    if kernel is Kernel.POLYGONS:
        print("OpenCASCADE is not installed: points and views are made of polygon models", file=sys.stderr)
    write_json(marker, {**wanted, "kernel": kernel.value, "complete": False})
    captions: dict[str, list[dict[str, str]]] = {}
    for entry in _write_programs(root, num_samples, seed, complexity, workers):
        captions.setdefault(entry["id"].partition("/")[0], []).append(entry)
    for group, entries in captions.items():
        write_json(root / TEXT_FOLDER / f"{group}.json", entries)
    report = prepare(
        root / JSON_FOLDER,
        root,
        txt_root=root / TEXT_FOLDER,
        workers=workers,
        points=points,
        views=views,
        size=size,
        kernel=kernel,
    )
    if report.skipped:
        first = report.skipped[0]
        raise DataError(f"{len(report.skipped)} procedural models failed, first {first.id}: {first.reason}")
    write_json(marker, {**wanted, "kernel": kernel.value, "complete": True})


def _write_programs(
    root: Path, num_samples: int, seed: int, complexity: synth.Complexity, workers: int
) -> list[dict[str, str]]:
    """Write all programs; their caption entries, in order."""
    jobs = [
        _Job(root, range(first, min(first + _MODELS_PER_JOB, num_samples)), seed, complexity)
        for first in range(0, num_samples, _MODELS_PER_JOB)
    ]
    if len(jobs) == 1:  # sooner done than a process is started
        return _write_some(jobs[0])
    written: dict[int, list[dict[str, str]]] = {}
    with SlowProgress("Composing models", num_samples) as progress:
        for number, entries in run_limited(_write_some, jobs, workers=workers, seconds=_SECONDS_PER_JOB):
            if isinstance(entries, CadError):
                raise DataError(f"procedural models {jobs[number].numbers} failed: {entries}")
            progress.advance(len(entries))
            written[number] = entries
    return [entry for _, entries in sorted(written.items()) for entry in entries]


def _write_some(job: _Job) -> list[dict[str, str]]:
    entries = []
    for number in job.numbers:
        sample_id = f"{number // _MODELS_PER_GROUP:04d}/{number:08d}_00001"
        program, caption = synth.make_program(stable_hash("dummy", job.seed, number) % 2**32, job.complexity)
        write_json(job.root / JSON_FOLDER / f"{sample_id}.json", omnicad.to_json(program))
        if job.complexity is not synth.Complexity.VARIED or (number + 1) % _WITHOUT_CAPTION:
            entries.append({"id": sample_id, CAPTION_KEY: caption, SOURCE_KEY: PROCEDURAL})
    return entries


def _claimed(root: Path, marker: Path, wanted: dict[str, int | str], kernel: Kernel) -> bool:
    """Whether the folder is complete; ConfigError if it holds something else."""
    make_writable(root, "the folder for dummy data,")
    if all(path.name.startswith(".") for path in root.iterdir()):  # or begun and killed at once
        return False
    try:
        found = json.loads(marker.read_bytes())
        complete, begun_with = found.pop("complete"), found.pop("kernel")
    except (OSError, ValueError, KeyError, AttributeError):
        found = None
    if found != wanted:
        raise ConfigError(
            f"{root} holds other data than {wanted['num_samples']} dummy samples of seed {wanted['seed']}: "
            "choose another folder, or remove this one"
        )
    if not complete and begun_with != kernel.value:
        raise ConfigError(
            f"{root} was begun with {begun_with}, and here is {kernel.value}: its clouds would be of two "
            "kinds; remove the folder, or complete it where it was begun"
        )
    return bool(complete)
