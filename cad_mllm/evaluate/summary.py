"""From the figures of samples to those of a model: means and medians with intervals, and what they cover.

A figure over the samples that worked alone flatters a model that fails often. So each says how many samples
it covers of how many there are, and stands beside the figure in which every failure counts as the worst
value, where there is one.

Array suffixes: N samples, R resamples.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest

from cad_mllm.cad.metrics import F_SCORE_DISTANCE, SAMPLES
from cad_mllm.cad.program_metrics import BITS, TOLERANCE
from cad_mllm.evaluate.score import COUNTED, Outcome, Sample

RESAMPLES = 1000
CONFIDENCE = 0.95
SEED = 0
_DRAWN_TOGETHER = 1 << 20
"""Values: bounds the memory."""

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How a figure is called, shown and understood."""

    name: str
    label: str
    definition: str
    scale: float = 1.0
    """What it is multiplied by where it is shown; never in files."""
    higher_is_better: bool = False
    worst: float | None = None
    """What a failure counts as; infinity still has a place in a median, None has none."""
    digits: int = 2

    def shown(self, value: float | None) -> str:
        """A value of it as a person reads it; nothing for None."""
        return "" if value is None else f"{value * self.scale:.{self.digits}f}"


_UNIT_BOX = "each shape scaled by itself into [-.5, .5]^3"
_POINTS = f"{SAMPLES:,} points drawn from each surface, {_UNIT_BOX}"

METRICS = (
    Metric(
        name="chamfer_squared",
        label="CD squared ×10³",
        definition=f"sum of both mean squared nearest distances; {_POINTS}",
        scale=1e3,
        worst=math.inf,
    ),
    Metric(
        name="chamfer_squared_floor",
        label="CD squared floor ×10³",
        definition="the same between the truth and itself: what random points alone leave",
        scale=1e3,
    ),
    Metric(
        name="chamfer",
        label="CD ×10²",
        definition=f"mean of both mean nearest distances, not squared; {_POINTS}",
        scale=1e2,
        worst=math.inf,
    ),
    Metric(
        name="chamfer_floor",
        label="CD floor ×10²",
        definition="the same between the truth and itself: what random points alone leave",
        scale=1e2,
    ),
    Metric(
        name="f_score",
        label=f"F-score @{F_SCORE_DISTANCE:g} %",
        definition=f"harmonic mean of precision and recall within that distance; {_POINTS}",
        scale=100,
        higher_is_better=True,
        worst=0.0,
    ),
    Metric(
        name="normal_consistency",
        label="normal consistency %",
        definition=f"mean |n . n'| of nearest points, both ways; {_POINTS}",
        scale=100,
        higher_is_better=True,
        worst=0.0,
    ),
    Metric(
        name="iou",
        label="IoU %",
        definition=f"volume of the intersection over that of the union, closed surfaces alone; {_UNIT_BOX}",
        scale=100,
        higher_is_better=True,
        worst=0.0,
    ),
    Metric(
        name="segment_error_relative",
        label="SegE (paper)",
        definition="|S^ - S| / S, S = parts connected by vertices",
        digits=3,
    ),
    Metric(
        name="segment_error",
        label="SegE (official code)",
        definition="|S^ - S|, S = parts connected by vertices",
        digits=3,
    ),
    Metric(
        name="dangling_edge_length",
        label="DangEL",
        definition="length of edges of exactly one face over half the longest side of the box",
        digits=3,
    ),
    Metric(
        name="self_intersection_ratio",
        label="SIR %",
        definition="share of faces in any intersection (exact; as CGAL)",
        scale=100,
        worst=1.0,
    ),
    Metric(
        name="flux_enclosure_error",
        label="FluxEE ×100",
        definition="|sum of area n . (1,1,1)|, not scaled: programs in [-1, 1]^3, files in their unit",
        scale=100,
        digits=3,
    ),
    Metric(
        name="command_accuracy",
        label="command accuracy %",
        definition=f"true commands of the same kind in the same place (DeepCAD), canonical {BITS}-bit text",
        scale=100,
        higher_is_better=True,
        worst=0.0,
    ),
    Metric(
        name="parameter_accuracy",
        label="parameter accuracy %",
        definition=f"parameters of those off by less than {TOLERANCE} of 256 steps (DeepCAD)",
        scale=100,
        higher_is_better=True,
        worst=0.0,
    ),
    Metric(name="commands", label="commands", definition="of the predicted program, canonical", digits=1),
    Metric(
        name="characters",
        label="characters",
        definition="of the predicted program's canonical text",
        digits=0,
    ),
)

BY_NAME = {metric.name: metric for metric in METRICS}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """One metric over a set of samples."""

    covers: int
    """Samples that have the figure."""
    of: int
    """Samples that should."""
    mean: Estimate | None
    median: Estimate | None
    mean_with_failures: float | None
    """A sample without the figure counts as the worst value; None where there is none, or it is infinite."""
    median_with_failures: float | None


