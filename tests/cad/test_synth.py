"""Procedural parts: every seed a valid solid, always the same, with real variety and an honest caption."""

import re

import pytest

from cad_mllm.cad import solid, synth
from cad_mllm.cad.codec import decode, encode
from cad_mllm.cad.mesh import volume_by_manifold
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import Arc, Circle, ExtentType, Line, Operation, Path

SEEDS = range(400)


@pytest.mark.parametrize("seed", range(30))
def test_every_part_is_one_valid_solid(seed: int) -> None:
    program, _ = synth.make_program(seed)
    built = solid.build(program)
    assert built.is_valid and built.num_bodies == 1
    assert built.volume == pytest.approx(volume_by_manifold(program), rel=1e-3)


def test_a_seed_gives_the_same_part_always_and_seeds_differ() -> None:
    parts = [synth.make_program(seed) for seed in SEEDS]
    assert parts == [synth.make_program(seed) for seed in SEEDS]
    assert len({program for program, _ in parts}) > 0.98 * len(parts)
    assert len({caption for _, caption in parts}) > 0.98 * len(parts)


def test_the_parts_use_all_of_the_language() -> None:
    programs = [synth.make_program(seed)[0] for seed in SEEDS]
    extrudes = [extrude for program in programs for extrude in program.extrudes]
    loops = [loop for e in extrudes for p in e.profiles for loop in (p.outer, *p.holes)]
    segments = {type(segment) for loop in loops if isinstance(loop, Path) for segment in loop.segments}
    assert segments == {Line, Arc} and any(isinstance(loop, Circle) for loop in loops)
    assert {e.operation for e in extrudes} == set(Operation)
    assert {e.extent.type for e in extrudes} == set(ExtentType)
    assert any(e.extent.one < 0 for e in extrudes)
    assert any(len(e.profiles) > 1 for e in extrudes) and any(p.holes for e in extrudes for p in e.profiles)
    oblique = [e for e in extrudes if sum(abs(c) > 1e-9 for c in e.plane.normal) > 1]
    assert len(oblique) > 20
    assert {len(program.extrudes) for program in programs} >= {1, 2, 3, 4}


def test_command_texts_are_short_and_still_build() -> None:
    texts = [encode(normalise(synth.make_program(seed)[0]).program) for seed in SEEDS]
    assert sum(len(text) <= 250 for text in texts) > 0.95 * len(texts)
    for text in texts[:10]:
        assert solid.build(decode(text)).is_valid


@pytest.mark.parametrize("seed", range(20))
def test_the_caption_states_the_longest_side(seed: int) -> None:
    program, caption = synth.make_program(seed)
    low, high = solid.build(program).box
    longest = max(b - a for a, b in zip(low, high, strict=True))
    stated = [float(number) for number in re.findall(r"\d+(?:\.\d+)?", caption)]
    assert any(number == pytest.approx(longest, rel=1e-6) for number in stated), (caption, longest)
