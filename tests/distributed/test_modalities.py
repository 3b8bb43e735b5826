"""Ranks with different modalities in the same micro-batch, and an LM that ZeRO-3 builds shard by shard."""

from pathlib import Path

import pytest
import torch

from cad_mllm.data.layout import Source
from cad_mllm.data.order import rank_micro_batches, step_samples
from cad_mllm.model import presets
from cad_mllm.settings import parse_train_args
from cad_mllm.train.stages import plan
from tests.data.conftest import draw_combo
from tests.distributed.conftest import NUM_SAMPLES
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import distance, flags, losses, weights

JOBS = Path(__file__).with_name("jobs.py")
STEPS, BATCH, RANKS = 8, 4, 2

pytestmark = pytest.mark.distributed


def image_on_one_rank_only(words: list[str], data: Path) -> int:
    """How many micro-batches of the run have an image on exactly one of the two ranks."""
    config = parse_train_args(words)
    stage, seed = plan(config.curriculum)[0], config.run.seed
    ids = sorted(f"0000/{path.stem}" for path in (Source.from_folder(data).json / "0000").iterdir())
    count = 0
    for step in range(STEPS):
        samples = step_samples(NUM_SAMPLES, BATCH, seed, stage.number, step)
        shares = [
            rank_micro_batches(samples, batch_size=1, accumulation=2, rank=rank, world_size=RANKS)
            for rank in range(RANKS)
        ]
        for micro_batches in zip(*shares, strict=True):
            has_image = [
                any(
                    "image" in draw_combo(seed, stage.number, epoch, ids[number], stage.mix)
                    for number, epoch in micro_batch
                )
                for micro_batch in micro_batches
            ]
            count += sum(has_image) == 1
    return count


@pytest.fixture(scope="module")
def folder_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An LM as a user has it on disk: unlike the preset, it is built under `zero.Init`."""
    folder = tmp_path_factory.mktemp("lm")
    presets.on_the_spot("tiny", torch.float32, "sdpa").save_pretrained(folder)
    presets.byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("source", ["tiny", "folder", "trained encoders"])
def test_an_image_on_one_rank_and_none_on_the_other_trains_under_zero3(
    source: str, data: Path, folder_lm: Path, tmp_path: Path
) -> None:
    common: dict[str, object] = {
        "llm_model_name": folder_lm if source == "folder" else "tiny",
        "train_encoders": source == "trained encoders",
        "vision_model_name": "tiny",
        # the small one has face tokens, and a layer that runs twice in a pass
        "point_encoder": "small" if source == "trained encoders" else "tiny",
        "start_from_stage": 3,
        "stage3_epochs": 4,
        "stage3_lr": 1e-3,
        "projector_lr_multiplier": 1.0,
        "use_gradient_checkpointing": True,
    }
    plain = flags(data, tmp_path / "plain", ranks=1, zero=None, **common, gradient_accumulation_steps=4)
    sharded = flags(
        data, tmp_path / "zero3", ranks=RANKS, zero="zero3_config", **common, gradient_accumulation_steps=2
    )
    assert image_on_one_rank_only(sharded, data) >= 3
    assert run_ranks(JOBS, "train_all", [plain], world_size=1) == [[0]]
    assert run_ranks(JOBS, "train_all", [sharded], world_size=RANKS) == [[0]] * RANKS
    assert len(losses(tmp_path / "plain")) == STEPS
    assert losses(tmp_path / "zero3") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)
    assert distance(weights(tmp_path / "zero3", STEPS), weights(tmp_path / "plain", STEPS)) < 1e-5