@dataclass(frozen=True, kw_only=True)
class Training:
    """What the predictions are compared with for novelty."""

    programs: int
    """Distinct ones."""
    models: int
    unusable: int


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All figures of an evaluation."""

    counts: dict[str, int]
    """Outcome -> ids."""
    invalidity: Estimate | None
    """Share of invalid and missing predictions among the ids with a usable truth."""
    lines: dict[str, Line]
    unique: float | None
    """Distinct programs over predicted programs."""
    novel: Estimate | None
    """Share of predicted programs that are not in the training set; None without one."""
    training: Training | None
    by_modality: dict[str, "Summary"]

    def as_json(self) -> dict[str, object]:
        """Plain data."""
        return asdict(self)


def summarise(
    samples: Sequence[Sample],
    *,
    modalities: Mapping[str, str] | None = None,
    training: Training | None = None,
    known: frozenset[str] = frozenset(),
) -> Summary:
    """Figures over all samples, and for each set of modalities (id -> modalities) by itself.

    `known` are the fingerprints of the training set that `training` describes.
    """
    counted = [sample for sample in samples if sample.outcome in COUNTED]
    failed = [sample.outcome is not Outcome.SCORED for sample in counted]
    prints = [sample.fingerprint for sample in counted if sample.fingerprint is not None]
    unknown = [entry not in known for entry in prints]
    groups: dict[str, list[Sample]] = {}
    for sample in counted if modalities else []:
        groups.setdefault((modalities or {})[sample.id], []).append(sample)
    return Summary(
        counts={outcome.value: count for outcome, count in _counts(samples).items()},
        invalidity=share(failed),
        lines={metric.name: _line(metric, counted) for metric in METRICS},
        unique=len(set(prints)) / len(prints) if prints else None,
        novel=None if training is None else share(unknown),
        training=training,
        by_modality={
            name: summarise(members, training=training, known=known)
            for name, members in sorted(groups.items())
        }
        if len(groups) > 1
        else {},
    )


def _counts(samples: Sequence[Sample]) -> dict[Outcome, int]:
    counted = Counter(sample.outcome for sample in samples)
    return {outcome: counted[outcome] for outcome in Outcome}


def _line(metric: Metric, counted: Sequence[Sample]) -> Line:
    figures = [None if s.figures is None else s.figures[metric.name] for s in counted]
    values_N = np.array([figure for figure in figures if figure is not None], dtype=np.float64)
    with_failures: tuple[float | None, float | None] = (None, None)
    if metric.worst is not None and figures:
        filled_N = np.concatenate([values_N, np.full(len(figures) - len(values_N), metric.worst)])
        mean, median = float(filled_N.mean()), float(np.median(filled_N))
        with_failures = (mean if math.isfinite(mean) else None, median if math.isfinite(median) else None)
    return Line(
        covers=len(values_N),
        of=len(counted),
        mean=mean_of(values_N),
        median=median_of(values_N),
        mean_with_failures=with_failures[0],
        median_with_failures=with_failures[1],
    )


def mean_of(values_N: FloatArray) -> Estimate | None:
    """Mean with its percentile-bootstrap interval (Efron 1979), always the same; None of nothing."""
    if not len(values_N):
        return None
    rng = np.random.default_rng(SEED)
    size, at_once = len(values_N), max(1, _DRAWN_TOGETHER // len(values_N))
    parts = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    drawn_R = np.concatenate([values_N[rng.integers(size, size=(n, size))].mean(axis=1) for n in parts])
    return _estimate(float(values_N.mean()), drawn_R)


def median_of(values_N: FloatArray) -> Estimate | None:
    """Median with its percentile-bootstrap interval, always the same; None of nothing.

    The ranks in the middle of a resample are drawn directly: the k-th smallest of n uniform numbers is
    Beta(k, n + 1 - k), and the one after it the smallest of the n - k that are left above.
    """
    if not len(values_N):
        return None
    rng = np.random.default_rng(SEED)
    ordered_N, size = np.sort(values_N), len(values_N)
    lower = (size + 1) // 2
    first_R = rng.beta(lower, size + 1 - lower, RESAMPLES)
    second_R = first_R
    if size % 2 == 0:
        second_R = 1 - (1 - first_R) * rng.beta(size - lower, 1, RESAMPLES)
    middle_RK = np.minimum(np.stack([first_R, second_R]) * size, size - 1).astype(np.int64)
    return _estimate(float(np.median(values_N)), ordered_N[middle_RK].mean(axis=0))


def _estimate(value: float, drawn_R: FloatArray) -> Estimate:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(drawn_R, [tail, 1 - tail])
    return Estimate(value=value, low=float(low), high=float(high))


def share(events: Sequence[bool]) -> Estimate | None:
    """How many are true, with the Wilson interval: the bootstrap gives none where all or none are."""
    if not events:
        return None
    interval = binomtest(sum(events), len(events)).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(value=sum(events) / len(events), low=float(interval.low), high=float(interval.high))
