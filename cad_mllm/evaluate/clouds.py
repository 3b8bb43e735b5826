"""The clouds of a data set, loose or sharded, read in worker processes. Free of torch: workers start fast.

Suffixes: M models, P points, 3 xyz.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cad_mllm.cad.worker import run_limited
from cad_mllm.data.clouds import normalise_points
from cad_mllm.data.layout import JSON_FOLDER, Source, Split, walk_files
from cad_mllm.data.order import draw_points
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.shards import ShardedSplit, held_out, is_sharded
from cad_mllm.data.stores import LooseFiles, Shards, Store
from cad_mllm.errors import CadError, DataError

_AT_ONCE = 256
_SECONDS = 300.0
"""For so many models: hundreds of times what it takes."""


@dataclass(frozen=True)
class Models:
    """The models of one data set."""

    store: LooseFiles | Shards
    ids: Sequence[str]

    @classmethod
    def find(cls, root: Path, split: Split) -> "Models":
        """All models of a folder in the Omni-CAD layout, or of a split of a sharded one (see `held_out`).

        Raises DataError if there are none.
        """
        if is_sharded(root):
            shards = held_out(root) if split == "val" else ShardedSplit(root, split)
            found = cls(Shards(shards), list(shards.ids))
        elif (root / JSON_FOLDER).is_dir():
            names = [name for name, _ in walk_files(root / JSON_FOLDER)]
            ids = [name.removesuffix(".json") for name in names if name.endswith(".json")]
            found = cls(LooseFiles(Source.from_folder(root)), ids)
        else:
            raise DataError(f"{root} is no data set: it has neither {JSON_FOLDER}/ nor dataset.json")
        if not found.ids:
            raise DataError(f"{root} holds no models")
        return found

    def json(self, number: int) -> bytes:
        """The CAD JSON of a model."""
        if isinstance(self.store, Shards):
            return str(self.store.split.value(number, "json")).encode()
        return self.store.source.json_file(self.ids[number]).read_bytes()

    def clouds(self, num_points: int, *, workers: int) -> NDArray[np.float32]:
        """(M, P, 3): `num_points` of each model, normalised. Raises DataError if a cloud cannot be read."""
        starts = range(0, len(self.ids), _AT_ONCE)
        jobs = [_Job(self.store, first, self.ids[first : first + _AT_ONCE], num_points) for first in starts]
        clouds_MP3 = np.empty((len(self.ids), num_points, 3), dtype=np.float32)
        with SlowProgress("reading clouds", len(self.ids)) as progress:
            for number, outcome in run_limited(
                _read, jobs, workers=min(workers, len(jobs)), seconds=_SECONDS
            ):
                if isinstance(outcome, CadError):
                    raise DataError(f"the clouds of {jobs[number].ids[0]} and its followers: {outcome}")
                progress.advance(len(outcome))
                clouds_MP3[jobs[number].first : jobs[number].first + len(outcome)] = outcome
        return clouds_MP3


@dataclass(frozen=True)
class _Job:
    store: Store
    first: int
    ids: Sequence[str]
    num_points: int


def _read(job: _Job) -> NDArray[np.float32]:
    clouds = []
    for number, sample_id in enumerate(job.ids, start=job.first):
        try:
            points_NC = job.store.points(sample_id, number)
        except DataError as error:
            raise CadError(str(error)) from error
        rows_P = draw_points(0, 0, 0, sample_id, len(points_NC), job.num_points)
        clouds.append(normalise_points(points_NC, rows_P)[:, :3])
    return np.stack(clouds)
