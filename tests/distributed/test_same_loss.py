"""Whatever the engine, the ranks and the accumulation: the same global batches give the same run."""

from pathlib import Path

import pytest

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS = 20
ZERO = ("zero2_config", "zero3_config", "zero3_offload")
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}

pytestmark = pytest.mark.distributed


def run_flags(data: Path, output_dir: Path, **more: object) -> list[str]:
    # Stage 3 alone: all four combinations of modalities; 16 samples, global batch 8, 10 epochs = 20 steps.
    full = not more["use_lora"]
    stage = {"start_from_stage": 3, "stage3_epochs": 10, "stage3_lr": 5e-4 if full else 1e-3}
    return flags(data, output_dir, **{"projector_lr_multiplier": 1.0, "save_steps": 1000, **stage, **more})


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["lora", "full"])
def outputs(
    request: pytest.FixtureRequest, dtype: str, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """All runs of one dtype and one way to fine-tune: plain in one process, and ZeRO in two."""
    root = tmp_path_factory.mktemp(f"same-{dtype}")
    common = {"use_lora": request.param, "dtype": dtype}
    single = [
        run_flags(data, root / "plain", ranks=1, zero=None, **common),
        run_flags(
            data,
            root / "one-micro-batch",
            ranks=1,
            zero=None,
            **common,
            batch_size=8,
            gradient_accumulation_steps=1,
        ),
    ]
    double = [run_flags(data, root / zero, ranks=2, zero=zero, **common) for zero in ZERO]
    assert run_ranks(JOBS, "train_all", single, world_size=1) == [[0] * len(single)]
    assert run_ranks(JOBS, "train_all", double, world_size=2) == [[0] * len(double)] * 2
    return root


def test_the_reference_learns(outputs: Path) -> None:
    curve = losses(outputs / "plain")
    assert len(curve) == STEPS
    assert curve[-1] < 0.8 * curve[0]


@pytest.mark.parametrize("other", ["one-micro-batch", *ZERO])
def test_losses_and_final_weights_agree(outputs: Path, dtype: str, other: str) -> None:
    assert losses(outputs / other) == pytest.approx(losses(outputs / "plain"), rel=TOLERANCE[dtype])
    assert distance(weights(outputs / other, STEPS), weights(outputs / "plain", STEPS)) < TOLERANCE[dtype]
