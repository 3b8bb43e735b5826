"""The curriculum of the paper, and how fast each group of weights moves in it."""

from itertools import pairwise

import pytest

from cad_mllm.config import CurriculumConfig, OptimConfig
from cad_mllm.data.sequence import needed_modalities
from cad_mllm.errors import ConfigError
from cad_mllm.train.stages import IMAGE_PROJECTOR, LM, POINT_PROJECTOR, entering, learning_rates, plan


def test_three_stages_each_with_one_more_modality() -> None:
    stages = plan(CurriculumConfig())
    assert [needed_modalities([stage.mix]) for stage in stages] == [set(), {"points"}, {"points", "image"}]
    assert all(sum(stage.mix.values()) == pytest.approx(1.0) for stage in stages)
    assert stages[1].mix == {"text": 0.3, "text+points": 0.7}
    assert stages[2].mix == {"text": 0.2, "text+points": 0.3, "text+image": 0.2, "text+points+image": 0.3}


def test_projectors_enter_with_their_modality_and_only_then_get_fresh_moments() -> None:
    one, two, three = plan(CurriculumConfig())
    assert (entering(one, None), entering(two, one), entering(three, two)) == (
        {LM},
        {POINT_PROJECTOR},
        {IMAGE_PROJECTOR},
    )
    assert entering(three, None) == {LM, POINT_PROJECTOR, IMAGE_PROJECTOR}


def test_stages_can_be_left_out() -> None:
    assert [s.number for s in plan(CurriculumConfig(start_from_stage=2))] == [2, 3]
    assert [s.number for s in plan(CurriculumConfig(stage2_epochs=0))] == [1, 3]
    assert [s.number for s in plan(CurriculumConfig(enable_curriculum=False))] == [3]
    with pytest.raises(ConfigError, match="nothing to train"):
        plan(CurriculumConfig(start_from_stage=3, stage3_epochs=0))


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_warm_up_then_decay_to_zero(schedule: str) -> None:
    stage = plan(CurriculumConfig(stage1_lr=1e-3))[0]
    optim = OptimConfig(warmup_steps=10, lr_scheduler_type=schedule)  # type: ignore[arg-type]
    curve = [learning_rates(stage, optim, step, 100)[LM] for step in range(100)]
    assert curve[:10] == pytest.approx([1e-4 * (k + 1) for k in range(10)])
    assert max(curve) == pytest.approx(1e-3)
    assert all(a >= b for a, b in pairwise(curve[10:]))
    assert 0 < curve[-1] < 2e-5


def test_a_short_stage_warms_up_for_half_of_it_at_most() -> None:
    stage = plan(CurriculumConfig(stage1_lr=1.0))[0]
    curve = [learning_rates(stage, OptimConfig(warmup_steps=100), step, 4)[LM] for step in range(4)]
    assert curve == pytest.approx([0.5, 1.0, 1.0, 0.5])


def test_groups_that_do_not_train_stand_still_and_projectors_are_faster() -> None:
    two = plan(CurriculumConfig(stage2_lr=1e-3))[1]
    rates = learning_rates(two, OptimConfig(warmup_steps=0, projector_lr_multiplier=5.0), 0, 10)
    assert rates == pytest.approx({LM: 1e-3, POINT_PROJECTOR: 5e-3, IMAGE_PROJECTOR: 0.0})
