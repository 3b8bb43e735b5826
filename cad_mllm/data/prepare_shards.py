"""From the Omni-CAD archive to a sharded data set, on one machine or on the pods of an Indexed Job.

    <out>/prepare/settings.json    what the data set is made of and how: other input is not mixed in
    <out>/prepare/read-00000.json  the first pass, in chunks (`cad_mllm.data.survey`)
    <out>/prepare/train-00000.json a finished shard: its checksum, its rejected models, its counts
    <out>/train/00000.arrow        the shard itself (`cad_mllm.data.shards`)
    <out>/rejected.jsonl report.html dataset.json    at last, when all shards are there

Every file is either whole or not there, has a checksum, and follows from the input alone. So a run that was
killed goes on behind its last finished shard, and whatever the number of workers, pods and kills, the same
bytes come out. (A time limit is the exception: which models exceed it is up to the machine.)

There is no separate step that merges. Each pod records its own shards first and looks for all the others
then, so the last one to finish finds the data set complete, compares every shard with its checksum, and
writes the index. If several find it at once, a lock makes them do it one after another, with the same result.
"""

import json
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cad_mllm.cad.worker import run_in_order
from cad_mllm.data.archive import Archive, Captions, Rejected, Splits
from cad_mllm.data.atomic import atomic_path, make_writable, write_json
from cad_mllm.data.build import BuiltRow, RowJob, build_row
from cad_mllm.data.layout import ModelSettings, Split
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.quality import ShardCounts, Tokenizer, write_quality_report
from cad_mllm.data.records import locked, read_record, write_record
from cad_mllm.data.shards import FORMAT, Manifest, Shard, ShardWriter, shard_fault, write_manifest
from cad_mllm.data.survey import Part, Plan, PlannedShard, make_plan, survey
from cad_mllm.errors import CadError, ConfigError, DataError

MEMORY_MB = 300
"""What one model may add to the 300 MB that a worker has with the geometry kernel loaded: 600 MB in all."""

REJECTED_FILE = "rejected.jsonl"
REPORT_FILE = "report.html"
_STATE = "prepare"


@dataclass(frozen=True, kw_only=True)
class ShardsReport:
    """What a run of `prepare` did."""

    built: int
    """Models, in this run."""
    shards_there: int
    """Of this part, made by an earlier run."""
    shards_made: int
    missing: tuple[str, ...]
    """Shards of the data set that other parts have yet to make."""
    rows: dict[Split, int] = field(default_factory=dict)
    """Of the complete data set; empty while shards are missing."""
    rejected: dict[str, int] = field(default_factory=dict)
    """By stage, of the complete data set."""
    caption_faults: int
    peak_mb: int
    """Memory of a worker at its highest."""
    seconds: float


@dataclass(frozen=True)
class _Finished:
    """A shard that is recorded."""

    shard: Shard
    rejected: tuple[Rejected, ...]
    counts: ShardCounts

    @classmethod
    def read(cls, out: Path, planned: PlannedShard) -> "_Finished | None":
        """None if it is not there, or not whole. What is in the shard itself is not looked at."""
        found = read_record(_record(out, planned))
        if found is None:
            return None
        return cls(
            Shard(**found["shard"]),
            tuple(Rejected(**one) for one in found["rejected"]),
            ShardCounts(**found["counts"]),
        )

    def write(self, out: Path, planned: PlannedShard) -> None:
        write_record(_record(out, planned), asdict(self))


def _record(out: Path, planned: PlannedShard) -> Path:
    return out / _STATE / f"{planned.split}-{planned.number:05d}.json"


