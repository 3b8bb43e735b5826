"""What a run learned, to look at: the loss curve as a picture, and one HTML file with the samples.

The HTML file holds its pictures and fetches nothing. A failure is shown as a failure: the true model
stands in its own column and never in place of a prediction.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from cad_mllm.errors import DataError

_STAGE_NAMES = {1: "text", 2: "text + points", 3: "text + points + image"}
_STAGE_TINTS = {1: "#eef2f7", 2: "#e3ecf5", 3: "#d7e5f3"}
_TRAIN_COLOUR = "#1f4e79"
_VALIDATION_COLOURS = ("#c2410c", "#15803d", "#7e22ce", "#111827", "#0f766e", "#be123c", "#4d7c0f")


@dataclass(frozen=True, kw_only=True)
class ReportSample:
    """One held-out input and what became of it."""

    id: str
    caption: str
    modalities: str
    """What the model was given, such as `text+points`."""
    input_view: Path | None
    """Picture of the input: the image, or the point cloud; None if only the caption was given."""
    truth_view: Path | None
    """Picture of the true model."""
    prediction_view: Path | None
    """Picture of the generated solid; None if there is none."""
    prediction_text: str
    """The generated program text, whatever it is."""
    error: str | None
    """Why there is no solid; None if there is one."""
    step: Path | None
    """The STEP file of the generated solid."""

    def __post_init__(self) -> None:
        """A sample has a solid, or a reason why not: never both, never neither."""
        assert (self.error is None) == (self.prediction_view is not None), self.id


@dataclass(frozen=True)
class Metrics:
    """Curves of one run, in the order of the steps."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    stages: list[int] = field(default_factory=list)
    """Stage of each step, 1 to 3."""
    validation: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """Modality mix -> (step, loss)."""


def write_report(
    out_dir: Path, samples: Sequence[ReportSample], loss: Path, summary: Mapping[str, object]
) -> Path:
    """Write `loss.png` and `report.html` into `out_dir`; returns the HTML file.

    `loss` is the metrics JSONL of the training, `summary` a table of facts shown at the top.
    Raises DataError if the metrics hold no training step.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    loss_picture = out_dir / "loss.png"
    plot_loss(loss, loss_picture)
    html = render_page(
        "report.html.j2",
        samples=[_SampleView.of(sample, out_dir) for sample in samples],
        solids=sum(sample.error is None for sample in samples),
        loss_uri=data_uri(loss_picture.read_bytes()),
        summary=summary,
    )
    path = out_dir / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def render_page(template: str, **values: object) -> str:
    """Fill a template of this folder: every value is text, not markup, and none may be missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(values)


def data_uri(png: bytes) -> str:
    """A PNG file as an address that needs no network."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def plot_loss(metrics_jsonl: Path, png: Path) -> None:
    """Draw the training loss, the borders of the stages and the validation losses.

    Raises DataError if the file cannot be read or holds no training step.
    """
    metrics = read_metrics(metrics_jsonl)
    figure, axes = plt.subplots(figsize=(11, 3.8), dpi=130, layout="constrained")
    _mark_stages(axes, metrics)
    marker = "o" if len(metrics.steps) == 1 else None
    axes.plot(
        metrics.steps, metrics.losses, color=_TRAIN_COLOUR, linewidth=1.6, marker=marker, label="training"
    )
    for number, (mix, points) in enumerate(sorted(metrics.validation.items())):
        axes.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=_VALIDATION_COLOURS[number % len(_VALIDATION_COLOURS)],
            marker="o",
            markersize=4.5,
            linewidth=0.9,
            linestyle="--",
            clip_on=False,
            label=f"validation: {mix}",
        )
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("loss per supervised token")
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", color="#d4dae2", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper right")
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png)
    plt.close(figure)


def read_metrics(path: Path) -> Metrics:
    """Read the JSONL that training writes: lines with `loss`, and lines with `val_loss` per modality mix.

    Raises DataError if it is missing, malformed or without a training step.
    """
    metrics = Metrics()
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if record.get("loss") is not None:  # neither a validation nor a skipped step
                    metrics.steps.append(int(record["step"]))
                    metrics.losses.append(float(record["loss"]))
                    metrics.stages.append(int(record["stage"]))
                for mix, value in record.get("val_loss", {}).items():
                    metrics.validation.setdefault(mix, []).append((int(record["step"]), float(value)))
    except OSError as error:
        raise DataError(f"{path}: cannot read the metrics of the training ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: not a metrics file of a training ({error})") from error
    if not metrics.steps:
        raise DataError(f"{path}: holds no training step")
    return metrics


def _mark_stages(axes: Axes, metrics: Metrics) -> None:
    """Tint the span of each stage and name it at the top."""
    borders = [0.0]
    spans = []
    for number, stage in enumerate(metrics.stages):
        if number + 1 == len(metrics.stages) or metrics.stages[number + 1] != stage:
            spans.append((stage, borders[-1], float(metrics.steps[number])))
            borders.append(float(metrics.steps[number]))
    for stage, start, end in spans:
        axes.axvspan(start, end, color=_STAGE_TINTS.get(stage, "#eeeeee"), linewidth=0)
        name = f"stage {stage}: {_STAGE_NAMES.get(stage, '')}"
        axes.text(
            (start + end) / 2,
            1.02,
            name,
            transform=axes.get_xaxis_transform(),
            ha="center",
            fontsize=9,
            color="#44546a",
        )
    for border in borders[1:-1]:
        axes.axvline(border, color="#8aa0b8", linewidth=0.8)
    axes.set_xlim(0, metrics.steps[-1])


@dataclass(frozen=True)
class _SampleView:
    """A sample as the template shows it: pictures as data URIs, the STEP file relative to the report."""

    sample: ReportSample
    input_uri: str | None
    truth_uri: str | None
    prediction_uri: str | None
    step_link: str | None

    @classmethod
    def of(cls, sample: ReportSample, out_dir: Path) -> "_SampleView":
        return cls(
            sample=sample,
            input_uri=_picture_uri(sample.input_view),
            truth_uri=_picture_uri(sample.truth_view),
            prediction_uri=_picture_uri(sample.prediction_view),
            step_link=None if sample.step is None else _link(sample.step, out_dir),
        )


def _picture_uri(picture: Path | None) -> str | None:
    return None if picture is None else data_uri(picture.read_bytes())


def _link(file: Path, out_dir: Path) -> str:
    """Relative to the report, so that the folder can be moved as a whole."""
    resolved, base = file.resolve(), out_dir.resolve()
    return resolved.relative_to(base).as_posix() if resolved.is_relative_to(base) else resolved.as_uri()
