"""Which ranks read each other's memory, and rows of a table that lies on several of them."""

from types import SimpleNamespace
from typing import Any

import torch

from cad_mllm.train.distributed import World
from cad_mllm.train.peer_memory import map_peer_memory, rows_of


def world(device: str = "cpu", size: int = 1, local_size: int = 1) -> World:
    return World(
        rank=0, size=size, local_rank=0, local_size=local_size, device=torch.device(device), control=None
    )


def test_rows_come_from_the_ranks_that_have_them() -> None:
    table_VD = torch.arange(24.0, dtype=torch.bfloat16).view(12, 2)
    numbers = torch.tensor([[0, 11, 4], [3, 4, 8]])
    found = rows_of(list(table_VD.chunk(3)), numbers)
    assert torch.equal(found, table_VD[numbers]) and found.dtype == torch.bfloat16


def test_without_gpus_or_without_frozen_weights_there_is_nothing_to_read() -> None:
    parameter: Any = SimpleNamespace(ds_tensor=torch.ones(3))
    assert map_peer_memory([[parameter]], world()) is None
    assert map_peer_memory([], world()) is None
