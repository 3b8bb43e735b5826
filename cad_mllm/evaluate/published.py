"""Figures that others published, to stand beside ours. As printed; what is known of their conventions, said.

Sources: CAD-MLLM, arXiv 2411.04954 (points and images of Omni-CAD); the others on the test set of DeepCAD, as
their papers give them.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Row:
    """One system, figures as text; empty where none was published."""

    system: str
    data: str
    cd: str = ""
    cd_squared: str = ""
    """Times 1000: mean, median."""
    f_score: str = ""
    normal_consistency: str = ""
    iou: str = ""
    segment_error: str = ""
    dangling: str = ""
    sir: str = ""
    flux: str = ""
    invalid: str = ""


def _paper(system: str, figures: str) -> Row:
    cd, f_score, consistency, segment, dangling, sir, flux = figures.split()
    return Row(
        system=system,
        data="Omni-CAD",
        cd=cd,
        f_score=f_score,
        normal_consistency=consistency,
        segment_error=segment,
        dangling=dangling,
        sir=sir,
        flux=flux,
    )


PUBLISHED = (
    _paper("CAD-MLLM, trained on points alone", "1.85 90.88 79.71 1.66 .46 1.31 .044"),
    _paper("CAD-MLLM, all modalities, points given", "2.63 85.17 73.64 1.53 .47 1.32 .035"),
    _paper("CAD-MLLM, all modalities, image given", "3.22 80.82 62.07 1.56 .51 1.36 .050"),
    _paper("DeepCAD, points given (in that paper)", "4.51 71.83 63.68 8.98 1.26 5.73 .347"),
    Row(system="CAD-Recode, points", data="DeepCAD", iou="92.0", invalid=".4"),
    Row(system="cadrille after RL, points", data="DeepCAD", iou="90.2", invalid="< .2"),
    Row(system="cadrille after RL, images", data="DeepCAD", iou="92.2", invalid="< .2"),
    Row(system="CADmium-14B, text", data="DeepCAD", cd_squared="median .23", invalid="3.3"),
)

CONVENTIONS = (
    "Ours: CD not squared, the mean of both directions, times 100; and squared, the sum of both, times 1000. "
    "F-score at .05. Every shape is scaled by itself into [-.5, .5]^3. Means over the predictions that work.",
    "CAD-MLLM: CD, F-score at .05, FluxEE times 100, SIR in percent. What we have of the paper does not say "
    "whether its CD is squared, nor times what; its official script leaves failed files out of all averages.",
    "SegE: ours is |S^ - S| / S, the paper's formula; its official script computes |S^ - S|.",
    "Papers differ in squaring, factor, number of points, data and test split: compare orders, not digits.",
)

ROBUSTNESS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "noise": ((0.0, 2.88), (0.01, 3.12), (0.02, 4.14), (0.03, 4.91), (0.05, 5.50)),
    "dropped": ((0.0, 2.88), (0.2, 2.75), (0.5, 2.82), (0.8, 2.99), (0.95, 3.68), (0.99, 5.86)),
}
"""CD of CAD-MLLM (points given) over the noise, and over the share of points dropped."""
