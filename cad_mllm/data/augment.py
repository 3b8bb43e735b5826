"""More samples from the same models, drawn by the sampler: parts of programs, and inputs without a caption.

The paper enlarges its data with truncated programs and with programs that lack a feature, as models of their
own with points, views and captions. Here the inputs stay those of the whole part, and a line of the prompt
says which part of the program is asked for, so that inputs and target agree:

- prefix: the first k of n features, 1 <= k < n; the prompt ends with "Only the first k features."
- removal: all features but the j-th; "Without feature j." The first feature always stays (it is New, and the
  place from which the rest is read), and so does one on which another depends: one whose box is touched by
  the box of a later feature that is not New.

Both are valid programs that begin with New, written in the frame of the whole part: the text of a feature
does not depend on the others. A variant that would not make the sequence shorter (a note longer than what it
leaves out) is not drawn, so that whatever fits as a whole fits in every variant.

Whoever has a scan has no words for it: a sample that is given points or an image can lose its caption, and
its prompt is then the one that generation makes of points or an image alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cad_mllm.cad import codec
from cad_mllm.cad.geometry import Box, extrude_box
from cad_mllm.cad.program import Operation
from cad_mllm.data.order import stable_hash

SEPARATOR = ";"
"""Between the features of a command text."""

_CONTACT = 0.02
"""Boxes nearer than this touch: more than two steps of the 8-bit grid over [-1, 1]."""


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How often a sample is given as a part of itself, or without its caption."""

    prefix: float = 0.0
    """Probability of a prefix."""
    removal: float = 0.0
    """Probability of leaving a feature out; with `prefix` at most 1."""
    caption_dropout: float = 0.0
    """Probability that a sample with points or an image has no caption."""

    @property
    def parts(self) -> bool:
        """Whether parts of programs are drawn at all."""
        return self.prefix > 0 or self.removal > 0


WHOLE = Augmentation()
"""Every sample as it is."""


@dataclass(frozen=True)
class Variant:
    """Which part of a program is the target."""

    kind: Literal["prefix", "removal"]
    feature: int
    """Prefix: how many features stay. Removal: the one that goes, counted from 1."""

    @property
    def note(self) -> str:
        """The line of the prompt that asks for it."""
        if self.kind == "prefix":
            return f"Only the first {self.feature} features.\n"
        return f"Without feature {self.feature}.\n"


def split_features(text: str) -> list[str]:
    """The features of a command text; each but the first begins with the separator."""
    first, *others = text.split(SEPARATOR)
    return [first, *(SEPARATOR + feature for feature in others)]


def removable_features(text: str, bits: int) -> list[bool]:
    """For each feature of a command text, whether it may be left out."""
    extrudes = codec.decode(text, bits).extrudes
    boxes = [extrude_box(extrude) for extrude in extrudes]
    found = []
    for number, box in enumerate(boxes):
        depend = (
            _touch(box, later)
            for extrude, later in zip(extrudes[number + 1 :], boxes[number + 1 :], strict=True)
            if extrude.operation is not Operation.NEW
        )
        found.append(number > 0 and not any(depend))
    return found


def _touch(one: Box, other: Box) -> bool:
    (low, high), (other_low, other_high) = one, other
    return all(
        low[axis] <= other_high[axis] + _CONTACT and other_low[axis] <= high[axis] + _CONTACT
        for axis in range(3)
    )


def draw_variant(
    augmentation: Augmentation,
    draw: tuple[int, int, int, str],
    num_features: int,
    removable: Sequence[int],
) -> Variant | None:
    """What a sample is given as, by (seed, stage, epoch, sample id); None: as a whole.

    `removable` holds the numbers, from 1, of the features that may go. A model of one feature has no parts.
    """
    uniform = stable_hash("augment", *draw) / 2**64
    pick = stable_hash("augmented feature", *draw)
    if uniform < augmentation.prefix:
        return Variant("prefix", 1 + pick % (num_features - 1)) if num_features > 1 else None
    if uniform < augmentation.prefix + augmentation.removal:
        return Variant("removal", removable[pick % len(removable)]) if removable else None
    return None
