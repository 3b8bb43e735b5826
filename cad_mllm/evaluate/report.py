"""The page of an evaluation: figures, distributions, curves, and the samples themselves, in one HTML file.

It fetches nothing: pictures and the few lines of script are in it.
"""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cad_mllm.data.atomic import atomic_path
from cad_mllm.evaluate.gallery import VIEWS, Pictures, badness, choose, draw
from cad_mllm.evaluate.published import CONVENTIONS, PUBLISHED, ROBUSTNESS, Row
from cad_mllm.evaluate.run import SECONDS, SUMMARY_FILE, Evaluation
from cad_mllm.evaluate.score import Outcome, Sample
from cad_mllm.evaluate.summary import BY_NAME, METRICS, Summary
from cad_mllm.report import data_uri, render_page

REPORT_FILE = "report.html"

_RUN = re.compile(r"(noise|dropped)-(0?\.[0-9]{1,4})")
_CLEAN = {"noise": 0.0, "dropped": 0.0}
_OURS, _THEIRS = "#1f4e79", "#c2410c"
_SHOWN_IN_CARD = ("chamfer", "iou", "f_score", "normal_consistency", "command_accuracy")
_HISTOGRAMS = ("chamfer", "f_score", "iou", "normal_consistency", "commands", "command_accuracy")
_MODALITY_COLUMNS = ("chamfer", "chamfer_squared", "f_score", "normal_consistency", "iou", "command_accuracy")
_LISTED_FAILURES = 500
_LAST = 1e9
"""The distance of what has none."""


@dataclass(frozen=True)
class Card:
    """One sample of the gallery."""

    sample: Sample
    modalities: str
    caption: str
    rank: float
    """By what the worst comes first."""
    distance: float
    figures: Sequence[tuple[str, str]]
    pictures: Pictures

    @staticmethod
    def uri(picture: bytes | None) -> str | None:
        """For the template."""
        return None if picture is None else data_uri(picture)


def write_report(out: Path, evaluation: Evaluation, *, workers: int, seconds: float = SECONDS) -> Path:
    """Write `report.html` into `out`, with the curves of the runs whose folders are there."""
    modalities = {s.id: evaluation.inputs.of(s.id).modalities for s in evaluation.samples}
    chosen = choose(evaluation.samples, modalities)
    pictures = draw(
        [(evaluation.files[sample.id], evaluation.inputs.of(sample.id)) for sample in chosen],
        workers=workers,
        seconds=seconds,
    )
    runs, unusable = robustness_runs(out)
    summary = evaluation.summary
    failures = [sample for sample in evaluation.samples if sample.outcome is not Outcome.SCORED]
    html = render_page(
        "evaluation.html.j2",
        predicted=str(evaluation.predicted),
        truth=str(evaluation.true),
        builder=evaluation.builder.value,
        summary=summary,
        counted=sum(summary.counts[outcome] for outcome in ("scored", "invalid", "missing")),
        metrics=METRICS,
        by_name=BY_NAME,
        modality_columns=_MODALITY_COLUMNS,
        ours=_our_rows(summary),
        published=PUBLISHED,
        conventions=CONVENTIONS,
        distributions=data_uri(_distributions(evaluation.samples)),
        robustness=data_uri(_curves(summary, runs)) if runs else None,
        unreadable=[*evaluation.unreadable, *unusable],
        cards=[_card(sample, evaluation, pictures[sample.id]) for sample in chosen],
        views=VIEWS,
        failures=failures[:_LISTED_FAILURES],
        failures_left_out=max(len(failures) - _LISTED_FAILURES, 0),
    )
    path = out / REPORT_FILE
    with atomic_path(path) as temporary:
        temporary.write_text(html, encoding="utf-8", errors="backslashreplace")
    return path


def _card(sample: Sample, evaluation: Evaluation, pictures: Pictures) -> Card:
    given = evaluation.inputs.of(sample.id)
    figures = sample.figures or {}
    shown = [
        (BY_NAME[name].label, BY_NAME[name].shown(figures[name]))
        for name in _SHOWN_IN_CARD
        if figures.get(name) is not None
    ]
    rank, distance = min(badness(sample), _LAST), figures.get("chamfer")
    distance = _LAST if distance is None else distance
    return Card(sample, given.modalities, given.caption, rank, distance, shown, pictures)


def _our_rows(summary: Summary) -> list[Row]:
    """Our model in the columns of the published figures: all samples, then by modality."""
    parts = {
        "this evaluation": summary,
        **{f"this evaluation, {k}": v for k, v in summary.by_modality.items()},
    }

    def mean(part: Summary, name: str) -> str:
        line = part.lines[name]
        return "" if line.mean is None else BY_NAME[name].shown(line.mean.value)

    def both(part: Summary, name: str) -> str:
        median = part.lines[name].median
        return "" if median is None else f"{mean(part, name)}, {BY_NAME[name].shown(median.value)}"

    return [
        Row(
            system=name,
            data=f"{part.lines['f_score'].covers} of {part.lines['f_score'].of}",
            cd=mean(part, "chamfer"),
            cd_squared=both(part, "chamfer_squared"),
            f_score=mean(part, "f_score"),
            normal_consistency=mean(part, "normal_consistency"),
            iou=mean(part, "iou"),
            segment_error=mean(part, "segment_error_relative"),
            dangling=mean(part, "dangling_edge_length"),
            sir=mean(part, "self_intersection_ratio"),
            flux=mean(part, "flux_enclosure_error"),
            invalid="" if part.invalidity is None else f"{part.invalidity.value * 100:.1f}",
        )
        for name, part in parts.items()
    ]


