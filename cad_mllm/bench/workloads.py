"""What is timed: the same samples for every peer, packed or padded, with random content.

A step is `packs` packs of the workload, whatever the number of ranks; padded peers compute the same samples.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from cad_mllm.data.collate import Batch, Sample, collate, pack
from cad_mllm.data.packing import plan_packs
from cad_mllm.data.sequence import MODALITIES, Combo, SequenceSpec
from cad_mllm.errors import ConfigError

_SEED = 20_240_601
_VOCABULARY = 256
"""Token ids are drawn below this: every tokenizer has them."""
_STAGE_3: dict[Combo, float] = {"text": 0.2, "text+points": 0.3, "text+image": 0.2, "text+points+image": 0.3}


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Lengths and networks of the steps that are timed."""

    title: str
    use_lora: bool = True
    constant_length: int | None = None
    """Every sample is text of this length, supervised throughout. None: the lengths of 100 real files."""
    text_divisor: int = 1
    """Real texts are shortened by this: for the tiny model."""
    max_seq_length: int
    pack_tokens: int
    padded_rows: int
    """Rows of a micro-batch of the peers that pad."""
    recompute: bool
    """Gradient checkpointing."""


WORKLOADS = {
    "A": Workload(
        title="multimodal LoRA, lengths of 100 real files, mix of stage 3",
        max_seq_length=2048,
        pack_tokens=16384,
        padded_rows=8,
        recompute=True,
    ),
    "B": Workload(
        title="multimodal full fine-tuning, lengths of 100 real files, mix of stage 3",
        use_lora=False,
        max_seq_length=2048,
        pack_tokens=8192,
        padded_rows=4,
        recompute=True,
    ),
    "C": Workload(
        title="text LoRA, 4 x 2,048 tokens per GPU, gradient checkpointing",
        constant_length=2048,
        max_seq_length=2048,
        pack_tokens=8192,
        padded_rows=4,
        recompute=True,
    ),
    "D": Workload(
        title="text LoRA, 4 x 4,096 tokens per GPU",
        constant_length=4096,
        max_seq_length=4096,
        pack_tokens=16384,
        padded_rows=4,
        recompute=False,
    ),
}


def tiny(workload: Workload) -> Workload:
    """The same in small, for the tiny model on a CPU."""
    constant = workload.constant_length and workload.constant_length // 16
    return replace(
        workload,
        constant_length=constant,
        text_divisor=16,
        max_seq_length=workload.max_seq_length // 16 if constant else 192,
        pack_tokens=workload.pack_tokens // 16 if constant else 768,
    )


def with_micro_batch(workload: Workload, tokens: int) -> Workload:
    """The same with so many tokens in a packed micro-batch, and in the rows of a padded one.

    Raises:
        ConfigError: the longest sample does not fit, or the rows would not be whole.
    """
    rows, rest = divmod(tokens, workload.max_seq_length)
    if rows < 1 or rest:
        raise ConfigError(
            f"--micro_batch_tokens {tokens}: a multiple of {workload.max_seq_length} is needed, the longest "
            f"sample of the workload"
        )
    return replace(workload, pack_tokens=tokens, padded_rows=rows)


@dataclass(frozen=True)
class TimedSample:
    """One sample before its content is drawn."""

    number: int
    combo: Combo
    prompt: int
    target: int
    length: int


