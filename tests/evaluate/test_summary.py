"""Figures of a model from those of its samples: nothing is dropped, everything says what it covers."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from cad_mllm.evaluate.score import Outcome, Sample
from cad_mllm.evaluate.summary import METRICS, Training, mean_of, median_of, share, summarise


def scored(name: str, value: float, fingerprint: str | None = None, **figures: float | None) -> Sample:
    values: dict[str, float | None] = {metric.name: value for metric in METRICS}
    return Sample(name, Outcome.SCORED, figures={**values, **figures}, fingerprint=fingerprint)


SAMPLES = [
    scored("a", 0.2, "p"),
    scored("b", 0.4, "q", iou=None),
    Sample("c", Outcome.INVALID, "it leaks"),
    Sample("d", Outcome.MISSING, "none"),
    Sample("e", Outcome.UNUSABLE_TRUTH, "the truth leaks"),
    Sample("f", Outcome.EXTRA, "no truth"),
]


def test_failures_of_the_model_count_and_those_of_the_data_do_not() -> None:
    summary = summarise(SAMPLES)
    assert summary.counts == {"scored": 2, "invalid": 1, "missing": 1, "unusable truth": 1, "extra": 1}
    assert summary.invalidity is not None
    assert summary.invalidity.value == 0.5
    assert summary.lines["f_score"].of == 4


def test_a_mean_says_what_it_covers_and_stands_beside_the_one_with_failures_as_the_worst() -> None:
    lines = summarise(SAMPLES).lines
    f_score, iou, sir = lines["f_score"], lines["iou"], lines["self_intersection_ratio"]
    assert f_score.mean is not None and iou.mean is not None
    assert (f_score.covers, f_score.mean.value) == (2, pytest.approx(0.3))
    assert (f_score.mean_with_failures, f_score.median_with_failures) == (
        pytest.approx(0.15),
        pytest.approx(0.1),
    )
    assert (iou.covers, iou.mean.value, iou.mean_with_failures) == (1, 0.2, pytest.approx(0.05))
    assert sir.mean_with_failures == pytest.approx((0.2 + 0.4 + 1 + 1) / 4)


def test_a_distance_has_no_worst_value_but_a_median_with_failures() -> None:
    three = [scored(name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", 3.0))]
    line = summarise([*three, SAMPLES[2], SAMPLES[3]]).lines["chamfer"]
    assert (line.mean_with_failures, line.median_with_failures) == (None, 3.0)
    assert summarise([*three[:1], SAMPLES[2]]).lines["chamfer"].median_with_failures is None
    assert summarise(three).lines["dangling_edge_length"].mean_with_failures is None


def test_nothing_at_all_has_no_figures() -> None:
    for samples in ([], SAMPLES[4:]):
        summary = summarise(samples)
        assert summary.invalidity is None
        assert summary.lines["chamfer"].mean is None
        assert summary.lines["f_score"].mean_with_failures is None
    only_failures = summarise(SAMPLES[2:4]).lines["f_score"]
    assert (only_failures.mean, only_failures.mean_with_failures) == (None, 0.0)


def test_new_is_what_the_training_set_does_not_hold() -> None:
    samples = [scored(str(i), 1.0, fingerprint) for i, fingerprint in enumerate(("p", "q", "q", None))]
    training = Training(programs=1, models=1, unusable=0)
    summary = summarise(samples, training=training, known=frozenset({"p"}))
    assert summary.novel is not None
    assert summary.novel.value == pytest.approx(2 / 3)
    assert summary.unique == pytest.approx(2 / 3)
    assert summarise(samples).novel is None


def test_each_set_of_modalities_has_figures_of_its_own() -> None:
    modalities = {sample.id: "text" if sample.id in "ac" else "text+points" for sample in SAMPLES}
    by_modality = summarise(SAMPLES, modalities=modalities).by_modality
    assert list(by_modality) == ["text", "text+points"]
    assert by_modality["text"].lines["f_score"].of == 2
    assert by_modality["text"].by_modality == {}
    assert summarise(SAMPLES, modalities=dict.fromkeys("abcdef", "text")).by_modality == {}


def test_the_summary_is_plain_json() -> None:
    text = json.dumps(summarise(SAMPLES).as_json(), allow_nan=False)
    assert json.loads(text)["lines"]["chamfer"]["mean"]["value"] == pytest.approx(0.3)


# --- intervals ----------------------------------------------------------------------------------------------


def test_an_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    """Of 300 sets of 40 values: 95 % nominal; the percentile bootstrap of so few covers a little less."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        found = mean_of(rng.exponential(size=40))
        assert found is not None
        held += found.low <= 1.0 <= found.high
    assert 0.88 < held / 300 < 0.98


def test_an_interval_is_always_the_same_and_shrinks_with_the_number() -> None:
    values = np.random.default_rng(0).normal(size=400)
    few, many, again = (median_of(values[:n]) for n in (25, 400, 400))
    assert few is not None and many is not None
    assert many == again
    assert many.high - many.low < (few.high - few.low) / 2
    assert many.low <= many.value <= many.high


@pytest.mark.parametrize("size", [1, 2, 9, 10, 400])
def test_the_interval_of_a_median_is_that_of_resampled_medians(size: int) -> None:
    rng = np.random.default_rng(size)
    values = rng.exponential(size=size)
    medians = np.median(values[rng.integers(size, size=(20_000, size))], axis=1)
    found = median_of(values)
    assert found is not None
    assert found.value == np.median(values)
    ranks = [np.mean(medians <= found.low), np.mean(medians < found.high)]
    assert ranks[0] >= 0.025 - 0.015 and np.mean(medians < found.low) <= 0.025 + 0.015
    assert ranks[1] <= 0.975 + 0.015 and np.mean(medians <= found.high) >= 0.975 - 0.015


@pytest.mark.parametrize(
    ("events", "low", "high"),
    # Wilson: centre (p + z^2 / 2n) / (1 + z^2 / n), z = 1.96
    [([False] * 100, 0.0, 0.037), ([True] * 100, 0.963, 1.0), ([True, False], 0.0945, 0.9055)],
)
def test_a_share_of_none_is_not_known_to_be_none(events: Sequence[bool], low: float, high: float) -> None:
    found = share(events)
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-4), pytest.approx(high, abs=5e-4))