# --- pictures of numbers -----------------------------------------------------------------------------------


def _distributions(samples: Sequence[Sample]) -> bytes:
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.2), dpi=130, layout="constrained")
    for panel, name in zip(axes.flat, _HISTOGRAMS, strict=True):
        metric = BY_NAME[name]
        values = [v * metric.scale for s in samples if s.figures and (v := s.figures[name]) is not None]
        _plain_axes(panel)
        panel.set_title(metric.label, fontsize=10, loc="left")
        if not values:
            panel.text(0.5, 0.5, "no sample has it", ha="center", transform=panel.transAxes, color="#5c6b7c")
            panel.set_xticks([])
            panel.set_yticks([])
            continue
        if metric.higher_is_better:
            bins: Any = np.linspace(0, 100, 26)
        else:
            low, high = max(min(values), 1e-6), max(max(values), 2e-6)
            bins = np.geomspace(low * 0.9, high * 1.1, 26)
            panel.set_xscale("log")
            panel.set_xticks([], minor=True)
            panel.set_xticks(ticks := log_ticks(bins[0], bins[-1]), [f"{tick:g}" for tick in ticks])
        panel.hist(values, bins=bins, color=_OURS, edgecolor="white", linewidth=0.5)
        panel.axvline(float(np.median(values)), color=_THEIRS, linewidth=1.2, label="median")
    axes.flat[0].set_ylabel("samples")
    axes.flat[0].legend(frameon=False, fontsize=8)
    return _as_png(figure)


def log_ticks(low: float, high: float) -> list[float]:
    """At most 7 round numbers within [low, high], both > 0, for a logarithmic axis; or its ends."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1,)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        within = [tick for tick in ticks if low <= tick <= high]
        if len(within) <= 7:
            break
    return within[:: max(1, math.ceil(len(within) / 7))] or [float(f"{low:.2g}"), float(f"{high:.2g}")]


@dataclass(frozen=True)
class Run:
    """An evaluation of the same model with worse points."""

    kind: str
    """`noise` or `dropped`."""
    level: float
    line: Mapping[str, Any]
    """The chamfer distance of its summary."""


def robustness_runs(out: Path) -> tuple[list[Run], list[str]]:
    """The runs in folders `noise-0.01`, `dropped-0.5`, ... of `out`, and what of them cannot be used."""
    runs, unusable = [], []
    for folder in sorted(out.iterdir()):
        match = _RUN.fullmatch(folder.name)
        if match is None or not folder.is_dir():
            continue
        try:
            content = json.loads((folder / SUMMARY_FILE).read_bytes())
            line = content["summary"]["lines"]["chamfer"]
            for key in ("value", "low", "high"):
                float(line["mean"][key])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            unusable.append(f"{folder.name}/{SUMMARY_FILE}: no summary with a distance ({error})")
            continue
        kind, level = match.group(1), float(match.group(2))
        worse = content.get("worse", [])
        if worse not in ([], [_CLEAN], [_CLEAN | {kind: level}]):  # lists of others say nothing
            unusable.append(f"{folder.name}/{SUMMARY_FILE}: its points were made worse by {worse}")
            continue
        runs.append(Run(kind, level, line))
    return sorted(runs, key=lambda run: (run.kind, run.level)), unusable


def _curves(summary: Summary, runs: Sequence[Run]) -> bytes:
    """CD over the level, in multiples of the clean one: so the conventions of two papers do not matter."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), dpi=130, layout="constrained")
    clean = summary.lines["chamfer"].mean
    titles = {"noise": "noise added to the points (standard deviation)", "dropped": "share of points dropped"}
    for panel, (kind, title) in zip(axes, titles.items(), strict=True):
        _plain_axes(panel)
        levels, theirs = zip(*ROBUSTNESS[kind], strict=True)
        panel.plot(
            levels,
            np.array(theirs) / theirs[0],
            color=_THEIRS,
            marker="o",
            linestyle="--",
            markersize=4,
            label="CAD-MLLM (paper)",
        )
        ours = [run for run in runs if run.kind == kind]
        if ours and clean is not None and clean.value > 0:
            means = np.array([[clean.value, clean.low, clean.high]] + [_interval(run) for run in ours])
            means /= clean.value
            at = [0.0, *(run.level for run in ours)]
            panel.fill_between(at, means[:, 1], means[:, 2], color=_OURS, alpha=0.15, linewidth=0)
            panel.plot(at, means[:, 0], color=_OURS, marker="o", markersize=4, label="this model (95 %)")
        panel.set_xlabel(title)
        panel.set_ylim(bottom=0)
        panel.legend(frameon=False, fontsize=8, loc="upper left")
    axes[0].set_ylabel("mean CD / mean CD of clean points")
    return _as_png(figure)


def _interval(run: Run) -> list[float]:
    mean = run.line["mean"]
    return [float(mean["value"]), float(mean["low"]), float(mean["high"])]


def _plain_axes(panel: Axes) -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#d4dae2", linewidth=0.6)
    panel.set_axisbelow(True)


def _as_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    plt.close(figure)
    return buffer.getvalue()
