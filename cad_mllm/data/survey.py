"""The first, cheap pass over a data set: which models are read, which are the same, which shard each goes to.

Duplicates are found by quantised program, before anything is built: the first id in sorted order stays,
whatever split it is in, so that no validation model was trained on. The decision needs all models of the data
set, and reading one takes some milliseconds where building it takes half a second. So every pod of a cluster
makes this pass for itself, except for the chunks that another one has recorded by then: no pod waits for
another, and all come to the same plan.
"""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.jsonfile import loads
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import CadProgram
from cad_mllm.cad.worker import run_in_order
from cad_mllm.data.archive import Archive, Rejected, Splits
from cad_mllm.data.layout import Split
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.records import read_record, write_record
from cad_mllm.errors import CadError, ConfigError

MODELS_PER_CHUNK = 4096
"""What is read again, at most, after a kill."""
MEMORY_MB = 300
"""What reading one model may take."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The share of a pod: shards `number`, `number + of`, ..."""

    number: int = 0
    of: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.of:
            raise ConfigError(f"--part {self.number}/{self.of}: parts count from 0 to {self.of - 1}")

    @classmethod
    def parse(cls, text: str) -> "Part":
        """From `3/16`. Raises ConfigError for anything else."""
        number, slash, of = text.partition("/")
        if not (slash and number.isascii() and number.isdigit() and of.isascii() and of.isdigit()):
            raise ConfigError(f"--part {text}: give it as NUMBER/OF, from 0/16 to 15/16")
        return cls(number=int(number), of=int(of))


@dataclass(frozen=True)
class PlannedShard:
    """The models that a shard is to hold, if all of them can be built."""

    split: Split
    number: int
    ids: tuple[str, ...]

    @property
    def file(self) -> str:
        """Relative to the data set."""
        return f"{self.split}/{self.number:05d}.arrow"


@dataclass(frozen=True)
class Plan:
    """What is built, and what is not."""

    shards: tuple[PlannedShard, ...]
    rejected: tuple[Rejected, ...]
    """Sorted by id."""


@dataclass(frozen=True)
class _Job:
    chunk: int
    id: str
    content: bytes
    unreadable: CadError | None


@dataclass(frozen=True)
class _Read:
    """A model after the first pass: the digest of its quantised program, or why it has none."""

    id: str
    digest: str | None
    stage: str = ""
    reason: str = ""


def command_text(program: CadProgram, bits: int) -> str | None:
    """As training learns it; None for a program that cannot be written at that width."""
    try:
        return codec.encode(program, bits=bits)
    except CadError:
        return None


def survey(
    archive: Archive, splits: Splits, folder: Path, *, workers: int, seconds: float, part: Part
) -> list[_Read]:
    """Read every model of a split, in the order of the ids. `folder` has the records of finished chunks.

    Each part begins with its own share, so that several pods do not all read the same.
    """
    ids = [sample_id for sample_id in archive.ids if splits.of(sample_id) is not None]
    chunks = [ids[start : start + MODELS_PER_CHUNK] for start in range(0, len(ids), MODELS_PER_CHUNK)]
    first = len(chunks) * part.number // part.of
    with SlowProgress("Reading models", len(ids)) as progress:

        def jobs() -> Iterator[_Job]:
            for number in (*range(first, len(chunks)), *range(first)):
                if read_record(_record(folder, number)) is not None:
                    progress.advance(len(chunks[number]))
                    continue
                for sample_id in chunks[number]:
                    try:
                        yield _Job(number, sample_id, archive.read(sample_id), None)
                    except CadError as error:
                        yield _Job(number, sample_id, b"", error)

        with closing(
            run_in_order(_read, jobs(), workers=workers, seconds=seconds, memory_mb=MEMORY_MB)
        ) as outcomes:
            for number, found in groupby(outcomes, key=lambda pair: pair[0].chunk):
                read = []
                for job, outcome in found:
                    progress.advance()
                    if isinstance(outcome, CadError):
                        outcome = _Read(job.id, None, "parse", str(outcome))
                    read.append(outcome)
                write_record(_record(folder, number), [asdict(one) for one in read])
    return [_Read(**one) for number in range(len(chunks)) for one in read_record(_record(folder, number))]


def _record(folder: Path, chunk: int) -> Path:
    return folder / f"read-{chunk:05d}.json"


def _read(job: _Job) -> _Read:
    """In a worker process."""
    if job.unreadable is not None:
        return _Read(job.id, None, "archive", str(job.unreadable))
    try:
        program = normalise(omnicad.parse(loads(job.content))).program
    except CadError as error:
        return _Read(job.id, None, "parse", str(error))
    for bits in (8, 10):
        text = command_text(program, bits)
        if text is not None:
            break
    # A model that neither width can hold is like no other one.
    same = (bits, text) if text is not None else (0, job.id)
    return _Read(job.id, hashlib.sha256(repr(same).encode()).hexdigest()[:32])


def make_plan(archive: Archive, splits: Splits, read: Sequence[_Read], rows: int) -> Plan:
    """Leave duplicates out, and cut what stays of each split into shards of `rows` models."""
    rejected = list(archive.rejected)
    kept: dict[Split, list[str]] = {}
    first: dict[str, str] = {}
    for one in read:
        if one.digest is None:
            rejected.append(Rejected(one.id, one.stage, one.reason))
        elif one.digest in first:
            rejected.append(
                Rejected(one.id, "duplicate", f"the same quantised program as {first[one.digest]}")
            )
        else:
            first[one.digest] = one.id
            split = splits.of(one.id)
            assert split is not None, "only models of a split are read"
            kept.setdefault(split, []).append(one.id)
    rejected += [
        Rejected(sample_id, "split", "is in no split of --split_file")
        for sample_id in archive.ids
        if splits.of(sample_id) is None
    ]
    shards = [
        PlannedShard(split, number, tuple(ids[number * rows : (number + 1) * rows]))
        for split, ids in sorted(kept.items())
        for number in range(-(-len(ids) // rows))
    ]
    return Plan(tuple(shards), tuple(sorted(rejected, key=lambda one: one.id)))
