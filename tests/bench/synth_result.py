"""What a trained model makes of held-out parts, in one table: by what it is given, of how many candidates.

    python tests/bench/synth_result.py CHECKPOINT --train data/synth/train --val data/synth/val --out result

Generates with the code of `cad-mllm generate`, scores with that of `cad-mllm evaluate`, and sets beside it
what the nearest training model would score. Writes `result.json`, `result.txt` and an evaluation of each row,
one of them with a page (`evaluation/text+points/report.html`). Held out are the first models of the val data
whose programs (8 bits) the training data do not hold. Rows for which there is no time (`--seconds`) are left
out and named.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from cad_mllm.cad.surface import installed_kernel  # noqa: E402
from cad_mllm.evaluate import run  # noqa: E402
from cad_mllm.evaluate.clouds import Models  # noqa: E402
from cad_mllm.evaluate.summary import BY_NAME, Summary  # noqa: E402
from cad_mllm.inputs import Given, Input, Worse, read_folder  # noqa: E402

# Whatever imports torch is imported where it is used: worker processes import this file anew.
if TYPE_CHECKING:
    from cad_mllm.generate import Generator

SEED = 0
RETRIEVAL = "nearest training model"
RETRIEVAL_FITTED = f"{RETRIEVAL}-fit"
"""Its numbers moved as those of the model's programs are: what remains is what the model read better."""
NOISE, DROPPED = (0.01, 0.02, 0.03, 0.05), (0.2, 0.5, 0.8, 0.95, 0.99)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A row: what the model is given, and how many candidates it makes."""

    modalities: tuple[Given, ...]
    candidates: int = 1
    fit: bool = False
    """Whether the numbers of the best candidate are fitted to the points."""
    worse: Worse = Worse()  # noqa: RUF009 frozen

    @property
    def folder(self) -> str:
        """Of its evaluation; greedy ones from worse points lie in that of clean ones, for the curves."""
        level = next((f"{k}-{v:g}" for k, v in asdict(self.worse).items() if v), "")
        name = "+".join(self.modalities)
        if self.candidates == 1:
            return f"{name}/{level}" if level else name
        name = f"{name}-{level}-best" if level else f"{name}-best"
        return f"{name}-fit" if self.fit else name


def settings(candidates: int) -> list[Setting]:
    """All rows, those that matter most first."""
    text: tuple[Given, ...] = ("text",)
    points: tuple[Given, ...] = ("text", "points")
    image: tuple[Given, ...] = ("text", "points", "image")
    half = Worse(dropped=0.5)
    rows = [Setting(modalities=given) for given in (points, image, text, ("points",), ("text", "image"))]
    given_many: tuple[tuple[Given, ...], ...] = (points, image, text, ("points",))
    rows += [Setting(modalities=given, candidates=candidates) for given in given_many]
    rows += [
        Setting(modalities=points, candidates=candidates, fit=True),
        Setting(modalities=points, worse=half),
        Setting(modalities=points, worse=half, candidates=candidates),
    ]
    levels = [Worse(noise=v) for v in NOISE] + [Worse(dropped=v) for v in DROPPED]
    return rows + [Setting(modalities=points, worse=worse) for worse in levels if worse != half]


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came out of one setting. Medians and shares count failures as the worst value; means do not."""

    name: str
    candidates: int
    samples: int
    invalid: float
    cd_squared_median: float | None
    cd_squared_mean: float | None
    cd_median: float | None
    cd_mean: float | None
    f_score: float | None
    iou: float | None
    command_accuracy: float | None
    generate_seconds: float
    evaluate_seconds: float

    @classmethod
    def of(cls, name: str, candidates: int, summary: Summary, generating: float, evaluating: float) -> "Row":
        """The row of an evaluation."""
        lines = summary.lines
        means = {key: None if (mean := line.mean) is None else mean.value for key, line in lines.items()}
        assert summary.invalidity is not None
        return cls(
            name=name,
            candidates=candidates,
            samples=lines["f_score"].of,
            invalid=summary.invalidity.value,
            cd_squared_median=lines["chamfer_squared"].median_with_failures,
            cd_squared_mean=means["chamfer_squared"],
            cd_median=lines["chamfer"].median_with_failures,
            cd_mean=means["chamfer"],
            f_score=lines["f_score"].mean_with_failures,
            iou=lines["iou"].mean_with_failures,
            command_accuracy=lines["command_accuracy"].mean_with_failures,
            generate_seconds=round(generating, 1),
            evaluate_seconds=round(evaluating, 1),
        )


