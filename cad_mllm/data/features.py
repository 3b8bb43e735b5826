"""Features of pictures and clouds that frozen encoders have computed once, read in their place.

A file each, in a folder whose name stands for all that they follow from: the encoder's weights, the sizes of
its input, the data, the points that are drawn. Whatever was computed otherwise lies elsewhere.

Shapes: K tokens of D channels.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from cad_mllm.data import order
from cad_mllm.data.atomic import atomic_path
from cad_mllm.data.files import UnusableFileError
from cad_mllm.data.index import Index
from cad_mllm.data.sequence import MODALITIES, Mix, Modality

DRAWN_ONCE = (0, 0)
"""Stage and epoch by which the points of a cloud are drawn, whenever it is asked for: those of validation."""
_NAME = "features"


class Wanted(NamedTuple):
    """A picture or a cloud of a sample."""

    modality: Modality
    number: int
    """Of the sample in its index."""
    view: int = 0


@dataclass(frozen=True, kw_only=True)
class FeatureFolder:
    """Where the features of one split are. Picklable."""

    folders: Mapping[Modality, Path]

    @classmethod
    def of(cls, root: Path, index: Index, made_by: Mapping[Modality, object]) -> "FeatureFolder":
        """Below `root`. `made_by`: what the features of a modality follow from, beside the data; as JSON."""
        folders: dict[Modality, Path] = {}
        for modality, facts in made_by.items():
            text = json.dumps([facts, index.fingerprint], sort_keys=True)
            folders[modality] = root / f"{modality}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return cls(folders=folders)

    def file(self, modality: Modality, sample_id: str, view: int = 0) -> Path:
        """The file of a picture or a cloud, whether it is there or not."""
        return self.folders[modality] / f"{sample_id}-{view}.safetensors"

    def load(
        self, modality: Modality, sample_id: str, original: Callable[[], object], view: int = 0
    ) -> Tensor:
        """(K, D).

        Raises:
            UnusableFileError: it is not there, because `original` cannot be read either, or it is damaged.
        """
        path = self.file(modality, sample_id, view)
        try:
            return load_file(path)[_NAME]
        except (OSError, SafetensorError, KeyError) as error:
            original()
            raise UnusableFileError(
                path, f"no features ({error}): delete the file if it is there, and start again"
            ) from error

    def save(self, features_KD: Tensor, modality: Modality, sample_id: str, view: int = 0) -> None:
        """Whole or not at all; one writer a file. OSError: the disk is full."""
        path = self.file(modality, sample_id, view)
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(serialized({_NAME: features_KD.contiguous()}))


def wanted_in_epoch(index: Index, seed: int, stage: int, mix: Mix, epoch: int) -> Iterator[Wanted]:
    """All that an epoch of a stage of training feeds."""
    combos, drawn = order.draw_combos(seed, stage, epoch, index.ids, mix)
    fed = [MODALITIES[combo] for combo in combos]
    for number, which in enumerate(drawn.tolist()):
        yield from _wanted(index, number, fed[which], seed, stage, epoch)


def wanted_by_validation(index: Index, numbers: Iterable[int], seed: int) -> Iterator[Wanted]:
    """All that these samples can be given with."""
    for number in numbers:
        yield from _wanted(index, number, index.needs, seed, *DRAWN_ONCE)


def _wanted(
    index: Index, number: int, fed: frozenset[Modality], seed: int, stage: int, epoch: int
) -> Iterator[Wanted]:
    if "image" in fed:
        view = order.draw_view(seed, stage, epoch, index.ids[number], index.num_views(number))
        yield Wanted("image", number, view)
    if "points" in fed:
        yield Wanted("points", number)
