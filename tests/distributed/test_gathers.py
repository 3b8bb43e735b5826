"""ZeRO-3 gathers a decoder layer at once, with its adapters and norms; what is kept is gathered once."""

from pathlib import Path

import pytest

from cad_mllm.config import ModelConfig
from cad_mllm.model import presets
from cad_mllm.model.sizes import parameter_counts
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import flags

JOBS = Path(__file__).with_name("jobs.py")
RECORDED = 2
"""Steps in which DeepSpeed learns the order of the modules; it prefetches and keeps from then on."""
OUTSIDE = 6
"""Embeddings, last norm, head, and the projectors: forward, and what of it the backward pass needs again."""


def short_run(data: Path, output_dir: Path, zero: str, **more: object) -> list[str]:
    """Flags of a run through stage 3 on two ranks."""
    return flags(
        data, output_dir, ranks=2, zero=zero, batch_size=2, gradient_accumulation_steps=1,
        start_from_stage=3, use_gradient_checkpointing=True, **more,
    )  # fmt: skip


def gathers(data: Path, output_dir: Path, zero: str) -> list[tuple[int, int]]:
    """(all-gathers, elements that they gave) of each step, once DeepSpeed knows the order of the modules."""
    words = short_run(data, output_dir, zero, stage3_epochs=3)
    counts = run_ranks(JOBS, "all_gathers_of_steps", words, world_size=2, seconds=120)
    assert counts[0] == counts[1]
    return [(number, elements) for number, elements in counts[0][RECORDED:]]


def test_a_step_has_at_most_two_all_gathers_for_each_layer_and_leaves_nothing_in_shared_memory(
    data: Path, tmp_path: Path
) -> None:
    layers = presets.lm_config("tiny").num_hidden_layers
    counts = gathers(data, tmp_path / "run", "zero3_config")
    assert max(number for number, _ in counts) <= 2 * layers + OUTSIDE
    assert not list(Path("/dev/shm").glob("deepspeed_*"))


def test_a_resident_run_gathers_after_an_update_only_what_it_changed(data: Path, tmp_path: Path) -> None:
    counts = gathers(data, tmp_path / "run", "zero3_resident")
    trained = parameter_counts(ModelConfig(llm_model_name="tiny", point_encoder="tiny")).trainable
    assert all(elements <= 1.01 * trained for _, elements in counts)


def test_a_resident_run_gathers_at_its_start_a_little_at_a_time(data: Path, tmp_path: Path) -> None:
    """All at once it took the memory of all weights once more."""
    words = short_run(data, tmp_path / "run", "zero3_resident", stage3_epochs=1)
    portion = 2**17
    job = {"flags": words, "portion": portion}
    for most, largest, whole in run_ranks(JOBS, "kept_whole", job, world_size=2, seconds=120):
        assert whole
        assert most <= max(portion, largest) + 1024  # shards are padded


@pytest.mark.parametrize("use_lora", [True, False], ids=["frozen", "trained"])
def test_deepspeed_gathers_layers_embeddings_and_head_for_the_backward_pass_only_if_they_train(
    data: Path, tmp_path: Path, use_lora: bool
) -> None:
    words = short_run(data, tmp_path / "run", "zero3_config", stage3_epochs=1, use_lora=use_lora)
    ours, theirs = run_ranks(JOBS, "fetched_backward", words, world_size=2, seconds=120)
    assert ours == theirs and "Projector" in ours
    for kind in ("Qwen3DecoderLayer", "Embedding", "LinearCrossEntropy"):
        assert (kind in ours) == (not use_lora)


def test_ranks_gather_alike_whichever_parameter_each_of_them_names_first(data: Path, tmp_path: Path) -> None:
    words = short_run(data, tmp_path / "run", "zero3_config", stage3_epochs=1)
    ours, theirs = run_ranks(JOBS, "gathered_in_another_order", words, world_size=2, seconds=120)
    assert ours == theirs and ours