@dataclass(frozen=True, kw_only=True)
class Check:
    """A sentence that the project holds itself to, and what was measured."""

    what: str
    measured: float | None
    """None: a row that it needs was not run, or has no such figure."""
    at_most: float

    @property
    def verdict(self) -> str:
        """In a word."""
        return (
            "not measured" if self.measured is None else "pass" if self.measured <= self.at_most else "FAIL"
        )


def checks(rows: Mapping[str, Row], candidates: int) -> list[Check]:
    """What is held to, of the rows that there are."""

    def invalid(name: str) -> float | None:
        return rows[name].invalid if name in rows else None

    def ratio(one: str, other: str, figure: str) -> float | None:
        values = [getattr(rows[name], figure) if name in rows else None for name in (one, other)]
        return values[0] / values[1] if values[0] is not None and values[1] else None

    best, half = "text+points-best", "text+points-dropped-0.5-best"
    found = [
        Check(
            what="greedy, text+points: share without a solid", measured=invalid("text+points"), at_most=0.05
        ),
        Check(what=f"best of {candidates}, text+points: share invalid", measured=invalid(best), at_most=0.01),
    ]
    for label, figure in (("CD squared", "cd_squared_median"), ("CD", "cd_median")):
        for kind in ("-best", ""):
            given = f"median {label}, {f'best of {candidates}' if kind else 'greedy'}"
            clean = f"text+points{kind}"
            worse = half if kind else "text+points/dropped-0.5"
            fitted = [
                (
                    "fitted text+points over nearest training model",
                    ratio(f"{clean}-fit", RETRIEVAL, figure),
                    0.5,
                ),
                ("the same, that fitted too", ratio(f"{clean}-fit", RETRIEVAL_FITTED, figure), 1.0),
            ]
            ratios = [
                *(fitted if kind else []),
                ("text+points over nearest training model", ratio(clean, RETRIEVAL, figure), 0.5),
                ("half of the points dropped over clean", ratio(worse, clean, figure), 1.1),
                ("text+points+image over text+points", ratio(f"text+points+image{kind}", clean, figure), 1.0),
                ("text+points over text", ratio(clean, f"text{kind}", figure), 1.0),
            ]
            found += [
                Check(what=f"{given}: {what}", measured=value, at_most=most) for what, value, most in ratios
            ]
    return found


def hold_out(val: Path, train: Path, out: Path, samples: int, workers: int) -> tuple[int, int]:
    """Write the first `samples` models of `val` that `train` does not hold, as a data set at `out`.

    Gives how many were written, and how many on the way were left out.
    """
    from cad_mllm.cad.program_metrics import fingerprint
    from cad_mllm.cad.shapefile import program_text
    from cad_mllm.data.layout import CAPTION_KEY

    known, _ = run.training_set(train, workers=workers, seconds=run.SECONDS)
    models, inputs = Models.find(val, "val"), read_folder(val)

    def unseen() -> Iterator[tuple[str, Input]]:
        for number, sample_id in enumerate(models.ids):
            path = out / f"json/{sample_id}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(models.json(number))
            if fingerprint(program_text(path)) not in known:
                yield sample_id, inputs[sample_id].read()
            else:
                path.unlink()
                left_out.append(sample_id)

    left_out: list[str] = []
    captions = []
    for sample_id, given in islice(unseen(), samples):
        for part in ("pcd", "img"):
            (out / part / sample_id).parent.mkdir(parents=True, exist_ok=True)
        if given.points_NC is not None:
            np.savez(out / f"pcd/{sample_id}.npz", points=given.points_NC)
        if given.image is not None:
            given.image.save(out / f"img/{sample_id}_000.png")
        captions.append({"id": sample_id, CAPTION_KEY: given.caption})
    (out / "txt").mkdir()
    (out / "txt/0000.json").write_text(json.dumps(captions), encoding="utf-8")
    return len(captions), len(left_out)