class StepSamples:
    """The samples of each step, pack by pack."""

    def __init__(self, workload: Workload, spec: SequenceSpec, *, packs: int, steps: int) -> None:
        rng = np.random.default_rng(_SEED)
        mean = workload.constant_length or workload.max_seq_length / 4
        pool = [
            self._draw(workload, spec, number, rng)
            for number in range(int((steps + 2) * packs * workload.pack_tokens / mean) + packs)
        ]
        lengths = np.asarray([sample.length for sample in pool])
        plan = plan_packs(
            lambda _: lengths, epochs=1, budget=workload.pack_tokens, packs_per_step=packs, key=_SEED
        )
        assert plan.num_steps >= steps, "enough samples were drawn"
        self.packs: list[list[list[TimedSample]]] = [
            [[pool[p % len(pool)] for p in plan.pack(step * packs + number)] for number in range(packs)]
            for step in range(steps)
        ]
        """[step][pack][sample]."""

    @staticmethod
    def _draw(workload: Workload, spec: SequenceSpec, number: int, rng: np.random.Generator) -> TimedSample:
        if workload.constant_length is not None:
            return TimedSample(number, "text", 1, workload.constant_length - 1, workload.constant_length)
        while True:
            combo = list(_STAGE_3)[int(rng.choice(len(_STAGE_3), p=list(_STAGE_3.values())))]
            prompt, target = (max(1, n // workload.text_divisor) for n in _real_texts()[rng.integers(100)])
            length = prompt + target + spec.modality_tokens(MODALITIES[combo])
            if length <= workload.max_seq_length:
                return TimedSample(number, combo, prompt, target, length)


class MicroBatches(Dataset[Batch]):
    """The micro-batches of one rank, step after step."""

    def __init__(
        self,
        samples: StepSamples,
        workload: Workload,
        spec: SequenceSpec,
        *,
        packed: bool,
        rank: int,
        ranks: int,
    ) -> None:
        self._workload, self._spec, self._packed = workload, spec, packed
        if packed:
            shares = [step[rank::ranks] for step in samples.packs]
            self.repeats = [[0] * len(share) for share in shares]
        else:
            shares, self.repeats = _padded(samples, workload.padded_rows, rank, ranks)
        self.per_step = len(shares[0])
        self.batches: list[list[TimedSample]] = [batch for share in shares for batch in share]
        self._repeats = [count for step in self.repeats for count in step]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> Batch:
        chosen, repeats = self.batches[number], self._repeats[number]
        own = len(chosen) - repeats
        made = [content(sample, self._spec, supervised=place < own) for place, sample in enumerate(chosen)]
        if self._packed:
            return pack(made, self._spec, 0, self._workload.pack_tokens)
        return _padded_to_the_limit(made, self._spec)


def _padded(
    samples: StepSamples, rows: int, rank: int, ranks: int
) -> tuple[list[list[list[TimedSample]]], list[list[int]]]:
    """The samples of each step in as many micro-batches for every step and rank; repeats fill them up."""
    flat = [[sample for one in step for sample in one] for step in samples.packs]
    micro_batches = -(-max(len(step) for step in flat) // (rows * ranks))
    shares, repeats = [], []
    for step in flat:
        size = micro_batches * rows * ranks
        own = [(step[n % len(step)], n >= len(step)) for n in range(size)][rank::ranks]
        batches = [own[start : start + rows] for start in range(0, len(own), rows)]
        shares.append([[sample for sample, _ in batch] for batch in batches])
        repeats.append([sum(is_repeat for _, is_repeat in batch) for batch in batches])
    return shares, repeats


def _padded_to_the_limit(samples: Sequence[Sample], spec: SequenceSpec) -> Batch:
    """Rows of `max_seq_length`, as the original design pads them."""
    filler = Sample(
        id="filler", combo="text", bos=[], prompt=[0] * spec.max_seq_length, target=[], supervised=False
    )
    batch = collate([*samples, filler], spec, 0)
    rows = len(samples)
    return replace(
        batch,
        tokens_BT=batch.tokens_BT[:rows],
        attention_mask_BT=batch.attention_mask_BT[:rows],
        labels_BT=batch.labels_BT[:rows],
        sample_ids=batch.sample_ids[:rows],
        combos=batch.combos[:rows],
    )


def content(sample: TimedSample, spec: SequenceSpec, *, supervised: bool) -> Sample:
    """The sample with random tokens, image and points that follow from its number alone."""
    rng = np.random.default_rng((_SEED, sample.number))
    tokens = rng.integers(0, _VOCABULARY, sample.prompt + sample.target).tolist()
    size, modalities = spec.image_size, MODALITIES[sample.combo]
    image = rng.standard_normal((3, size, size), dtype=np.float32) if "image" in modalities else None
    points = rng.standard_normal((spec.num_points, 6), dtype=np.float32) if "points" in modalities else None
    return Sample(
        id=str(sample.number),
        combo=sample.combo,
        bos=[],
        prompt=tokens[: sample.prompt],
        target=tokens[sample.prompt :],
        image_3HW=image,
        points_PC=points,
        supervised=supervised,
    )


@lru_cache(maxsize=1)
def _real_texts() -> list[tuple[int, int]]:
    """(prompt, target) tokens of 100 real files."""
    real = json.loads(Path(__file__).with_name("lengths.json").read_text())
    return list(zip(real["prompt"], real["target"], strict=True))


def supervised_tokens(step: Sequence[Sequence[TimedSample]]) -> int:
    """Of all packs of a step: each sample's target."""
    return sum(sample.target for one in step for sample in one)
