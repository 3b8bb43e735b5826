"""What holding generation to the grammar costs, beside the model: milliseconds per step of a batch of 16.

    python tests/bench/grammar_overhead.py [--tokenizer FOLDER] [--bits 8] [--device cpu|cuda]

The text is random: tokens are drawn among those that are allowed, so drafts stand in all kinds of places.
"""

import argparse
import statistics
import time

import torch
from transformers import AutoTokenizer

from cad_mllm.cad.draft import Drafts
from cad_mllm.cad.grammar import vocabulary_bytes
from cad_mllm.data.progress import SlowProgress
from cad_mllm.generate import _StepProcessor
from cad_mllm.model.presets import byte_tokenizer

BATCH, STEPS = 16, 400


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tokenizer", help="folder of a Hugging Face tokenizer; unset: bytes")
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.tokenizer) if given.tokenizer else byte_tokenizer()
    vocabulary = vocabulary_bytes(tokenizer, given.vocab_size)
    drafts = Drafts(given.bits, vocabulary, tokenizer.eos_token_id)
    seconds: list[float] = []
    plain: list[float] = []
    torch.manual_seed(0)
    with SlowProgress("steps", 3 * STEPS) as progress:
        for _ in range(3):
            processor = _StepProcessor([drafts.begin(limit=STEPS) for _ in range(BATCH)], progress)
            written = torch.zeros((BATCH, 0), dtype=torch.int64, device=given.device)
            for _ in range(STEPS):
                scores = torch.randn((BATCH, given.vocab_size), device=given.device)
                began = time.perf_counter()
                masked = processor(written, scores)
                if given.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.perf_counter() - began)
                began = time.perf_counter()
                masked.argmax(dim=-1).tolist()
                plain.append(time.perf_counter() - began)
                token = torch.distributions.Categorical(logits=masked).sample()[:, None]
                written = torch.cat([written, token], dim=1)
    print(
        f"grammar: median {statistics.median(seconds) * 1e3:.2f} ms a step, "
        f"mean {statistics.mean(seconds) * 1e3:.2f}, most {max(seconds) * 1e3:.1f}; "
        f"the largest of {BATCH} x {given.vocab_size} scores: "
        f"{statistics.median(plain) * 1e3:.2f} ms"
    )


if __name__ == "__main__":
    main()
