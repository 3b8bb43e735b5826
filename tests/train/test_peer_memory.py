"""Which ranks read each other's memory, and rows of a table that lies on several of them."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cad_mllm.train import peer_memory
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


class Ranks:
    """Two of them, with GPUs; what the other one says differs from this one's as told."""

    rank, size, is_main, device = 0, 2, True, torch.device("cuda", 0)

    def __init__(self, others: dict[int, Any]) -> None:
        self._others, self._asked = others, 0

    def gather(self, own: Any) -> list[Any]:
        self._asked += 1
        return [own, self._others.get(self._asked, own)]


@pytest.mark.parametrize(
    ("others", "environment", "reaches", "mapped"),
    [
        ({}, {}, True, True),
        ({}, {"NCCL_P2P_DISABLE": "1"}, True, False),
        ({}, {"NCCL_P2P_LEVEL": "LOC"}, True, False),
        ({}, {}, False, False),
        ({1: (False, "here")}, {}, True, False),
        ({1: (True, "there")}, {}, True, False),
        ({2: "no such handle"}, {}, True, False),
    ],
    ids=["all can", "P2P off", "P2P within a board", "too far", "the other cannot", "two hosts", "refused"],
)
def test_memory_is_read_where_all_ranks_of_one_host_can_and_may(
    others: dict[int, Any], environment: dict[str, str], reaches: bool, mapped: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    for name in ("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(peer_memory.socket, "gethostname", lambda: "here")
    monkeypatch.setattr(peer_memory, "reaches_peers", lambda world: reaches)
    monkeypatch.setattr(peer_memory, "PeerMemory", lambda lists, world: "memory")
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    ranks: Any = Ranks(others)
    parameter: Any = SimpleNamespace(ds_tensor=SimpleNamespace(device=ranks.device))
    assert map_peer_memory([[parameter]], ranks) == ("memory" if mapped else None)
    assert ("no such handle" in caplog.text) == (others.get(2) is not None)


def test_what_torch_refuses_is_said_and_left_to_nccl(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(lists: object, world: object) -> None:
        raise RuntimeError("CUDA driver error: not permitted\nstack")

    monkeypatch.setattr(peer_memory, "reaches_peers", lambda world: True)
    monkeypatch.setattr(peer_memory, "PeerMemory", refuse)
    monkeypatch.setattr(logging.getLogger("DeepSpeed"), "propagate", True)
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    ranks: Any = Ranks({})
    parameter: Any = SimpleNamespace(ds_tensor=SimpleNamespace(device=ranks.device))
    assert map_peer_memory([[parameter]], ranks) is None
    assert "CUDA driver error: not permitted" in caplog.text and "stack" not in caplog.text
