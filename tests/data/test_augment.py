"""Parts of programs as targets, and prompts without a caption: drawn by the seed, of known length."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from cad_mllm.cad import codec, synth
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import CadProgram, Operation
from cad_mllm.data.augment import (
    WHOLE,
    Augmentation,
    Variant,
    draw_variant,
    removable_features,
    split_features,
)
from cad_mllm.data.collate import IGNORED, Batch
from cad_mllm.data.index import Index, IndexReport, load_index
from cad_mllm.data.loader import Step, StepLoader, pack_stage
from cad_mllm.data.order import draw_captioned
from cad_mllm.data.sequence import TextTokenizer, build_prompt, inner_ids, prompt_ids, target_ids

from .conftest import SPEC, Folder
from .sharding import shard_folder

PREFIX = Variant("prefix", 2)
REMOVAL = Variant("removal", 2)


def program(seed: int) -> CadProgram:
    """A procedural program as the command text has it."""
    return codec.decode(text(seed))


def text(seed: int) -> str:
    return codec.encode(normalise(synth.make_program(seed)[0]).program)


SEVERAL = [seed for seed in range(110) if len(split_features(text(seed))) > 2]


def without(features: list[str], numbers: set[int]) -> str:
    return "".join(one for number, one in enumerate(features, start=1) if number not in numbers)


def test_a_text_is_its_features() -> None:
    assert len(SEVERAL) > 10
    for seed in SEVERAL:
        features = split_features(text(seed))
        assert "".join(features) == text(seed)
        assert len(features) == len(program(seed).extrudes)


def test_every_prefix_is_the_canonical_text_of_its_program() -> None:
    for seed in SEVERAL:
        features, whole = split_features(text(seed)), program(seed)
        for count in range(1, len(features)):
            prefix = "".join(features[:count])
            assert codec.encode(CadProgram(whole.extrudes[:count])) == prefix
            assert prefix.startswith("N")


def test_what_may_go_leaves_the_canonical_text_of_a_program() -> None:
    seen = 0
    for seed in SEVERAL:
        features, extrudes = split_features(text(seed)), program(seed).extrudes
        for number, may in enumerate(removable_features(text(seed), 8), start=1):
            if may:
                rest = CadProgram(extrudes[: number - 1] + extrudes[number:])
                assert codec.encode(rest) == without(features, {number})
                assert rest.extrudes[0].operation is Operation.NEW
                seen += 1
    assert seen > 10


BASE = "NZ0,0,127,254,254E60P0,0H254V254H0"


@pytest.mark.parametrize(
    "features, may_go",
    [
        ([BASE], [False]),
        # a hole in the plate: nothing depends on it, the plate stays
        ([BASE, "CZ127,127,187,0,0F40R0,0,50"], [False, True]),
        # a boss, and a hole in the boss: only the hole may go
        ([BASE, "JZ127,127,187,0,0E40R0,0,50", "CZ127,127,227,0,0F40R0,0,20"], [False, False, True]),
        # two holes apart from each other
        ([BASE, "CZ50,50,187,0,0F40R0,0,20", "CZ200,200,187,0,0F40R0,0,20"], [False, True, True]),
        # a second body of its own depends on nothing
        ([BASE, "CZ127,127,187,0,0F40R0,0,50", "NZ127,127,187,0,0E20R0,0,50"], [False, True, True]),
    ],
)
def test_a_feature_on_which_another_depends_stays(features: list[str], may_go: list[bool]) -> None:
    assert removable_features(";".join(features), 8) == may_go


@pytest.mark.slow
def test_what_is_left_can_be_built() -> None:
    from cad_mllm.cad import solid

    built = 0
    for seed in SEVERAL[:15]:
        features = split_features(text(seed))
        parts = ["".join(features[:count]) for count in range(1, len(features))]
        parts += [
            without(features, {number})
            for number, may in enumerate(removable_features(text(seed), 8), start=1)
            if may
        ]
        for part in parts:
            assert len(solid.build(codec.decode(part)).mesh().faces) > 0
            built += 1
    assert built > 20


# --- drawing ----------------------------------------------------------------------------------------------


def draws(augmentation: Augmentation, features: int = 4, removable: tuple[int, ...] = (2, 4)) -> list[object]:
    return [draw_variant(augmentation, (1, 2, 0, f"s{n}"), features, removable) for n in range(3000)]


def test_the_shares_are_those_of_the_flags() -> None:
    drawn = draws(Augmentation(prefix=0.3, removal=0.2))
    kinds = [getattr(variant, "kind", "whole") for variant in drawn]
    assert kinds.count("prefix") / 3000 == pytest.approx(0.3, abs=0.04)
    assert kinds.count("removal") / 3000 == pytest.approx(0.2, abs=0.04)
    assert {v.feature for v in drawn if isinstance(v, Variant) and v.kind == "prefix"} == {1, 2, 3}
    assert {v.feature for v in drawn if isinstance(v, Variant) and v.kind == "removal"} == {2, 4}
    assert not any(draws(Augmentation()))


def test_a_model_without_parts_is_given_whole() -> None:
    assert not any(draws(Augmentation(prefix=1.0), features=1, removable=()))
    assert not any(draws(Augmentation(removal=1.0), features=3, removable=()))


def test_draws_follow_from_seed_stage_epoch_and_sample_alone() -> None:
    half = Augmentation(prefix=0.5, removal=0.5)
    one = (1, 2, 3, "a")
    assert draw_variant(half, one, 9, range(2, 9)) == draw_variant(half, one, 9, range(2, 9))
    for other in ((2, 2, 3, "a"), (1, 1, 3, "a"), (1, 2, 4, "a"), (1, 2, 3, "b")):
        keys = [(n + one[0], *one[1:]) for n in range(40)]
        others = [(n + other[0], *other[1:]) for n in range(40)]
        assert [draw_variant(half, k, 9, range(2, 9)) for k in keys] != [
            draw_variant(half, k, 9, range(2, 9)) for k in others
        ]


# --- in the index and the batches -------------------------------------------------------------------------


@pytest.fixture
def model_texts() -> list[str]:
    """Models of several features for `make_folder`."""
    import json

    from cad_mllm.cad import omnicad

    return [json.dumps(omnicad.to_json(synth.make_program(seed)[0])) for seed in SEVERAL[:11]]


@pytest.fixture
def index(make_folder: Callable[..., Folder], build: Callable[..., IndexReport]) -> Index:
    report = build(make_folder(11), augmented=True)
    assert report.num_with_parts == 11
    return load_index(report.path)


def test_tokens_of_a_part_are_those_of_its_text(index: Index, tokenizer: TextTokenizer) -> None:
    for number in range(len(index)):
        record = index.record(number)
        features = split_features(record.target)
        prompt = prompt_ids(tokenizer, [record.caption])[0]
        for variant, part in ((PREFIX, "".join(features[:2])), (REMOVAL, without(features, {2}))):
            assert index.target(number, variant) == target_ids(tokenizer, [part])[0]
            assert index.prompt(number, variant) == [
                *prompt,
                *(inner_ids(tokenizer, [variant.note])[0] or []),
            ]
            assert index.num_tokens(number, variant) == (
                len(index.prompt(number, variant)),
                len(index.target(number, variant)),
            )


def test_the_prompt_says_what_is_asked_for(index: Index, tokenizer: TextTokenizer) -> None:
    said = bytes(index.prompt(0, PREFIX)).decode()
    assert said == build_prompt("part 0") + "Only the first 2 features.\n"
    assert bytes(index.prompt(0, REMOVAL)).decode() == build_prompt("part 0") + "Without feature 2.\n"


@pytest.fixture
def loader(index: Index, tokenizer: TextTokenizer) -> Callable[..., StepLoader]:
    def make(**changes: object) -> StepLoader:
        settings: dict[str, object] = {
            "seed": 3,
            "stage": 1,
            "mix": {"text": 0.5, "text+points": 0.5},
            "batch_size": 2,
            "accumulation": 2,
            "rank": 0,
            "world_size": 1,
            "num_workers": 0,
            "start_step": 0,
            "num_steps": 6,
            "augmentation": WHOLE,
        }
        return StepLoader(index, tokenizer, SPEC, **(settings | changes))  # type: ignore[arg-type]

    return make


def rows(steps: list[Step]) -> list[tuple[str, list[int]]]:
    def of(batch: Batch) -> list[tuple[str, list[int]]]:
        tokens = zip(batch.tokens_BT, batch.attention_mask_BT, strict=True)
        return [
            (sample_id, row[mask == 1].tolist())
            for sample_id, (row, mask) in zip(batch.sample_ids, tokens, strict=True)
        ]

    return [row for step in steps for batch in step.micro_batches for row in of(batch)]


EITHER = pytest.mark.parametrize(
    "augmentation", [Augmentation(prefix=0.5, removal=0.5, caption_dropout=dropout) for dropout in (0.0, 0.5)]
)
"""Parts alone; and parts some of which have no caption."""


@EITHER
def test_the_counts_of_a_step_are_those_of_its_batches(
    augmentation: Augmentation, loader: Callable[..., StepLoader]
) -> None:
    whole = list(loader(augmentation=WHOLE))
    augmented = list(loader(augmentation=augmentation))
    assert sum(step.tokens for step in augmented) < sum(step.tokens for step in whole)
    for step in augmented:
        assert step.supervised_tokens == sum(batch.num_supervised for batch in step.micro_batches)
        assert step.tokens == sum(int(batch.attention_mask_BT.sum()) for batch in step.micro_batches)


@EITHER
def test_packs_are_planned_for_the_samples_as_they_are_drawn(
    augmentation: Augmentation, index: Index, loader: Callable[..., StepLoader]
) -> None:
    def steps(drawn: Augmentation) -> list[Step]:
        packs = pack_stage(
            index,
            SPEC,
            seed=3,
            stage=1,
            mix={"text": 0.5, "text+points": 0.5},
            epochs=4,
            pack_tokens=700,
            packs_per_step=2,
            augmentation=drawn,
        )
        return list(loader(packs=packs, pack_tokens=700, num_steps=packs.num_steps, augmentation=drawn))

    augmented, whole = steps(augmentation), steps(WHOLE)
    assert len(augmented) < len(whole)  # shorter samples, more of them in a pack
    for step in augmented:
        assert step.supervised_tokens == sum(batch.num_supervised for batch in step.micro_batches)
        assert step.tokens == sum(int(batch.attention_mask_BT.sum()) for batch in step.micro_batches)


# --- without a caption ------------------------------------------------------------------------------------


def test_a_sample_without_caption_has_the_prompt_of_points_alone(
    index: Index, tokenizer: TextTokenizer
) -> None:
    assert index.prompt(3, captioned=False) == prompt_ids(tokenizer, [""])[0]
    assert bytes(index.prompt(3, PREFIX, captioned=False)).decode() == (
        build_prompt("") + "Only the first 2 features.\n"
    )
    assert index.target(3) == target_ids(tokenizer, [index.record(3).target])[0]


def test_captions_are_dropped_in_the_share_that_the_flag_says_and_anew_in_each_epoch() -> None:
    ids = [f"s{n}" for n in range(3000)]
    kept = [draw_captioned(3, 2, epoch, ids, 0.3) for epoch in range(2)]
    assert kept[0].mean() == pytest.approx(0.7, abs=0.03)
    assert (kept[0] != kept[1]).mean() == pytest.approx(2 * 0.3 * 0.7, abs=0.04)
    assert draw_captioned(3, 2, 0, ids[7:8], 0.3) == kept[0][7:8]
    assert draw_captioned(3, 2, 0, ids, 0.0).all() and not draw_captioned(3, 2, 0, ids, 1.0).any()


def test_text_alone_keeps_its_caption(index: Index, loader: Callable[..., StepLoader]) -> None:
    always = Augmentation(caption_dropout=1.0)
    instruction = len(build_prompt(""))
    for mix, shortened in (({"text": 1.0}, False), ({"text+points": 1.0}, True)):
        for step in loader(augmentation=always, mix=mix, num_steps=3):
            for batch in step.micro_batches:
                prompts = (batch.attention_mask_BT.bool() & (batch.labels_BT == IGNORED)).sum(dim=1)
                placeholders = SPEC.point_tokens if shortened else 0
                bare = [int(count) - placeholders == instruction for count in prompts]
                assert bare == [shortened] * len(bare)


def test_without_captions_more_samples_fit_a_pack(index: Index) -> None:
    def packs(dropout: float) -> int:
        return pack_stage(
            index,
            SPEC,
            seed=3,
            stage=1,
            mix={"text+points": 1.0},
            epochs=8,
            pack_tokens=700,
            packs_per_step=1,
            augmentation=Augmentation(caption_dropout=dropout),
        ).num_steps

    assert packs(1.0) < packs(0.0)


# --- whoever computes it ----------------------------------------------------------------------------------


@EITHER
def test_ranks_workers_and_resuming_change_nothing(
    augmentation: Augmentation, loader: Callable[..., StepLoader]
) -> None:
    augmented = partial(loader, augmentation=augmentation)
    alone = rows(list(augmented()))
    assert rows(list(augmented(num_workers=1))) == alone
    assert rows(list(augmented(start_step=3))) == alone[12:]
    pair = [rows(list(augmented(accumulation=1, world_size=2, rank=rank))) for rank in range(2)]
    assert sorted(pair[0] + pair[1]) == sorted(alone)


def test_a_part_is_never_longer_than_the_whole(index: Index) -> None:
    often = Augmentation(prefix=0.5, removal=0.5)
    for number in range(len(index)):
        for epoch in range(20):
            variant = index.draw_variant(number, often, 1, 1, epoch)
            assert sum(index.num_tokens(number, variant)) <= sum(index.num_tokens(number))


def test_shards_have_the_same_parts(
    index: Index, make_folder: Callable[..., Folder], build: Callable[..., IndexReport], tmp_path: Path
) -> None:
    from cad_mllm.data.shards import ShardedSplit
    from cad_mllm.data.stores import Shards

    folder = make_folder(11, "again")
    store = Shards(ShardedSplit(shard_folder(folder.root, tmp_path / "shards"), "train"))
    sharded = load_index(build(folder, store=store, augmented=True, output_dir=tmp_path / "out2").path)
    often = Augmentation(prefix=0.5, removal=0.5)
    drawn = [[one.draw_variant(n, often, 1, 1, 0) for n in range(11)] for one in (index, sharded)]
    assert drawn[0] == drawn[1] and any(drawn[0])


def test_a_run_without_augmentation_does_not_look_for_parts(
    make_folder: Callable[..., Folder], build: Callable[..., IndexReport]
) -> None:
    folder = make_folder(4, "plain")
    report = build(folder)
    assert report.num_with_parts is None
    plain = load_index(report.path)
    assert plain.draw_variant(0, Augmentation(prefix=1.0), 1, 1, 0) is None
    augmented = build(folder, augmented=True)
    assert not augmented.reused
    assert load_index(augmented.path).fingerprint == plain.fingerprint
    assert replace(augmented, num_with_parts=None) == report