def prepare_shards(
    archive: Archive,
    out: Path,
    *,
    splits: Splits,
    settings: ModelSettings,
    rows: int,
    part: Part,
    tokenizer: Tokenizer | None,
    workers: int,
    seconds: float,
) -> ShardsReport:
    """Make this part's shards of at most `rows` models below `out`, and the index if it is the last part.

    Each model has `seconds` and `MEMORY_MB`. Raises ConfigError if `out` was begun from other input or with
    other settings, DataError if it cannot be written (a full disk) or a finished shard of another part turns
    out damaged.
    """
    started = time.monotonic()
    state = out / _STATE
    make_writable(out, "--out")
    try:
        made_of = {
            "format": FORMAT,
            **asdict(settings),
            "rows": rows,
            "split_file": splits.fingerprint,
            "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
            "archive": archive.fingerprint,
        }
        _claim(out, made_of)
        captions = archive.captions()
        # A cluster that has lost sight of a node may start a pod again while the first one still works.
        with locked(state, f"part-{part.number}-{part.of}"):
            read = survey(archive, splits, state, workers=workers, seconds=seconds, part=part)
            plan = make_plan(archive, splits, read, rows)
            own = [shard for number, shard in enumerate(plan.shards) if number % part.of == part.number]
            missing = _not_there(out, own)
            work = _Work(archive, captions, out, settings, tokenizer, missing)
            work.run(workers=workers, seconds=seconds)
        absent = tuple(shard.file for shard in plan.shards if _Finished.read(out, shard) is None)
        finished, rejected = ([], []) if absent else _merge(out, plan, captions, settings, tokenizer)
    except OSError as error:
        raise DataError(
            f"--out {out} cannot be written or read: {error.strerror or error}. Free space, or mend the "
            "volume, and start again: what is finished is kept"
        ) from error
    in_split: Counter[Split] = Counter()
    for planned, one in zip(plan.shards, finished, strict=False):
        in_split[planned.split] += one.shard.rows
    return ShardsReport(
        built=work.built,
        shards_there=len(own) - len(missing),
        shards_made=len(missing),
        missing=absent,
        rows=dict(in_split),
        rejected=dict(sorted(Counter(one.stage for one in rejected).items())),
        caption_faults=len(captions.faults),
        peak_mb=work.peak_mb,
        seconds=time.monotonic() - started,
    )


