"""The quality report of a prepared data set: one HTML file that fetches nothing.

It follows from the data alone (no times, no machine), so that it too is the same after any number of kills.
"""

import base64
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import jinja2
import numpy as np

from cad_mllm.data.archive import Captions, Rejected
from cad_mllm.data.atomic import atomic_path
from cad_mllm.data.shards import Manifest, ShardedSplit
from cad_mllm.errors import ConfigError

_PARTICULAR = re.compile(r"'[^']*'|(?<![\w-])[-+]?\d(?:[\w/.,]|(?<=e)[-+])*")
PICTURES = 48
"""Models on the page of pictures, taken evenly from all."""
STAGES: Mapping[str, str] = {
    "archive": "could not be read from the archive",
    "split": "in no split",
    "parse": "no program that is supported",
    "duplicate": "the same quantised program as another model",
    "build": "could not be built",
}


class Tokenizer:
    """Counts tokens with the tokenizer of a language model, for the report."""

    def __init__(self, name: str) -> None:
        """Load it by path or hub name. Raises ConfigError if it cannot be had."""
        from transformers import AutoTokenizer  # it brings torch, which nothing else here needs

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name)
        except Exception as error:  # the library and the hub client raise many types
            detail = str(error).partition("\n")[0]
            raise ConfigError(f"--tokenizer {name} cannot be loaded: {detail}") from error
        self.name = Path(name).name
        vocabulary = sorted(self._tokenizer.get_vocab().items())
        self.fingerprint = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False))


@dataclass
class ShardCounts:
    """What is counted while a shard is built."""

    characters: list[int] = field(default_factory=list)
    """Of the command texts at 8 bits, where there is one."""
    characters_10: list[int] = field(default_factory=list)
    """At 10 bits."""
    tokens: list[int] = field(default_factory=list)
    """Of the command texts at 8 bits; empty without a tokenizer."""
    extrudes: list[int] = field(default_factory=list)
    """Per model."""
    num_curves: list[int] = field(default_factory=list)
    """Per model."""
    kinds: dict[str, dict[str, int]] = field(default_factory=dict)
    """What is counted (operations, ...) -> kind -> how often."""

    def add(self, name: str, counts: Mapping[str, int]) -> None:
        """Add to the kinds of `name`."""
        kinds = self.kinds.setdefault(name, {})
        for kind, count in counts.items():
            kinds[kind] = kinds.get(kind, 0) + count


@dataclass(frozen=True)
class _Bar:
    label: str
    count: int
    percent: float
    """Of the longest bar."""


@dataclass(frozen=True)
class _Chart:
    title: str
    note: str
    bars: list[_Bar]


@dataclass(frozen=True)
class _Picture:
    id: str
    caption: str
    uri: str


@dataclass(frozen=True)
class _Stage:
    name: str
    text: str
    rejected: list[Rejected]


def write_quality_report(
    path: Path,
    root: Path,
    manifest: Manifest,
    counts: Sequence[ShardCounts],
    rejected: Sequence[Rejected],
    captions: Captions,
    tokenizer: Tokenizer | None,
) -> None:
    """Write the report on the data set of `manifest` in `root`."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    stages = {
        stage: list(found)
        for stage, found in groupby(sorted(rejected, key=lambda one: one.stage), key=lambda one: one.stage)
    }
    splits = {split: manifest.num_rows(split) for split in manifest.splits}
    kept = sum(splits.values())
    shards = [shard for one in manifest.splits.values() for shard in one]
    html = environment.get_template("quality.html.j2").render(
        settings=manifest.settings,
        fingerprint=manifest.fingerprint,
        splits=splits,
        kept=kept,
        shards=len(shards),
        gigabytes=sum(shard.bytes for shard in shards) / 1e9,
        kilobytes_per_model=sum(shard.bytes for shard in shards) / kept / 1e3,
        stages=[_Stage(name, text, stages.get(name, [])) for name, text in STAGES.items()],
        reasons={name: _by_reason(found) for name, found in stages.items()},
        total=kept + len(rejected),
        charts=_charts(counts, tokenizer),
        captions=captions,
        orphans=sorted(captions.orphans),
        pictures=_pictures(root, manifest),
    )
    with atomic_path(path, durable=True) as temporary:
        temporary.write_text(html, encoding="utf-8")


def _by_reason(rejected: Sequence[Rejected]) -> list[tuple[str, int]]:
    """Reasons with their numbers and names taken out, the most frequent first."""
    kinds = Counter(_general(one.reason) for one in rejected)
    return sorted(kinds.items(), key=lambda item: (-item[1], item[0]))


def _general(reason: str) -> str:
    """What several models have in common: without quoted names, ids and numbers."""
    return _PARTICULAR.sub("…", reason)[:120]


def _charts(counts: Sequence[ShardCounts], tokenizer: Tokenizer | None) -> list[_Chart]:
    def all_of(name: str) -> list[int]:
        return [number for one in counts for number in getattr(one, name)]

    charts = []
    if tokenizer is not None:
        charts.append(_histogram(f"Tokens of the command text, 8 bits ({tokenizer.name})", all_of("tokens")))
    charts += [
        _histogram("Characters of the command text, 8 bits", all_of("characters")),
        _histogram("Characters of the command text, 10 bits", all_of("characters_10")),
        _histogram("Extrudes per model", all_of("extrudes")),
        _histogram("Curves per model", all_of("num_curves")),
    ]
    for name in ("operations", "extents", "curves", "caption sources"):
        total: Counter[str] = Counter()
        for one in counts:
            total.update(one.kinds.get(name, {}))
        charts.append(_chart(name.capitalize(), "", total.most_common()))
    return charts


def _histogram(title: str, values: Sequence[int]) -> _Chart:
    """Bins that double: 1, 2, 3-4, 5-8, ..."""
    if not values:
        return _Chart(title, "none", [])
    bins = Counter(max(0, math.ceil(math.log2(value))) for value in values)
    median, p95 = np.percentile(values, [50, 95])
    rows = [
        (
            str(2**number) if number < 2 else f"{2 ** (number - 1) + 1:,}–{2**number:,}",
            bins.get(number, 0),
        )
        for number in range(min(bins), max(bins) + 1)
    ]
    return _chart(
        title,
        f"median {median:,.0f}, mean {np.mean(values):,.1f}, 95th percentile {p95:,.0f}, "
        f"largest {max(values):,}",
        rows,
    )


def _chart(title: str, note: str, rows: Sequence[tuple[str, int]]) -> _Chart:
    most = max((count for _, count in rows), default=1)
    return _Chart(title, note, [_Bar(label, count, 100 * count / most) for label, count in rows])


def _pictures(root: Path, manifest: Manifest) -> list[_Picture]:
    if not manifest.settings["views"]:
        return []
    splits = [ShardedSplit(root, split, manifest) for split in manifest.splits]
    total = sum(len(split) for split in splits)
    wanted = sorted({number * total // PICTURES for number in range(PICTURES)})
    pictures = []
    for number in wanted:
        for split in splits:
            if number < len(split):
                row = split.row(number)
                data = base64.b64encode(row.views[0]).decode()
                pictures.append(_Picture(row.id, row.caption, f"data:image/png;base64,{data}"))
                break
            number -= len(split)
    return pictures
