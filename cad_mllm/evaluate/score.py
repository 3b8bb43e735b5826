"""The figures of one prediction, computed in a worker process."""

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from cad_mllm.cad.mesh import Mesh
from cad_mllm.cad.metrics import (
    num_components,
    segment_error,
    soundness,
    surface_distance,
    unit_box,
    volumetric_iou,
)
from cad_mllm.cad.program_metrics import commands, compare, fingerprint
from cad_mllm.cad.shapefile import Shape, read_shape
from cad_mllm.data.order import stable_hash
from cad_mllm.errors import CadError


class Outcome(Enum):
    """What became of an id."""

    SCORED = "scored"
    INVALID = "invalid"
    """There is a prediction, but no solid or mesh comes out of it."""
    MISSING = "missing"
    """There is a truth, but no prediction."""
    UNUSABLE_TRUTH = "unusable truth"
    """The truth itself cannot be built or read: says nothing about the prediction."""
    EXTRA = "extra"
    """There is a prediction, but no truth."""


COUNTED = (Outcome.SCORED, Outcome.INVALID, Outcome.MISSING)
"""Outcomes that say something about the predictions: these make up 100 %."""


@dataclass(frozen=True)
class Pair:
    """One id, and its files."""

    id: str
    true: Path | bytes
    """A file, or the Omni-CAD JSON of a sharded data set."""
    predicted: Path | None


@dataclass(frozen=True)
class Sample:
    """One id, and what became of it."""

    id: str
    outcome: Outcome
    reason: str = ""
    """Why there are no figures."""
    figures: dict[str, float | None] | None = None
    """Name of a metric -> its value, None where it is not defined; of scored samples alone."""
    notes: str = ""
    """Why a figure is not defined."""
    fingerprint: str | None = None
    """Of the predicted program, if it is one."""


def score(pair: Pair) -> Sample:
    """Read both files and compare them. Gives an outcome for whatever is in them."""
    seed = stable_hash(pair.id) % 2**31
    try:
        truth = read_shape(pair.true)
        true_box = _in_unit_box(truth)
        floor = surface_distance(true_box, true_box, seed=seed)
    except CadError as error:
        return Sample(pair.id, Outcome.UNUSABLE_TRUTH, str(error))
    if pair.predicted is None:
        return Sample(pair.id, Outcome.MISSING, "no prediction with this id")
    try:
        prediction = read_shape(pair.predicted)
        predicted_box = _in_unit_box(prediction)
        distance = surface_distance(predicted_box, true_box, seed=seed)
    except CadError as error:
        return Sample(pair.id, Outcome.INVALID, str(error))
    notes = ""
    iou: float | None = None
    try:
        iou = volumetric_iou(predicted_box, true_box)
    except CadError as error:
        notes = str(error)
    sound = soundness(prediction.mesh)
    relative, absolute = segment_error(sound.components, num_components(truth.mesh))
    figures: dict[str, float | None] = {
        "chamfer_squared": distance.chamfer_squared,
        "chamfer_squared_floor": floor.chamfer_squared,
        "chamfer": distance.chamfer,
        "chamfer_floor": floor.chamfer,
        "f_score": distance.f_score,
        "normal_consistency": distance.normal_consistency,
        "iou": iou,
        "segment_error_relative": relative,
        "segment_error": absolute,
        "dangling_edge_length": sound.dangling_edge_length,
        "self_intersection_ratio": sound.self_intersection_ratio,
        "flux_enclosure_error": sound.flux_enclosure_error,
        **_program_figures(prediction, truth),
    }
    print_of = None if prediction.text is None else fingerprint(prediction.text)
    return Sample(pair.id, Outcome.SCORED, figures=figures, notes=notes, fingerprint=print_of)


def _in_unit_box(shape: Shape) -> Mesh:
    mesh = unit_box(shape.mesh)
    if not mesh.area > 0:
        raise CadError("the mesh has no area")
    return mesh


def _program_figures(prediction: Shape, truth: Shape) -> dict[str, float | None]:
    """Those that need programs; None where one of the two is none."""
    match = None
    if prediction.text is not None and truth.text is not None:
        match = compare(prediction.text, truth.text)
    return {
        "command_accuracy": None if match is None else match.command_accuracy,
        "parameter_accuracy": None if match is None else match.parameter_accuracy,
        "commands": None if prediction.text is None else len(commands(prediction.text)),
        "characters": None if prediction.text is None else len(prediction.text),
    }