def retrieve(held_out: Path, train: Path, out: Path, verified: int, workers: int) -> dict[str, object]:
    """Write the nearest training model of each held-out one below `out`; gives how sure the search is."""
    import torch

    from cad_mllm.evaluate.nearest import POINTS, SHORTLIST, agreement, find_nearest, write_predictions

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    queries, training = Models.find(held_out, "val"), Models.find(train, "train")
    sought, clouds = (models.clouds(POINTS, workers=workers) for models in (queries, training))
    found = find_nearest(sought, clouds, device=device)
    write_predictions(out, queries, training, found)
    some = slice(0, verified)
    same, ratio = agreement(sought[some], clouds, found[some], device=device)
    return {
        "training models": len(clouds),
        "points": POINTS,
        "shortlist": SHORTLIST,
        "compared with an exact search": len(found[some]),
        "same model found": same,
        "mean distance found over exact": ratio,
    }


class Measurement:
    """One run of this file."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.out: Path = arguments.out
        self.started = time.monotonic()
        self.rows: dict[str, Row] = {}
        self.not_run: list[str] = []

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    def predictions(self, name: str) -> Path:
        """The folder of a row's predictions: none lies in another's, whose ids they would become."""
        return self.out / "generated" / name.replace("/", "-")

    def evaluate(self, name: str, candidates: int, generating: float) -> run.Evaluation:
        """Score the predictions of a row."""
        started, workers = time.monotonic(), self.arguments.workers
        folder = self.out / "evaluation" / name
        evaluation = run.evaluate(
            self.predictions(name), self.out / "held-out", training=None, workers=workers
        )
        run.write_tables(folder, evaluation)
        evaluating = time.monotonic() - started
        self.rows[name] = Row.of(name, candidates, evaluation.summary, generating, evaluating)
        return evaluation

    def write_page(self) -> None:
        """The page of the greedy row, with the curves of those from worse points, if there is time."""
        from cad_mllm.evaluate.report import write_report

        name = "text+points"
        if name in self.rows and self.elapsed < self.arguments.seconds:
            evaluation = self.evaluate(name, 1, self.rows[name].generate_seconds)
            write_report(self.out / "evaluation" / name, evaluation, workers=self.arguments.workers)

    def generate(self, generator: "Generator", setting: Setting) -> float:
        """Make the predictions of a row; how many seconds that took."""
        from cad_mllm.generate import GenerateSettings, generate_all

        started = time.monotonic()
        how = GenerateSettings(
            max_new_tokens=self.arguments.max_new_tokens,
            best_of=setting.candidates,
            temperature=self.arguments.temperature if setting.candidates > 1 else 0.0,
            fit=self.arguments.fit if setting.fit else 0,
            seed=SEED,
            batch_size=self.arguments.batch_size,
            workers=self.arguments.workers,
            programs_only=True,
            worse=setting.worse,
        )
        inputs = read_folder(self.out / "held-out", set(setting.modalities))
        generate_all(generator, self.predictions(setting.folder), inputs, how)
        return time.monotonic() - started

    def fit_retrieved(self) -> float:
        """Fit the nearest training models as the model's programs are; how many seconds that took."""
        from cad_mllm.cad import codec, omnicad
        from cad_mllm.cad.program_metrics import BITS
        from cad_mllm.cad.shapefile import program_text
        from cad_mllm.fit import Unfitted, fit

        started = time.monotonic()
        inputs = read_folder(self.out / "held-out", {"points"})
        unfitted: dict[str, Unfitted] = {}
        for one, given in inputs.items():
            points_PC = given.read().points_NC
            assert points_PC is not None
            text = program_text(self.predictions(RETRIEVAL) / f"{one}.json")
            unfitted[one] = Unfitted(text, points_PC, BITS)
        texts = fit(list(unfitted.values()), trials=self.arguments.fit, workers=self.arguments.workers)
        for one, text in zip(unfitted, texts, strict=True):
            path = self.predictions(RETRIEVAL_FITTED) / f"{one}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(omnicad.to_json(codec.decode(text))))
        return time.monotonic() - started

    def run(self) -> dict[str, object]:
        """All rows for which there is time; everything that was found."""
        from cad_mllm.generate import Generator

        arguments, candidates = self.arguments, self.arguments.best_of
        count, seen = hold_out(
            arguments.val, arguments.train, self.out / "held-out", arguments.samples, arguments.workers
        )
        search = retrieve(
            self.out / "held-out",
            arguments.train,
            self.predictions(RETRIEVAL),
            arguments.verified,
            arguments.workers,
        )
        retrieved = self.elapsed
        generator = Generator.from_checkpoint(arguments.checkpoint)
        # The next row is generated while the last one is scored: one wants the GPU, the other the cores.
        with ThreadPoolExecutor(1) as scorer:
            scored: list[Future[run.Evaluation]] = [scorer.submit(self.evaluate, RETRIEVAL, 1, retrieved)]
            slowest = 0.0
            for setting in settings(candidates):
                waiting = sum(not job.done() for job in scored) + 1
                scoring = max((row.evaluate_seconds for row in self.rows.values()), default=0.0)
                if self.elapsed + slowest + waiting * scoring > arguments.seconds:
                    self.not_run.append(setting.folder)
                    continue
                seconds = self.generate(generator, setting)
                slowest = max(slowest, seconds)
                job = scorer.submit(self.evaluate, setting.folder, setting.candidates, seconds)
                scored.append(job)
            for job in scored:
                job.result()
        if self.elapsed + slowest > arguments.seconds:
            self.not_run.append(RETRIEVAL_FITTED)
        else:
            self.evaluate(RETRIEVAL_FITTED, 1, self.fit_retrieved())
        return {
            "checkpoint": str(arguments.checkpoint),
            "train": str(arguments.train),
            "val": str(arguments.val),
            "builder": installed_kernel().value,
            "held out": count,
            "left out, because the training data hold them": seen,
            "best of": candidates,
            "trials of a fit": arguments.fit,
            "temperature": arguments.temperature,
            "max_new_tokens": arguments.max_new_tokens,
            "retrieval": search,
            "rows": [asdict(row) for row in self.rows.values()],
            "not run for want of time": self.not_run,
            "held to": [
                asdict(check) | {"verdict": check.verdict} for check in checks(self.rows, candidates)
            ],
            "seconds": round(self.elapsed, 1),
        }


