"""A part's random choices, the millimetres behind its grid steps, and what a family hands on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cad_mllm.cad.program import Extrude

LONGEST = 64
"""Longest side of every part, in grid steps."""
STEP_SIZES_MM = (0.5, 1.0, 1.5, 2.0, 2.5)
"""What one grid step may measure."""

_T = TypeVar("_T")


class Draw:
    """The choices of one seed. Words come from a stream of their own: no wording changes a shape."""

    def __init__(self, seed: int) -> None:
        shapes, words = np.random.SeedSequence(seed).spawn(2)
        self._rng, self._words = np.random.default_rng(shapes), np.random.default_rng(words)
        self.step_mm = self.pick(STEP_SIZES_MM)

    def pick(self, options: Sequence[_T]) -> _T:
        """An option, each as often as the others."""
        return options[int(self._rng.integers(len(options)))]

    def weighted(self, options: Sequence[_T], weights: Sequence[float]) -> _T:
        """An option, each as often as its weight says."""
        chances = np.cumsum(weights)
        place = np.searchsorted(chances, self._rng.random() * chances[-1], side="right")
        return options[min(int(place), len(options) - 1)]

    def whole(self, low: int, high: int) -> int:
        """A whole number in [low, high]."""
        return int(self._rng.integers(low, high + 1))

    def even(self, low: int, high: int) -> int:
        """An even number of steps in [low, high] (at least `low` rounded up): its half is on the grid too."""
        return 2 * self.whole((low + 1) // 2, max((low + 1) // 2, high // 2))

    def flip(self, chance: float = 0.5) -> bool:
        """True in `chance` of the cases."""
        return bool(self._rng.random() < chance)

    def shares(self, count: int) -> list[float]:
        """`count` uneven shares of 1."""
        return [float(share) for share in self._rng.dirichlet([0.8] * count)]

    def around(self, value: float, spread: float) -> float:
        """`value` times a log-normal factor of the given spread."""
        return value * float(np.exp(self._rng.normal(0.0, spread)))

    def say(self, options: Sequence[_T]) -> _T:
        """A choice of words."""
        return options[int(self._words.integers(len(options)))]

    def mm(self, steps: float) -> str:
        """`steps` as a length in words: "24 mm", "10.5 mm"."""
        return f"{self._number(steps)} mm"

    def by(self, *steps: float) -> str:
        """Several lengths in words: "64 x 32 x 8 mm"."""
        return " x ".join(self._number(s) for s in steps) + " mm"

    def at(self, *steps: float) -> str:
        """A position in words: "(10, -4.5) mm"."""
        return f"({', '.join(self._number(s) for s in steps)}) mm"

    def _number(self, steps: float) -> str:
        return f"{round(steps * self.step_mm, 2) + 0.0:g}"


@dataclass(frozen=True)
class Part:
    """A part in grid steps with the main axis z, and what there is to say about it."""

    extrudes: tuple[Extrude, ...]
    kind: str
    """Fits behind "a" or "an"."""
    size: str
    """Sentences with the main dimensions."""
    details: tuple[str, ...]
    """Sentences about every feature, with dimensions and positions."""


def with_article(name: str) -> str:
    """ "a U bracket", "an L bracket"."""
    return f"{'an' if name[0] in 'aeioLH' else 'a'} {name}"


def plural(noun: str) -> str:
    """ "holes", "bosses"."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"
