"""`cad-mllm evaluate`: score all pairs in worker processes, and write down what came out.

In the output folder: `samples.csv` (one line for every id), `summary.json`, `report.html`. Folders in it that
are evaluations of the same model with worse points, named `noise-0.01` or `dropped-0.5` (the standard
deviation in half sides of the box, the share of points left out), appear in the report as curves.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cad_mllm.cad.program_metrics import fingerprint
from cad_mllm.cad.shapefile import program_text
from cad_mllm.cad.surface import Kernel, installed_kernel
from cad_mllm.cad.worker import run_limited
from cad_mllm.data.atomic import atomic_path, make_writable, write_json
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.shards import ShardedSplit, is_sharded
from cad_mllm.errors import CadError, DataError
from cad_mllm.evaluate.files import Inputs, find_shapes, find_truths, read_inputs
from cad_mllm.evaluate.score import Outcome, Pair, Sample, score
from cad_mllm.evaluate.summary import METRICS, Estimate, Summary, Training, summarise

SECONDS = 60.0
"""Time limit of one pair. A model that takes longer to build is counted as a failure."""
SUMMARY_FILE, SAMPLES_FILE = "summary.json", "samples.csv"
FORMAT = 1

NO_KERNEL = "OpenCASCADE is not installed: solids of programs are polygon models, and STEP files are not read"
_LISTED = 20
"""Failures that are printed; the files hold all."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was found out."""

    predicted: Path
    true: Path
    samples: tuple[Sample, ...]
    """Sorted by id."""
    summary: Summary
    inputs: Inputs
    files: dict[str, Pair]
    """Id -> its files, of all ids that have a truth."""
    unreadable: tuple[str, ...]
    builder: Kernel
    """What solids of programs were built with."""


def evaluate(
    predicted: Path, true: Path, *, training: Path | None, workers: int, seconds: float = SECONDS
) -> Evaluation:
    """Score every id that has a prediction or a truth.

    Raises DataError if a folder cannot be read, holds no shape, or no prediction has the name of a truth.
    """
    predictions, truths = find_shapes(predicted, "--pred"), find_truths(true)
    if not truths.files:
        raise DataError(f"--true {true}: no shape files (.json .txt .step .stl .ply .obj) below it")
    if not predictions.files.keys() & truths.files.keys():
        raise DataError(
            f"no file below --pred {predicted} has the name of one below --true {true}: files belong "
            "together if their paths below these folders are equal but for the suffix"
        )
    inputs = read_inputs(predicted, true)
    known, described = frozenset[str](), None
    if training is not None:
        known, described = training_set(training, workers=workers, seconds=seconds)
    pairs = [Pair(key, path, predictions.files.get(key)) for key, path in sorted(truths.files.items())]
    samples = score_all(pairs, workers=workers, seconds=seconds)
    samples += [
        Sample(key, Outcome.EXTRA, "no true model with this id")
        for key in predictions.files.keys() - truths.files.keys()
    ]
    samples.sort(key=lambda sample: sample.id)
    modalities = {sample.id: inputs.of(sample.id).modalities for sample in samples}
    return Evaluation(
        predicted=predicted,
        true=true,
        samples=tuple(samples),
        summary=summarise(samples, modalities=modalities, training=described, known=known),
        inputs=inputs,
        files={pair.id: pair for pair in pairs},
        unreadable=(
            *(f"--pred {line}" for line in predictions.unreadable),
            *(f"--true {line}" for line in truths.unreadable),
            *inputs.unreadable,
        ),
        builder=installed_kernel(),
    )


def score_all(pairs: Sequence[Pair], *, workers: int, seconds: float) -> list[Sample]:
    """Score the pairs in worker processes, `seconds` each at most; every pair gives one sample."""
    samples: list[Sample] = []
    stuck: list[tuple[Pair, str]] = []
    with SlowProgress("scoring", len(pairs)) as progress:
        for index, outcome in run_limited(
            score, pairs, workers=min(workers, max(len(pairs), 1)), seconds=seconds
        ):
            progress.advance()
            if isinstance(outcome, CadError):
                stuck.append((pairs[index], str(outcome)))
            else:
                samples.append(outcome)
    # Time, memory or a crash: was it the truth or the prediction? The truth alone tells.
    alone = [Pair(pair.id, pair.true, None) for pair, _ in stuck]
    few = min(workers, max(len(alone), 1))
    with SlowProgress("reading the true models of those that broke off", len(alone)) as progress:
        for index, outcome in run_limited(score, alone, workers=few, seconds=seconds):
            progress.advance()
            pair, reason = stuck[index]
            if isinstance(outcome, CadError):
                samples.append(Sample(pair.id, Outcome.UNUSABLE_TRUTH, str(outcome)))
            elif outcome.outcome is Outcome.UNUSABLE_TRUTH or pair.predicted is None:
                samples.append(outcome)
            else:
                samples.append(Sample(pair.id, Outcome.INVALID, reason))
    return samples


