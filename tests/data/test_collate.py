"""What a batch looks like, checked against sequences written out by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cad_mllm.data.collate import (
    IGNORED,
    Sample,
    collate,
    image_array,
    normalise_points,
    select_points,
)
from cad_mllm.data.sequence import (
    INSTRUCTION,
    TextTokenizer,
    bos_ids,
    build_prompt,
    pad_id,
    prompt_ids,
    target_ids,
)
from cad_mllm.errors import ConfigError

from .conftest import SPEC

PAD = 99
IMAGE = np.ones((3, 8, 8), dtype=np.float32)
POINTS = np.ones((5, 6), dtype=np.float32)

TEXT = Sample(id="a", combo="text", bos=[1], prompt=[10, 11], target=[20, 21, 2])
BOTH = replace(TEXT, id="b", combo="text+points+image", image_3HW=IMAGE, points_PC=POINTS)


def test_tokens_stand_in_the_documented_order() -> None:
    batch = collate([BOTH], SPEC, PAD)
    #                                     BOS  image (3)  points (2)  prompt  target, EOS
    assert batch.tokens_BT.tolist() == [[1, PAD, PAD, PAD, PAD, PAD, 10, 11, 20, 21, 2]]
    assert batch.labels_BT.tolist() == [[IGNORED] * 8 + [20, 21, 2]]
    assert batch.attention_mask_BT.tolist() == [[1] * 11]
    assert batch.image_rows.tolist() == [1, 2, 3]
    assert batch.point_rows.tolist() == [4, 5]
    assert batch.images_NCHW.shape == (1, 3, 8, 8)
    assert batch.points_MPC.shape == (1, 5, 6)
    assert batch.num_supervised == 3


def test_a_missing_modality_leaves_no_trace() -> None:
    alone, mixed = collate([TEXT], SPEC, PAD), collate([BOTH, TEXT], SPEC, PAD)
    assert alone.tokens_BT.tolist() == [[1, 10, 11, 20, 21, 2]]
    assert mixed.tokens_BT[1, :6].tolist() == alone.tokens_BT[0].tolist()
    assert mixed.labels_BT[1, :6].tolist() == alone.labels_BT[0].tolist()
    assert mixed.images_NCHW.shape[0] == mixed.points_MPC.shape[0] == 1
    assert alone.images_NCHW.shape == (0, 3, 8, 8)
    assert alone.points_MPC.shape == (0, 5, 6)
    assert alone.image_rows.tolist() == alone.point_rows.tolist() == []


def test_short_sequences_are_padded_on_the_right() -> None:
    batch = collate([BOTH, TEXT], SPEC, PAD)
    assert batch.tokens_BT[1].tolist() == [1, 10, 11, 20, 21, 2] + [PAD] * 5
    assert batch.attention_mask_BT[1].tolist() == [1] * 6 + [0] * 5
    assert batch.labels_BT[1].tolist() == [IGNORED] * 3 + [20, 21, 2] + [IGNORED] * 5


def test_rows_count_through_the_flat_batch() -> None:
    image_only = replace(TEXT, combo="text+image", image_3HW=IMAGE)
    batch = collate([TEXT, BOTH, image_only], SPEC, PAD)
    length = batch.tokens_BT.shape[1]
    assert batch.image_rows.tolist() == [
        length + 1,
        length + 2,
        length + 3,
        *(2 * length + i for i in (1, 2, 3)),
    ]
    assert batch.point_rows.tolist() == [length + 4, length + 5]


def test_without_bos_the_first_token_is_still_not_learned() -> None:
    batch = collate([replace(TEXT, bos=[])], SPEC, PAD)
    assert batch.tokens_BT.tolist() == [[10, 11, 20, 21, 2]]
    assert batch.labels_BT[0, 0] == IGNORED


def test_an_unsupervised_sample_keeps_its_sequence_and_has_no_label() -> None:
    batch = collate([replace(BOTH, supervised=False)], SPEC, PAD)
    assert batch.tokens_BT.tolist() == collate([BOTH], SPEC, PAD).tokens_BT.tolist()
    assert batch.num_supervised == 0
    assert (batch.labels_BT == IGNORED).all()


def test_generation_begins_with_what_training_saw_before_the_target() -> None:
    start = collate([replace(BOTH, target=[])], SPEC, PAD)
    full = collate([BOTH], SPEC, PAD)
    assert start.tokens_BT[0].tolist() == full.tokens_BT[0, : start.tokens_BT.shape[1]].tolist()
    assert start.num_supervised == 0


def test_the_types_are_those_that_the_model_takes() -> None:
    batch = collate([BOTH], SPEC, PAD)
    integers = (batch.tokens_BT, batch.attention_mask_BT, batch.labels_BT, batch.image_rows, batch.point_rows)
    assert {tensor.dtype for tensor in integers} == {torch.int64}
    assert {batch.images_NCHW.dtype, batch.points_MPC.dtype} == {torch.float32}
    assert batch.to("cpu").sample_ids == ("b",)


def test_prompt_and_target_are_tokenised_apart(tokenizer: TextTokenizer) -> None:
    assert build_prompt(" A plate. ") == f"{INSTRUCTION}\nA plate.\n"
    assert build_prompt("") == f"{INSTRUCTION}\n"
    assert bytes(prompt_ids(tokenizer, ["A plate."])[0]).decode() == build_prompt("A plate.")
    ids = target_ids(tokenizer, ["S1,2;"])[0]
    assert bytes(ids[:-1]) == b"S1,2;"
    assert ids[-1] == tokenizer.eos_token_id
    assert bos_ids(tokenizer) == []


def test_points_are_centred_and_scaled_by_the_longest_side() -> None:
    cloud = np.array([[10, 0, 1, 0, 0, 1], [14, 1, 1, 0, 0, 1], [12, 0.5, 1, 1, 0, 0]], dtype=np.float32)
    normal = normalise_points(cloud)
    assert normal[:, :3].tolist() == [[-1, -0.25, 0], [1, 0.25, 0], [0, 0, 0]]
    assert (normal[:, 3:] == cloud[:, 3:]).all()


def test_one_point_alone_stands_in_the_middle() -> None:
    cloud = np.array([[3, 4, 5, 0, 0, 1]], dtype=np.float32)
    assert select_points(cloud, SPEC, (1, 2, 0, "a")).tolist() == [[0, 0, 0, 0, 0, 1]] * 5


def test_points_follow_from_the_draw() -> None:
    cloud = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
    first, again, other = (select_points(cloud, SPEC, (1, 2, epoch, "a")) for epoch in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (5, 5)])
def test_an_image_is_resized_and_normalised(size: tuple[int, int]) -> None:
    array = image_array(Image.new("RGB", size, (255, 0, 51)), SPEC)
    assert array.shape == (3, 8, 8)
    assert array.dtype == np.float32
    assert array[:, 4, 4] == pytest.approx([1.0, -1.0, -0.6])


def test_an_oblong_image_keeps_its_proportions_on_white() -> None:
    array = image_array(Image.new("RGB", (16, 8), (0, 0, 0)), SPEC)
    assert (array[:, 0] == 1).all()
    assert (array[:, 4] == -1).all()


class WordTokenizer:
    """Behaves like SentencePiece tokenizers: BOS, and a space put in front of every text."""

    bos_token_id, eos_token_id, pad_token_id = 1, 2, None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        start = [1] if add_special_tokens else []
        return {"input_ids": [start + [ord(letter) for letter in f" {one}"] for one in text]}

    def get_vocab(self) -> dict[str, int]:
        return {}


def test_a_tokenizer_that_puts_bos_and_a_space_in_front_is_understood() -> None:
    tokenizer = WordTokenizer()
    assert bos_ids(tokenizer) == [1]
    assert target_ids(tokenizer, ["S1;"]) == [[ord("S"), ord("1"), ord(";"), 2]]
    assert pad_id(tokenizer) == 2


def test_a_tokenizer_without_eos_is_refused() -> None:
    tokenizer = WordTokenizer()
    tokenizer.eos_token_id = None
    with pytest.raises(ConfigError, match="EOS"):
        target_ids(tokenizer, ["S1;"])