def print_shards_report(report: ShardsReport, out: Path, console: Console) -> None:
    """What was done and what is missing, as a table."""
    table = Table(title=f"{report.seconds:.0f} s")
    table.add_column("this run")
    table.add_column("", justify="right")
    table.add_row("models built", str(report.built))
    table.add_row("shards made", str(report.shards_made))
    table.add_row("shards already there", str(report.shards_there))
    if report.built:
        table.add_row("memory of a worker, at most", f"{report.peak_mb} MB")
    if report.caption_faults:
        table.add_row("captions not used (see the report)", str(report.caption_faults))
    console.print(table)
    if report.missing:
        console.print(
            f"{len(report.missing)} shards of other parts are missing, first {report.missing[0]}: the part "
            "that finishes last writes the index",
            highlight=False,
        )
        return
    table = Table("the data set", "")
    for split, rows in report.rows.items():
        table.add_row(split, str(rows))
    for stage, count in report.rejected.items():
        table.add_row(f"left out: {stage}", str(count))
    console.print(table)
    console.print(f"{out / REPORT_FILE} shows what is in it and why models were left out", highlight=False)


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Write down what the data set is made of, so that nothing else is mixed in."""
    path = out / _STATE / "settings.json"
    with locked(path.parent):
        if not path.is_file():
            write_json(path, settings)
            return
        try:
            found = json.loads(path.read_bytes())
        except ValueError:
            found = {}
    changed = [key for key, value in settings.items() if found.get(key) != value]
    if changed:
        raise ConfigError(
            f"{out} was begun with another {', '.join(changed)} ({path}): choose another --out, or remove it"
        )


def _not_there(out: Path, shards: Sequence[PlannedShard]) -> list[PlannedShard]:
    """Shards without a record, or with other bytes than it says."""
    recorded = [(shard, _Finished.read(out, shard)) for shard in shards]
    with SlowProgress("Checking finished shards", sum(one is not None for _, one in recorded)) as progress:
        missing = []
        for shard, one in recorded:
            if one is None:
                missing.append(shard)
                continue
            if shard_fault(out, one.shard) is not None:
                missing.append(shard)
            progress.advance()
    return missing


class _Work:
    """Building shards, in the order of their numbers."""

    def __init__(
        self,
        archive: Archive,
        captions: Captions,
        out: Path,
        settings: ModelSettings,
        tokenizer: Tokenizer | None,
        shards: Sequence[PlannedShard],
    ) -> None:
        self._archive = archive
        self._captions = captions
        self._out = out
        self._settings = settings
        self._tokenizer = tokenizer
        self._shards = {shard.file: shard for shard in shards}
        self.built = 0
        self.peak_mb = 0

    def run(self, *, workers: int, seconds: float) -> None:
        total = sum(len(shard.ids) for shard in self._shards.values())
        outcomes = run_in_order(
            build_row, self._jobs(), workers=workers, seconds=seconds, memory_mb=MEMORY_MB
        )
        with SlowProgress("Building models", total) as progress, closing(outcomes):
            for file, found in groupby(outcomes, key=lambda pair: pair[0].shard):
                planned = self._shards[file]
                rejected: list[Rejected] = []
                counts = ShardCounts()
                with ShardWriter(self._out, file, points=self._settings.points) as writer:
                    for job, outcome in found:
                        progress.advance()
                        if isinstance(outcome, CadError):
                            rejected.append(Rejected(job.id, "build", str(outcome)))
                            continue
                        writer.add(outcome.row)
                        self._count(outcome, counts)
                _Finished(writer.shard, tuple(rejected), counts).write(self._out, planned)

    def _jobs(self) -> Iterator[RowJob]:
        for shard in self._shards.values():
            for sample_id in shard.ids:
                try:
                    content = self._archive.read(sample_id)
                except CadError as error:
                    raise DataError(f"{sample_id} could be read before, and now: {error}") from error
                yield RowJob(
                    shard=shard.file,
                    id=sample_id,
                    content=content,
                    caption=self._captions.by_id.get(sample_id),
                    settings=self._settings,
                )

    def _count(self, built: BuiltRow, counts: ShardCounts) -> None:
        self.built += 1
        self.peak_mb = max(self.peak_mb, built.peak_mb)
        row = built.row
        for name, found in (
            ("operations", built.operations),
            ("extents", built.extents),
            ("curves", built.curves),
            ("caption sources", {row.caption_source: 1}),
        ):
            counts.add(name, found)
        for length, text in ((counts.characters, row.command_8), (counts.characters_10, row.command_10)):
            if text is not None:
                length.append(len(text))
        if self._tokenizer is not None and row.command_8 is not None:
            counts.tokens.append(self._tokenizer.count(row.command_8))
        counts.extrudes.append(row.num_extrudes)
        counts.num_curves.append(row.num_curves)


def _merge(
    out: Path, plan: Plan, captions: Captions, settings: ModelSettings, tokenizer: Tokenizer | None
) -> tuple[list[_Finished], list[Rejected]]:
    """Compare every shard with its checksum, then write the rejected models, the report and the index."""
    with locked(out / _STATE):
        finished = []
        with SlowProgress("Verifying shards", len(plan.shards)) as progress:
            for planned in plan.shards:
                one = _Finished.read(out, planned)
                assert one is not None, "all are there"
                fault = shard_fault(out, one.shard)
                if fault is not None:
                    raise DataError(f"{fault}: start again, it is made anew by the part that it belongs to")
                finished.append(one)
                progress.advance()
        rejected = sorted(
            (*plan.rejected, *(one for shard in finished for one in shard.rejected)), key=lambda one: one.id
        )
        with atomic_path(out / REJECTED_FILE, durable=True) as temporary:
            temporary.write_text(
                "".join(json.dumps(asdict(one)) + "\n" for one in rejected), encoding="utf-8"
            )
        shards: dict[Split, tuple[Shard, ...]] = {}
        for planned, one in zip(plan.shards, finished, strict=True):
            if one.shard.rows:
                shards[planned.split] = (*shards.get(planned.split, ()), one.shard)
        if not shards:
            raise DataError(f"none of the models could be prepared: {out / REJECTED_FILE} says why of each")
        manifest = Manifest(settings=asdict(settings), splits=shards)
        write_quality_report(
            out / REPORT_FILE, out, manifest, [one.counts for one in finished], rejected, captions, tokenizer
        )
        write_manifest(out, manifest)
    return finished, rejected
