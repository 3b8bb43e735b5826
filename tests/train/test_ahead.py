"""Micro-batches that are copied to the device while the one before them computes."""

from collections.abc import Iterator

import pytest
import torch

from cad_mllm.data.collate import Batch, Sample, collate
from cad_mllm.data.sequence import SequenceSpec
from cad_mllm.train.ahead import CopiedAhead

SPEC = SequenceSpec(
    image_tokens=4, image_size=8, image_mean=(0.5,) * 3, image_std=(0.5,) * 3,  # type: ignore[arg-type]
    point_tokens=5, num_points=6, max_seq_length=64,
)  # fmt: skip


def batch(number: int, length: int = 4) -> Batch:
    sample = Sample(id=str(number), combo="text", bos=[], prompt=[number] * length, target=[number])
    return collate([sample], SPEC, 0)


def test_on_a_cpu_they_are_the_same_objects_and_none_is_fetched_before_its_turn() -> None:
    given = [batch(number) for number in range(3)]
    fetched = 0

    def source() -> Iterator[Batch]:
        nonlocal fetched
        for one in given:
            fetched += 1
            yield one

    for number, one in enumerate(CopiedAhead(source(), torch.device("cpu"))):
        assert one is given[number]
        assert fetched == number + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_they_arrive_whole_and_in_order_while_the_device_is_busy() -> None:
    given = [batch(number, length=60).pin_memory() for number in range(1, 20)]
    work = torch.randn(4096, 4096, device="cuda")
    sums = []
    for one in CopiedAhead(given, torch.device("cuda")):
        for _ in range(5):
            work = work @ work / 64
        sums.append(one.tokens_BT.sum())  # read after the work, when the next copy has long begun
        del one
    assert [int(s) for s in sums] == [int(one.tokens_BT.sum()) for one in given]


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")])],
)  # fmt: skip
def test_of_no_batches_there_are_none(device: str) -> None:
    assert list(CopiedAhead([], torch.device(device))) == []
