"""The curriculum: which modalities, which parameter groups, how long, how fast.

One engine serves all stages (design, decision 3): a stage only changes the mix of the data and the
learning rate of each parameter group, which is 0 where the group does not train.
"""

import math
from dataclasses import dataclass

from cad_mllm.config import CurriculumConfig, OptimConfig
from cad_mllm.data.sequence import Mix
from cad_mllm.errors import ConfigError

LM, POINT_PROJECTOR, IMAGE_PROJECTOR = "lm", "point_projector", "image_projector"
"""Parameter groups: the LM (LoRA adapters, or all its weights) and the two projectors."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of the curriculum."""

    number: int
    name: str
    mix: Mix
    """Share of the samples that are fed with each combination of modalities; sums to 1."""
    trains: frozenset[str]
    """Parameter groups whose learning rate is not 0."""
    epochs: int
    lr: float
    """Peak learning rate of the LM; the projectors get it times the multiplier."""


def plan(config: CurriculumConfig) -> tuple[Stage, ...]:
    """The stages that this run trains, in order.

    Raises:
        ConfigError: nothing is left to train.
    """
    stages = (
        Stage(
            number=1,
            name="text",
            mix={"text": 1.0},
            trains=frozenset({LM}),
            epochs=config.stage1_epochs,
            lr=config.stage1_lr,
        ),
        Stage(
            number=2,
            name="text+points",
            mix={"text": 0.3, "text+points": 0.7},
            trains=frozenset({LM, POINT_PROJECTOR}),
            epochs=config.stage2_epochs,
            lr=config.stage2_lr,
        ),
        Stage(
            number=3,
            name="text+points+image",
            mix={"text": 0.2, "text+points": 0.3, "text+image": 0.2, "text+points+image": 0.3},
            trains=frozenset({LM, POINT_PROJECTOR, IMAGE_PROJECTOR}),
            epochs=config.stage3_epochs,
            lr=config.stage3_lr,
        ),
    )
    first = config.start_from_stage if config.enable_curriculum else 3
    chosen = tuple(s for s in stages if s.number >= first and s.epochs > 0)
    if not chosen:
        raise ConfigError(
            "nothing to train: every stage from --start_from_stage on has 0 epochs. "
            "Raise one of --stage{1,2,3}_epochs."
        )
    return chosen


def learning_rates(stage: Stage, optim: OptimConfig, step: int, total_steps: int) -> dict[str, float]:
    """Learning rate of each parameter group at a step of a stage (0 <= step < total_steps).

    Linear warm-up over `warmup_steps`, at most half of the stage, then cosine or linear decay that
    reaches 0 after the last step.
    """
    warmup = min(optim.warmup_steps, total_steps // 2)
    if step < warmup:
        factor = (step + 1) / warmup
    else:
        progress = (step - warmup) / max(1, total_steps - warmup)
        factor = (
            1 - progress if optim.lr_scheduler_type == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
        )
    multiplier = {
        LM: 1.0,
        POINT_PROJECTOR: optim.projector_lr_multiplier,
        IMAGE_PROJECTOR: optim.projector_lr_multiplier,
    }
    return {group: stage.lr * factor * m if group in stage.trains else 0.0 for group, m in multiplier.items()}


def entering(stage: Stage, previous: Stage | None) -> frozenset[str]:
    """Groups that start to train with this stage.

    They get fresh Adam moments: moments aged on zero gradients make the first steps 2.5 to 4.6 times
    the learning rate (measured, see design.md decision 3).
    """
    return stage.trains - (previous.trains if previous is not None else frozenset())
