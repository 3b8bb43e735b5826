"""The largest batch that a run can meet."""

import pytest

from cad_mllm.config import OptimConfig
from cad_mllm.data.sequence import SequenceSpec
from cad_mllm.train.rehearsal import largest_batch

SPEC = SequenceSpec(
    image_tokens=3, image_size=8, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5),
    point_tokens=2, num_points=5, max_seq_length=25,
)  # fmt: skip


@pytest.mark.parametrize(
    ("optim", "shape", "samples"),
    [
        (OptimConfig(batch_size=3), (3, 25), 3),
        (OptimConfig(batch_size=3, pack_tokens=110), (1, 110), 4),
        (OptimConfig(batch_size=3, pack_tokens=25), (1, 25), 1),
    ],
)
def test_it_has_all_that_fits(optim: OptimConfig, shape: tuple[int, int], samples: int) -> None:
    batch = largest_batch(
        SPEC, optim, modalities=frozenset({"image", "points"}), prompt_tokens=4, text_tokens=20
    )
    assert tuple(batch.tokens_BT.shape) == shape
    assert len(batch.images_NCHW) == len(batch.points_MPC) == samples
    assert batch.num_supervised == 16 * samples
    assert (batch.packed is not None) == (optim.pack_tokens > 0)
