"""What a sample's token sequence is made of; free of torch, shared by the index, training and generation.

    [BOS if the tokenizer adds one][image tokens][point tokens][instruction + caption][target text][EOS]

Prompt and target are tokenised apart, so that the border between what is given and what is learned is
exact, and so that generation starts from the very token ids that training saw.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from cad_mllm.errors import ConfigError

Modality = Literal["points", "image"]
Combo = Literal["text", "text+points", "text+image", "text+points+image"]
Mix = Mapping[Combo, float]
"""Shares of the modality combinations that a stage draws from; they sum to 1."""

MODALITIES: Mapping[Combo, frozenset[Modality]] = MappingProxyType(
    {
        "text": frozenset(),
        "text+points": frozenset({"points"}),
        "text+image": frozenset({"image"}),
        "text+points+image": frozenset({"points", "image"}),
    }
)
"""What each combination feeds beside the text, in the order in which the combinations are drawn."""

INSTRUCTION = "Write the CAD program of this part."
"""The fixed first line of every prompt."""

_BORDER = "\n"


class TextTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> Any:
        """`["input_ids"]` of the result holds one list of ids per text."""

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""


@dataclass(frozen=True, kw_only=True)
class SequenceSpec:
    """The sizes that tie the data to the model."""

    image_tokens: int
    """Placeholders of one image in the sequence."""
    image_size: int
    """Height and width of the image in pixels."""
    image_mean: tuple[float, float, float]
    """Mean per channel of RGB in [0, 1], as the vision encoder wants it."""
    image_std: tuple[float, float, float]
    """Standard deviation per channel."""
    point_tokens: int
    """Placeholders of one point cloud in the sequence."""
    num_points: int
    """Points drawn from a cloud."""
    max_seq_length: int
    """Longest sequence, everything counted."""

    def modality_tokens(self, modalities: Iterable[Modality]) -> int:
        """Placeholders that these modalities take together."""
        sizes = {"points": self.point_tokens, "image": self.image_tokens}
        return sum(sizes[modality] for modality in modalities)


def needed_modalities(mixes: Iterable[Mix]) -> frozenset[Modality]:
    """The modalities that these stages can draw: what every sample of the run must have."""
    return frozenset(
        modality
        for mix in mixes
        for combo, share in mix.items()
        if share > 0
        for modality in MODALITIES[combo]
    )


def build_prompt(caption: str) -> str:
    """The text before the target. An empty caption leaves the instruction alone (points or image only)."""
    lines = [INSTRUCTION, caption.strip()] if caption.strip() else [INSTRUCTION]
    return _BORDER.join(lines) + _BORDER


def bos_ids(tokenizer: TextTokenizer) -> list[int]:
    """`[BOS]` for a tokenizer that puts one in front of a text, else `[]`."""
    ids = list(tokenizer([INSTRUCTION], add_special_tokens=True)["input_ids"][0])
    return ids[:1] if tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id] else []


def eos_id(tokenizer: TextTokenizer) -> int:
    """The id that ends a target; ConfigError for a tokenizer without one."""
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            "the tokenizer of --llm_model_name has no EOS token: a target could not be ended; add one"
        )
    return tokenizer.eos_token_id


def pad_id(tokenizer: TextTokenizer) -> int:
    """What fills placeholders and padding (never attended to, never supervised)."""
    return eos_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def prompt_ids(tokenizer: TextTokenizer, captions: Sequence[str]) -> list[list[int]]:
    """Ids of instruction + caption for each caption, without BOS."""
    prompts = [build_prompt(caption) for caption in captions]
    return [list(ids) for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]]


def target_ids(tokenizer: TextTokenizer, targets: Sequence[str]) -> list[list[int]]:
    """Ids of each target text and EOS."""
    found = inner_ids(tokenizer, targets)
    if any(ids is None for ids in found):
        raise ConfigError(
            "the tokenizer of --llm_model_name joins a line break with the text after it: not usable"
        )
    end = eos_id(tokenizer)
    return [[*ids, end] for ids in found if ids is not None]


def inner_ids(tokenizer: TextTokenizer, texts: Sequence[str]) -> list[list[int] | None]:
    """Ids of texts that do not begin a sequence; None for one that would melt into a line break before it.

    Some tokenizers put a space before the first word of a text, which a target does not begin with: so the
    text is tokenised behind the line break that ends every prompt, and the ids of that are taken off.
    """
    border = list(tokenizer([_BORDER], add_special_tokens=False)["input_ids"][0])
    encoded = tokenizer([_BORDER + text for text in texts], add_special_tokens=False)["input_ids"]
    return [list(ids[len(border) :]) if list(ids[: len(border)]) == border else None for ids in encoded]


def tokenizer_identity(tokenizer: TextTokenizer) -> str:
    """A digest of the vocabulary, the special ids and how a probe is split: equal for equal tokenizers."""
    probe = build_prompt("A 12.5 mm plate, two holes.")
    facts = {
        "vocabulary": sorted(tokenizer.get_vocab().items()),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id],
        "probe": tokenizer([probe], add_special_tokens=True)["input_ids"],
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
