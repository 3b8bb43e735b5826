"""ZeRO-3 gathers a decoder layer at once, with its adapters and norms: nothing of it comes by itself."""

from pathlib import Path

from cad_mllm.model import presets
from tests.distributed.ranks import run_ranks
from tests.distributed.runs import flags

JOBS = Path(__file__).with_name("jobs.py")
RECORDED = 2
"""DeepSpeed learns the order of the modules in the first steps, and prefetches from then on."""
OUTSIDE = 6
"""Embeddings, last norm, head, and the projectors: forward, and what of it the backward pass needs again."""


def test_a_step_has_about_two_all_gathers_for_each_decoder_layer(data: Path, tmp_path: Path) -> None:
    words = flags(
        data, tmp_path / "run", ranks=2, zero="zero3_config", batch_size=2, gradient_accumulation_steps=1,
        start_from_stage=3, stage3_epochs=3, use_gradient_checkpointing=True,
    )  # fmt: skip
    counts = run_ranks(JOBS, "all_gathers_of_steps", words, world_size=2, seconds=120)
    layers = presets.lm_config("tiny").num_hidden_layers
    assert counts[0] == counts[1]
    assert max(counts[0][RECORDED:]) <= 2 * layers + OUTSIDE
