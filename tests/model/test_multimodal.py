"""The loss of a batch, and what trains through it."""

import pytest
import torch

from cad_mllm.model.build import Built, build_model
from cad_mllm.model.multimodal import parameter_groups
from tests.model.conftest import CPU, PROJECTORS, Case, loss_of, shake, tiny_config

CASES = (
    Case(1),
    Case(2, points=True, prompt=15),
    Case(3, image=True, target=11),
    Case(4, image=True, points=True, prompt=3),
)


def test_the_loss_of_a_batch_is_the_sum_of_its_samples_alone(built: Built) -> None:
    with torch.no_grad():
        alone = [loss_of(built, [case]) for case in CASES]
        together = loss_of(built, CASES)
        backwards = loss_of(built, CASES[::-1])
    torch.testing.assert_close(together, sum(alone), atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(backwards, together, atol=1e-3, rtol=1e-5)
    assert together.dtype == torch.float32


def test_the_loss_is_that_of_the_plain_language_model(built: Built) -> None:
    case = Case(1)
    tokens = torch.tensor([case.prompt + case.target])
    with torch.no_grad():
        logits = built.model.lm(input_ids=tokens).logits[0]
    predicting = logits[len(case.prompt) - 1 : -1].log_softmax(-1)
    expected = -sum(predicting[i, token] for i, token in enumerate(case.target))
    torch.testing.assert_close(loss_of(built, [case]).detach(), expected, atol=1e-4, rtol=1e-5)


def test_points_and_image_change_the_loss(built: Built) -> None:
    with torch.no_grad():
        for kind in ("image", "points"):
            first, second = Case(5, **{kind: True}), Case(5, **{kind: True})
            setattr(second, kind, getattr(second, kind).flip(0) * 0.5)
            assert abs(loss_of(built, [first]) - loss_of(built, [second])) > 1e-4


def test_a_sample_without_supervised_tokens_adds_nothing(built: Built) -> None:
    silent = Case(6, points=True, target=0)
    with torch.no_grad():
        assert loss_of(built, [silent]) == 0
        torch.testing.assert_close(
            loss_of(built, [silent, CASES[0]]), loss_of(built, [CASES[0]]), atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("encoders", [False, True], ids=["frozen encoders", "trained encoders"])
@pytest.mark.parametrize("cases", [CASES, CASES[:1], [Case(6, target=0)]], ids=["all", "text only", "silent"])
def test_every_trainable_weight_takes_part_whatever_the_batch_holds(
    cases: list[Case], encoders: bool
) -> None:
    config = tiny_config(use_gradient_checkpointing=True, train_encoders=encoders)
    built = build_model(config, seed=3, device=CPU)
    loss_of(built, cases).backward()
    for name, parameter in built.model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_encoders_that_train_compute_what_frozen_ones_do_and_belong_to_their_projectors() -> None:
    frozen, trained = (
        build_model(tiny_config(train_encoders=wanted), seed=3, device=CPU) for wanted in (False, True)
    )
    assert torch.equal(loss_of(trained, CASES), loss_of(frozen, CASES))
    groups = parameter_groups(trained.model)
    for name in sorted(PROJECTORS):
        group = {parameter for parameter, _ in groups[name]}
        alone = {parameter for parameter, _ in parameter_groups(frozen.model)[name]}
        encoder = {p for p in group if p.startswith(f"{name}.encoder.")}
        assert encoder and {p.replace(".projector.", ".") for p in group - encoder} == alone
    loss_of(trained, CASES).backward()
    kinds = (trained.model.point_projector.encoder, trained.model.image_projector.encoder)
    for parameter in (p for kind in kinds for p in kind.parameters() if p.requires_grad):
        assert parameter.grad is not None and parameter.grad.any()


@pytest.mark.parametrize("encoders", [False, True], ids=["frozen encoders", "trained encoders"])
def test_a_dummy_feature_has_no_influence(encoders: bool) -> None:
    built = build_model(tiny_config(train_encoders=encoders), seed=3, device=CPU)
    loss_of(built, CASES[:2]).backward()  # no image in it
    image = [p for p in built.model.image_projector.parameters() if p.requires_grad]
    assert all(p.grad is not None and not p.grad.any() for p in image)
    assert all(p.grad is not None for p in built.model.point_projector.parameters())
    assert any(p.grad.any() for p in built.model.point_projector.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", sorted(PROJECTORS))
def test_a_projector_that_does_not_train_gets_no_gradient_but_feeds_the_model(name: str) -> None:
    built = build_model(tiny_config(), seed=3, device=CPU)
    shake(built.model)
    trained = loss_of(built, CASES)
    loss = loss_of(built, CASES, trainable=PROJECTORS - {name})
    assert loss == trained
    loss.backward()
    frozen = list(built.model.get_submodule(name).parameters())
    other = next(iter(PROJECTORS - {name}))
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in built.model.get_submodule(other).parameters())


def test_gradient_checkpointing_and_full_training_give_the_same_loss(built: Built) -> None:
    losses, gradients = [], []
    for checkpointing in (False, True):
        full = build_model(
            tiny_config(use_lora=False, use_gradient_checkpointing=checkpointing), seed=3, device=CPU
        )
        loss = loss_of(full, CASES)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in full.model.parameters()])
    assert torch.equal(*losses)
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, atol=1e-6, rtol=1e-5)


def test_bfloat16_is_close_to_float32() -> None:
    exact, rounded = (build_model(tiny_config(dtype=d), seed=3, device=CPU) for d in ("float32", "bfloat16"))
    with torch.no_grad():
        torch.testing.assert_close(loss_of(rounded, CASES), loss_of(exact, CASES), atol=0, rtol=1e-2)
    assert {p.dtype for p in rounded.model.parameters()} == {torch.bfloat16}


def test_parameter_groups_hold_each_trainable_weight_once(built: Built) -> None:
    groups = parameter_groups(built.model)
    assert list(groups) == ["lm", "point_projector", "image_projector"]
    named = [name for group in groups.values() for name, _ in group]
    assert sorted(named) == sorted(n for n, p in built.model.named_parameters() if p.requires_grad)
    assert all("lora_" in name for name, _ in groups["lm"])
    assert all(name.startswith("image_projector.") for name, _ in groups["image_projector"])
