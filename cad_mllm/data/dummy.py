"""Procedural models with captions, points and views, in the layout of real data and through the same path."""

import json
from pathlib import Path

from cad_mllm.cad import omnicad, synth
from cad_mllm.data.atomic import make_writable, write_json
from cad_mllm.data.captions import PROCEDURAL, SOURCE_KEY
from cad_mllm.data.layout import CAPTION_KEY, JSON_FOLDER, TEXT_FOLDER
from cad_mllm.data.order import stable_hash
from cad_mllm.data.prepare import prepare
from cad_mllm.errors import ConfigError, DataError

POINTS = 4096

_MARKER = "dummy_data.json"
_MODELS_PER_GROUP = 1000


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
    time).

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
    marker = root / _MARKER
    if _claimed(root, marker, wanted):
        return
    write_json(marker, {**wanted, "complete": False})
    captions: dict[str, list[dict[str, str]]] = {}
    for number in range(num_samples):
        sample_id = f"{number // _MODELS_PER_GROUP:04d}/{number:08d}_00001"
        program, caption = synth.make_program(stable_hash("dummy", seed, number) % 2**32, complexity)
        write_json(root / JSON_FOLDER / f"{sample_id}.json", omnicad.to_json(program))
        entry = {"id": sample_id, CAPTION_KEY: caption, SOURCE_KEY: PROCEDURAL}
        captions.setdefault(sample_id.partition("/")[0], []).append(entry)
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
    )
    if report.skipped:
        first = report.skipped[0]
        raise DataError(f"{len(report.skipped)} procedural models failed, first {first.id}: {first.reason}")
    write_json(marker, {**wanted, "complete": True})


def _claimed(root: Path, marker: Path, wanted: dict[str, int | str]) -> bool:
    """Whether the folder is complete; ConfigError if it holds something else."""
    make_writable(root, "the folder for dummy data,")
    if all(path.name.startswith(".") for path in root.iterdir()):  # or begun and killed at once
        return False
    try:
        found = json.loads(marker.read_bytes())
        complete = found.pop("complete")
    except (OSError, ValueError, KeyError, AttributeError):
        found = None
    if found != wanted:
        raise ConfigError(
            f"{root} holds other data than {wanted['num_samples']} dummy samples of seed {wanted['seed']}: "
            "choose another folder, or remove this one"
        )
    return bool(complete)
