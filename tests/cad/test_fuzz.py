"""Ten thousand changed files, ten thousand changed texts: a solid or a CadError, in time, nothing else."""

import contextlib
import copy
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cad_mllm.cad import codec, omnicad, solid
from cad_mllm.cad.normalise import normalise
from cad_mllm.cad.program import CadProgram
from cad_mllm.cad.worker import run_limited
from cad_mllm.errors import CadError

REAL = sorted((Path(__file__).parents[1] / "data" / "omnicad" / "json").rglob("*.json"))
COUNT = 10_000
LONGEST = 1.0
"""CPU seconds for reading or decoding one."""
ODD_NUMBERS = (0, -1, 1e-12, 1e-300, 1e9, 1e308, -1e308, 2**63, 10**30, 3.141592653589793, 6.2831)
ODD_VALUES = (None, True, "", "x", [], {}, [1], "Line3D", "Arc3D", float("nan"), float("inf"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(5400)]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside."""
    yield path
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def parent(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        value = value[key]
    return value


def change(
    model: Any, numbers: list[tuple[Any, ...]], everything: list[tuple[Any, ...]], draw: random.Random
) -> bytes:
    """The file with a few changes: many are small ones of numbers, so that a solid still comes out."""
    model = copy.deepcopy(model)
    if draw.random() < 0.6:
        path = draw.choice(numbers)
        holder = parent(model, path)
        holder[path[-1]] = holder[path[-1]] * draw.choice((-1, 0.5, 2, 1 + 1e-6, 1 - 1e-3)) + draw.gauss(
            0, 1e-6
        )
        return json.dumps(model).encode()
    for _ in range(draw.choice((1, 1, 2, 4))):
        path = draw.choice(everything)
        try:
            holder = parent(model, path)
            kind = draw.random()
            if kind < 0.3:
                holder[path[-1]] = draw.choice(ODD_NUMBERS)
            elif kind < 0.6:
                holder[path[-1]] = draw.choice(ODD_VALUES)
            elif kind < 0.8:
                del holder[path[-1]]
            else:
                holder[path[-1]] = copy.deepcopy(parent(model, draw.choice(everything)))
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took it away
    content = bytearray(json.dumps(model).encode())
    if draw.random() < 0.3:
        at = draw.randrange(len(content))
        content[at : at + draw.randrange(3)] = bytes(
            draw.choices(b'0123456789.-eE{}[],:" \xff', k=draw.randrange(4))
        )
    return bytes(content)


def changed_text(text: str, draw: random.Random) -> str:
    letters = list(text)
    for _ in range(draw.choice((1, 1, 2, 5))):
        at = draw.randrange(len(letters) + 1)
        kind = draw.random()
        if kind < 0.4:
            letters[at : at + 1] = draw.choice("0123456789,;-SLARCENJX ")
        elif kind < 0.7:
            del letters[at : at + draw.randrange(1, 9)]
        else:
            begin = draw.randrange(len(letters) + 1)
            letters[at:at] = letters[begin : begin + draw.randrange(1, 40)]
    return "".join(letters)


def build(program: CadProgram) -> float:
    return solid.build(program).volume


def build_all(programs: list[CadProgram]) -> Counter[str]:
    """Solids in worker processes: how many came out, and why the others did not."""
    outcomes: Counter[str] = Counter()
    for _, outcome in run_limited(build, programs, workers=2, seconds=60.0):
        outcomes["solid" if not isinstance(outcome, CadError) else "no solid"] += 1
    return outcomes


def test_ten_thousand_changed_files(tmp_path: Path) -> None:
    draw = random.Random(4)
    models = [json.loads(path.read_bytes()) for path in REAL]
    everything = [[path for path in places(model) if path] for model in models]
    numbers = [
        [path for path in paths if isinstance(parent(model, path)[path[-1]], float)]
        for model, paths in zip(models, everything, strict=True)
    ]
    programs, slowest = [], 0.0
    for _ in range(COUNT):
        which = draw.randrange(len(models))
        path = tmp_path / "model.json"
        path.write_bytes(change(models[which], numbers[which], everything[which], draw))
        started = time.process_time()
        try:
            program = omnicad.read(path)
            codec.encode(normalise(program).program, bits=8)
            programs.append(program)
        except CadError:
            pass
        slowest = max(slowest, time.process_time() - started)
    outcomes = build_all(programs)
    print(f"{COUNT} files, {len(programs)} read; {dict(outcomes)}; slowest to read {slowest:.2f} s")
    assert len(programs) >= 0.3 * COUNT
    assert outcomes.total() == len(programs)
    assert slowest < LONGEST


def test_ten_thousand_changed_texts() -> None:
    draw = random.Random(5)
    texts = [codec.encode(normalise(omnicad.read(path)).program, bits=8) for path in REAL]
    programs, slowest = [], 0.0
    for _ in range(COUNT):
        text = changed_text(draw.choice(texts), draw)
        started = time.process_time()
        with contextlib.suppress(CadError):
            programs.append(codec.decode(text, bits=8))
        slowest = max(slowest, time.process_time() - started)
    outcomes = build_all(programs[:1000])
    print(f"{COUNT} texts, {len(programs)} decoded; {dict(outcomes)}; slowest to decode {slowest:.2f} s")
    assert len(programs) >= 0.03 * COUNT
    assert slowest < LONGEST
