"""Samples that could not be read while the run was under way: listed, counted, and too many end it."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cad_mllm.data.batches import Lost
from cad_mllm.data.index import SKIPPED_FILE
from cad_mllm.data.layout import Split
from cad_mllm.errors import DataError
from cad_mllm.train.distributed import World


@dataclass(kw_only=True)
class LostSamples:
    """What the ranks lost, known to all of them alike."""

    world: World
    output_dir: Path
    num_samples: int
    """Of the training split."""
    max_fraction: float
    """Of these, so many may be lost."""
    say: Callable[[str], None]
    _ids: set[str] = field(default_factory=set)

    def note(self, lost: Sequence[Lost], split: Split) -> int:
        """Take note of what this rank lost (every rank calls this); supervised tokens lost on all ranks.

        Raises:
            DataError: more samples than allowed are lost by now, on all ranks alike.
        """
        tokens, count = self.world.sum(float(sum(one.num_target_tokens for one in lost)), float(len(lost)))
        if not count:
            return 0
        everyone = (one for of_rank in self.world.gather(tuple(lost)) for one in of_rank)
        for one in everyone:
            if one.id not in self._ids:
                self._ids.add(one.id)
                self._tell(one, split)
        if len(self._ids) > self.max_fraction * self.num_samples:
            raise DataError(
                f"{len(self._ids)} of {self.num_samples} samples became unreadable while training: all in "
                f"{self.output_dir / SKIPPED_FILE}. Check the volume, or allow more with "
                f"--max_skipped_fraction (now {self.max_fraction:g}); go on with --resume_from_ckpt auto."
            )
        return int(tokens)

    def _tell(self, one: Lost, split: Split) -> None:
        self.say(f"WARNING: {one.id} is set aside from now on: {one.file}: {one.reason}")
        if self.world.is_main:
            line = {"split": split, "id": one.id, "file": one.file, "reason": one.reason}
            with (self.output_dir / SKIPPED_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
