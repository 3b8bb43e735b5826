"""How fast `cad-mllm prepare` makes models, the memory of a worker, and how long all of Omni-CAD would take.

    python tests/bench/prepare_speed.py --json_root download/json         # files that are there
    python tests/bench/prepare_speed.py --synthetic 20000 --seconds 300   # procedural ones, as many as fit

Prints one JSON object. The models go through the worker of `prepare` itself, in one process with its memory
limit, because CPU seconds per model are what does not depend on how busy the machine is.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cad_mllm.cad import omnicad, synth  # noqa: E402
from cad_mllm.cad.worker import run_limited  # noqa: E402
from cad_mllm.data import survey  # noqa: E402
from cad_mllm.data.build import RowJob, build_row  # noqa: E402
from cad_mllm.data.layout import ModelSettings  # noqa: E402
from cad_mllm.data.prepare_shards import MEMORY_MB  # noqa: E402
from cad_mllm.errors import CadError  # noqa: E402

MODELS = 453_000
CORES = 16


@dataclass(frozen=True)
class Timed:
    """One model's cost in a worker."""

    read: float
    """CPU seconds of the first pass."""
    build: float
    """CPU seconds of the second."""
    bytes: int
    """Of the row."""
    peak_mb: int
    reason: str | None


def timed(job: RowJob) -> Timed:
    """In a worker process."""
    start = time.process_time()
    read = survey._read(survey._Job(0, job.id, job.content, None))
    between = time.process_time()
    if read.digest is None:
        return Timed(between - start, 0, 0, 0, read.reason)
    try:
        built = build_row(job)
    except CadError as error:
        return Timed(between - start, time.process_time() - between, 0, 0, str(error))
    row = built.row
    texts = (row.id, row.caption, row.json, row.command_8 or "", row.command_10 or "")
    size = row.points.nbytes + sum(map(len, row.views)) + sum(len(text.encode()) for text in texts)
    return Timed(between - start, time.process_time() - between, size, built.peak_mb, None)


def measure(contents: Iterator[tuple[str, bytes]], settings: ModelSettings, seconds: float) -> dict[str, Any]:
    """Run models through one worker until they, or the seconds, are used up."""
    started = time.monotonic()
    jobs = (
        RowJob(shard="", id=name, content=content, caption=None, settings=settings)
        for name, content in contents
        if time.monotonic() - started < seconds
    )
    found, failed = [], []
    for _, one in run_limited(timed, jobs, workers=1, seconds=60, memory_mb=MEMORY_MB):
        if isinstance(one, Timed) and one.reason is None:
            found.append(one)
        else:
            failed.append(str(one) if isinstance(one, CadError) else one.reason)
    read = sum(one.read for one in found) / len(found)
    build = sum(one.build for one in found) / len(found)
    size = sum(one.bytes for one in found) / len(found)
    return {
        "models": len(found),
        "failed": failed,
        "views": settings.views,
        "CPU s per model, first pass": round(read, 4),
        "CPU s per model, build": round(build, 4),
        "models per s and core": round(1 / (read + build), 2),
        "peak MB of the worker": max(one.peak_mb for one in found),
        "bytes per model": round(size),
        f"hours for {MODELS:,} on {CORES} cores": round(MODELS * (read + build) / CORES / 3600, 2),
        f"GB for {MODELS:,}": round(MODELS * size / 1e9, 1),
    }


def files(root: Path) -> Iterator[tuple[str, bytes]]:
    """All JSON files below a folder."""
    for path in sorted(root.rglob("*.json")):
        yield path.stem, path.read_bytes()


def procedural(number: int) -> Iterator[tuple[str, bytes]]:
    """Procedural models as JSON files."""
    for seed in range(number):
        yield str(seed), json.dumps(omnicad.to_json(synth.make_program(seed)[0])).encode()


def main() -> None:
    """Measure with and without views."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json_root", type=Path)
    parser.add_argument("--synthetic", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300.0, help="for each of the two measurements")
    arguments = parser.parse_args()
    results = []
    for views in (8, 0):
        models = files(arguments.json_root) if arguments.json_root else procedural(arguments.synthetic)
        results.append(measure(models, ModelSettings(views=views), arguments.seconds))
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
