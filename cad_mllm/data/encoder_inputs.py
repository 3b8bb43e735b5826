"""Pictures and clouds one by one, as frozen encoders take them: for features that are computed ahead."""

from collections.abc import Sequence

from cad_mllm.data.batches import read_image, read_points
from cad_mllm.data.collate import normalise_images
from cad_mllm.data.features import DRAWN_ONCE, Wanted
from cad_mllm.data.files import FloatArray, UnusableFileError
from cad_mllm.data.index import Index
from cad_mllm.data.sequence import SequenceSpec


class EncoderInputs:
    """What the encoders take of each, or why it cannot be read: its sample is lost at its turn.

    Map-style. Picklable.
    """

    def __init__(self, index: Index, spec: SequenceSpec, seed: int, wanted: Sequence[Wanted]) -> None:
        self._index = index
        self._spec = spec
        self._seed = seed
        self._wanted = wanted

    def __len__(self) -> int:
        return len(self._wanted)

    def __getitem__(self, number: int) -> FloatArray | str:
        """A picture (3, H, W), or the points (P, 6) of a cloud that are drawn once and for all."""
        one = self._wanted[number]
        index, spec = self._index, self._spec
        sample_id, row = index.ids[one.number], index.row(one.number)
        try:
            if one.modality == "image":
                return normalise_images(read_image(index, sample_id, row, one.view, spec), spec)
            return read_points(index, sample_id, row, (self._seed, *DRAWN_ONCE, sample_id), spec)
        except UnusableFileError as error:
            return str(error)

    def without(self, number: int, reason: str) -> FloatArray | str:
        """As of a file that cannot be read."""
        one = self._wanted[number]
        return f"{one.modality} of {self._index.ids[one.number]}: {reason}"
