"""Of which loader processes die. A module of its own: they import it, and nothing of a test beside it."""

import os
import signal

from cad_mllm.data.batches import Loaded
from cad_mllm.data.encoder_inputs import EncoderInputs
from cad_mllm.data.files import FloatArray
from cad_mllm.data.loader import _MicroBatches


class DeadlyMicroBatches(_MicroBatches):
    """Whoever makes the micro-batch with sample 2 dies of it."""

    def __getitem__(self, number: int) -> Loaded:
        if any(item.number == 2 for item in self._items[number]):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


class DeadlyInputs(EncoderInputs):
    """Whoever reads the cloud of sample 2 dies of it."""

    def __getitem__(self, number: int) -> FloatArray | str:
        one = self._wanted[number]
        if (one.modality, one.number) == ("points", 2):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)
