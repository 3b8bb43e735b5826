"""The chunked loss of a linear head is the plain cross-entropy of its logits."""

import pytest
import torch
from torch import Tensor, nn

from cad_mllm.model import loss as module
from cad_mllm.model.loss import IGNORED_LABEL, LinearCrossEntropy

S, D, V = 37, 16, 50


def problem(dtype: torch.dtype, *, bias: bool) -> tuple[nn.Linear, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    head = nn.Linear(D, V, bias=bias, dtype=dtype)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    hidden_SD = torch.randn(S, D, generator=generator).to(dtype).requires_grad_()
    targets_S = torch.randint(0, V, (S,), generator=generator)
    targets_S[::5] = IGNORED_LABEL
    return head, hidden_SD, targets_S


def plain(head: nn.Linear, hidden_SD: Tensor, targets_S: Tensor) -> Tensor:
    logits_SV = head(hidden_SD).float()
    return nn.functional.cross_entropy(logits_SV, targets_S, ignore_index=IGNORED_LABEL, reduction="sum")


@pytest.fixture(params=[1, 7, 1000], ids=["a row", "some rows", "all rows"])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", request.param * V)


@pytest.mark.usefixtures("chunks")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_and_gradients_are_those_of_the_plain_cross_entropy(dtype: torch.dtype, bias: bool) -> None:
    head, hidden_SD, targets_S = problem(dtype, bias=bias)
    inputs = [hidden_SD, *head.parameters()]
    expected = plain(head, hidden_SD, targets_S)
    loss = LinearCrossEntropy(head)(hidden_SD, targets_S)
    assert loss.dtype == torch.float32
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 5e-2, "rtol": 2e-2}
    torch.testing.assert_close(loss, expected, **tolerance)
    ours, theirs = (torch.autograd.grad(value * 0.25, inputs) for value in (loss, expected))
    for one, other, of in zip(ours, theirs, inputs, strict=True):
        assert one.dtype == of.dtype
        torch.testing.assert_close(one, other, **tolerance)


def test_a_frozen_head_gets_no_gradient_and_passes_it_on() -> None:
    head, hidden_SD, targets_S = problem(torch.float32, bias=True)
    head.requires_grad_(False)
    LinearCrossEntropy(head)(hidden_SD, targets_S).backward()
    assert hidden_SD.grad is not None and hidden_SD.grad.any()
    assert not hidden_SD.grad[::5].any()
    assert all(parameter.grad is None for parameter in head.parameters())


def test_without_gradients_none_are_computed() -> None:
    head, hidden_SD, targets_S = problem(torch.float32, bias=False)
    with torch.no_grad():
        loss = LinearCrossEntropy(head)(hidden_SD, targets_S)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, plain(head, hidden_SD, targets_S).detach())


def test_nothing_supervised_costs_nothing() -> None:
    head, hidden_SD, _ = problem(torch.float32, bias=False)
    loss = LinearCrossEntropy(head)(hidden_SD, torch.full((S,), IGNORED_LABEL))
    loss.backward()
    assert loss == 0 and hidden_SD.grad is not None and not hidden_SD.grad.any()


def test_a_loss_that_is_not_a_number_makes_gradients_that_are_none() -> None:
    head, hidden_SD, targets_S = problem(torch.float32, bias=False)
    (LinearCrossEntropy(head)(hidden_SD, targets_S) * torch.nan).backward()
    assert hidden_SD.grad is not None and hidden_SD.grad.isnan().any()


def test_the_head_keeps_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    head, _, _ = problem(torch.float32, bias=False)
    assert LinearCrossEntropy(head).weight is head.weight


def test_the_logits_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOGITS_AT_ONCE", 4 * V)
    head, hidden_SD, targets_S = problem(torch.float32, bias=False)
    largest = 0
    chunk_loss = module._chunk

    def watched(hidden_CD: Tensor, *rest: object) -> Tensor:
        nonlocal largest
        largest = max(largest, len(hidden_CD))
        return chunk_loss(hidden_CD, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_chunk", watched)
    LinearCrossEntropy(head)(hidden_SD, targets_S)
    assert largest == 4