def training_set(path: Path, *, workers: int, seconds: float) -> tuple[frozenset[str], Training]:
    """Fingerprints of a training set: a folder of programs, the train split of a sharded data set, or a text
    file with one command text a line.

    Raises DataError if it cannot be read or holds no program.
    """
    if path.is_file():
        try:
            items: Sequence[Path | str] = path.read_text(encoding="utf-8", errors="replace").split()
        except OSError as error:
            raise DataError(f"--train {path}: cannot be read ({error.strerror or error})") from error
    elif is_sharded(path):
        items = [text for text in ShardedSplit(path, "train").column("command_8") if text]
    else:
        items = sorted(find_shapes(path, "--train").files.values())
    known: set[str] = set()
    unusable = 0
    with SlowProgress("reading the training set", len(items)) as progress:
        for _, outcome in run_limited(
            _fingerprint_of, items, workers=min(workers, max(len(items), 1)), seconds=seconds
        ):
            progress.advance()
            if isinstance(outcome, CadError):
                unusable += 1
            else:
                known.add(outcome)
    if not known:
        raise DataError(f"--train {path}: holds no program (.json, .txt, or one command text a line)")
    return frozenset(known), Training(programs=len(known), models=len(items), unusable=unusable)


def _fingerprint_of(item: Path | str) -> str:
    return fingerprint(program_text(item))


def write_tables(out: Path, evaluation: Evaluation) -> None:
    """Write `samples.csv` and `summary.json`."""
    make_writable(out, "--out")
    columns = ["id", "outcome", "modalities", *(metric.name for metric in METRICS), "reason"]
    with (
        atomic_path(out / SAMPLES_FILE) as path,
        path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(columns)
        for sample in evaluation.samples:
            figures = sample.figures or {}
            writer.writerow(
                [
                    sample.id,
                    sample.outcome.value,
                    evaluation.inputs.of(sample.id).modalities,
                    *("" if (value := figures.get(m.name)) is None else repr(value) for m in METRICS),
                    sample.reason or sample.notes,
                ]
            )
    write_json(
        out / SUMMARY_FILE,
        {
            "format": FORMAT,
            "predicted": str(evaluation.predicted),
            "true": str(evaluation.true),
            "builder": evaluation.builder.value,
            "worse": [{"noise": noise, "dropped": dropped} for noise, dropped in _worse(evaluation)],
            "definitions": {metric.name: metric.definition for metric in METRICS},
            "summary": evaluation.summary.as_json(),
            "failures": [
                {"id": sample.id, "outcome": sample.outcome.value, "reason": sample.reason}
                for sample in evaluation.samples
                if sample.outcome is not Outcome.SCORED
            ],
            "unreadable": list(evaluation.unreadable),
        },
    )


def _worse(evaluation: Evaluation) -> list[tuple[float, float]]:
    """How much worse the points of predictions were made, as far as is known: (noise, dropped), each once."""
    ids = [s.id for s in evaluation.samples if s.outcome in (Outcome.SCORED, Outcome.INVALID)]
    return sorted({(given.noise, given.dropped) for given in map(evaluation.inputs.of, ids)})


def print_summary(evaluation: Evaluation, console: Console) -> None:
    """What was counted, the failures, and one line for each metric."""
    summary = evaluation.summary
    if evaluation.builder is Kernel.POLYGONS:
        console.print(NO_KERNEL, highlight=False)
    counts = Table(title="ids", title_justify="left")
    for outcome in Outcome:
        counts.add_column(outcome.value, justify="right")
    counts.add_row(*(str(summary.counts[outcome.value]) for outcome in Outcome))
    console.print(counts)
    failures = [sample for sample in evaluation.samples if sample.outcome is not Outcome.SCORED]
    for sample in failures[:_LISTED]:
        console.print(
            Text(f"  {sample.outcome.value}: {ascii(sample.id)[1:-1]}: {sample.reason}"), soft_wrap=True
        )
    if len(failures) > _LISTED:
        console.print(f"  and {len(failures) - _LISTED} more: see {SAMPLES_FILE}", highlight=False)
    for line in evaluation.unreadable[:_LISTED]:
        console.print(Text(f"  not read: {line}"), soft_wrap=True)
    if summary.invalidity is not None:
        console.print(f"invalid or missing: {percent(summary.invalidity)}", highlight=False)
    if summary.novel is not None and summary.training is not None:
        console.print(
            f"not among the {summary.training.programs:,} programs of the training set: "
            f"{percent(summary.novel)}",
            highlight=False,
        )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("metric", "mean", "95 %", "median", "of", "mean*", "median*"):
        table.add_column(name, justify="left" if name == "metric" else "right", no_wrap=True)
    for metric in METRICS:
        row = summary.lines[metric.name]
        mean, median = row.mean, row.median
        table.add_row(
            metric.label,
            metric.shown(mean.value if mean else None),
            f"{metric.shown(mean.low)} - {metric.shown(mean.high)}" if mean else "",
            metric.shown(median.value if median else None),
            f"{row.covers}/{row.of}",
            metric.shown(row.mean_with_failures),
            metric.shown(row.median_with_failures),
        )
    console.print(table)
    console.print("* with failures counted as the worst value, where there is one", highlight=False)


def percent(entry: Estimate) -> str:
    """A share with its interval."""
    return f"{entry.value:.1%} ({entry.low:.1%} to {entry.high:.1%})"