_COLUMNS = {
    "cd_squared_median": "chamfer_squared",
    "cd_squared_mean": "chamfer_squared",
    "cd_median": "chamfer",
    "cd_mean": "chamfer",
    "f_score": "f_score",
    "iou": "iou",
    "command_accuracy": "command_accuracy",
}


def show(result: Mapping[str, object], rows: Mapping[str, Row], candidates: int, console: Console) -> None:
    """The table, what is held to, and what was not run."""
    table = Table("given", "best of", "invalid %")
    for column, metric in _COLUMNS.items():
        kind = {"median": ", median*", "mean": ", mean"}.get(column.rpartition("_")[2], "*")
        table.add_column(BY_NAME[metric].label + kind, justify="right")
    for name, row in sorted(rows.items()):
        figures = (BY_NAME[metric].shown(getattr(row, column)) for column, metric in _COLUMNS.items())
        table.add_row(name, str(row.candidates), f"{100 * row.invalid:.1f}", *figures)
    console.print(table)
    console.print("* failures count as the worst value; a mean CD is of what could be scored")
    verdicts = Table("held to", "measured", "at most", "")
    for check in checks(rows, candidates):
        measured = "" if check.measured is None else f"{check.measured:.3f}"
        verdicts.add_row(check.what, measured, f"{check.at_most:g}", check.verdict)
    console.print(verdicts)
    for name in (
        "builder",
        "held out",
        "left out, because the training data hold them",
        "retrieval",
        "seconds",
    ):
        console.print(f"{name}: {result[name]}", highlight=False)
    if result["not run for want of time"]:
        console.print(f"not run for want of time: {result['not run for want of time']}", highlight=False)


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--val", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--best_of", type=int, default=8)
    parser.add_argument("--fit", type=int, default=500, help="trials of a fit to the points")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--max_new_tokens", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument(
        "--verified", type=int, default=10, help="samples whose nearest is also sought exactly"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="no row is begun that would end later")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    measurement = Measurement(arguments)
    result = measurement.run()
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    with (arguments.out / "result.txt").open("w") as file:
        for console in (Console(width=200), Console(width=200, file=file)):
            show(result, measurement.rows, arguments.best_of, console)
    measurement.write_page()


if __name__ == "__main__":
    main()
