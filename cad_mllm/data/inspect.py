"""What is in a data set, and the sequence that training sees of one sample, for a person to check."""

import json
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cad_mllm.config import TargetFormat
from cad_mllm.data import order
from cad_mllm.data.captions import SOURCE_KEY
from cad_mllm.data.collate import IGNORED, Batch, Sample, collate, image_array, select_points
from cad_mllm.data.files import UnusableFileError
from cad_mllm.data.index import Index, IndexReport, build_index, load_index
from cad_mllm.data.layout import Source, Split, walk_files
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.sequence import MODALITIES, Combo, SequenceSpec, TextTokenizer, bos_ids, pad_id
from cad_mllm.data.shards import ShardedSplit, is_sharded, read_manifest, shard_fault
from cad_mllm.data.stores import LooseFiles, Shards, Store
from cad_mllm.errors import DataError

SPEC = SequenceSpec(
    image_tokens=256,
    image_size=224,
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
    point_tokens=257,
    num_points=4096,
    max_seq_length=2048,
)
"""The sizes of the default encoders: DINOv2-large at 224 pixels, Michelangelo's point encoder."""


@dataclass(frozen=True, kw_only=True)
class InspectSettings:
    """How to look at it."""

    split: Split = "train"
    """Where the sample comes from."""
    sample_id: str | None = None
    """Which sample; None: drawn by `seed`."""
    seed: int = 0
    target_format: TargetFormat = "command"
    bits: int = 8
    max_seq_length: int = 2048
    workers: int = 2


def inspect(location: str, tokenizer: Any, settings: InspectSettings, console: Console) -> None:
    """Print the tables. Both layouts; every checksum of a sharded data set is compared.

    `tokenizer` is one of Hugging Face. Raises DataError for a data set that is not there or damaged, and for
    an id that is not in the split.
    """
    stores = _stores(location)
    chosen = stores.get(settings.split)
    if chosen is None:
        raise DataError(f"{location} has no {settings.split} split")
    _check_sums(location, stores, console)
    with tempfile.TemporaryDirectory(prefix="cad-mllm-inspect-") as folder:
        overview = Table("split", "models", "usable", "longest", "captions", title=location)
        lengths = Table("tokens", "split", "median", "mean", "p95", "max")
        indices: dict[Split, Index] = {}
        for split, store in stores.items():
            report = _build(store, split, tokenizer, settings, Path(folder))
            indices[split] = index = load_index(report.path)
            overview.add_row(*_overview_row(store, split, report, index, settings))
            for name, counts in (("prompt", index.num_prompt_tokens), ("target", index.num_target_tokens)):
                lengths.add_row(name, split, *_distribution(counts))
        console.print(overview)
        console.print(lengths)
        if isinstance(chosen, Shards):
            console.print(_columns(stores))
        _show_sample(indices[settings.split], tokenizer, settings, console)


def _stores(location: str) -> dict[Split, Store]:
    """The splits that are there; of a folder in the Omni-CAD layout all is training data."""
    if not is_sharded(location):
        return {"train": LooseFiles(Source.existing(Path(location)))}
    manifest = read_manifest(location)
    splits: tuple[Split, ...] = ("train", "val")
    return {s: Shards(ShardedSplit(location, s, manifest)) for s in splits if manifest.num_rows(s)}


def _check_sums(location: str, stores: dict[Split, Store], console: Console) -> None:
    faults, count = [], 0
    for store in stores.values():
        if not isinstance(store, Shards):
            console.print("loose files: there are no checksums")
            return
        with SlowProgress("Comparing checksums", len(store.split.shards)) as progress:
            for shard in store.split.shards:
                fault = shard_fault(store.split.root, shard)
                faults += [fault] if fault is not None else []
                count += 1
                progress.advance()
    for fault in faults:
        console.print(Text(fault), soft_wrap=True)
    if faults:
        raise DataError(
            f"{len(faults)} of the {count} shards of {location} are not what dataset.json says (above): copy "
            "them again, or make them again with `cad-mllm prepare`"
        )
    console.print(f"checksums: all {count} shards are intact")


def _build(
    store: Store, split: Split, tokenizer: TextTokenizer, settings: InspectSettings, folder: Path
) -> IndexReport:
    return build_index(
        store,
        split,
        tokenizer,
        replace(SPEC, max_seq_length=settings.max_seq_length),
        needs=frozenset(),
        target_format=settings.target_format,
        bits=settings.bits,
        max_skipped_fraction=1.0,
        output_dir=folder,
        workers=settings.workers,
    )


def _overview_row(
    store: Store, split: Split, report: IndexReport, index: Index, settings: InspectSettings
) -> list[str]:
    unusable = [f"{count} {reason}" for reason, count in report.reasons.items()]
    if report.num_too_long:
        unusable.append(f"{report.num_too_long} longer than {settings.max_seq_length} tokens")
    used = ", ".join([str(report.num_usable), *unusable])
    longest = int((index.num_prompt_tokens + index.num_target_tokens).max())
    sources = ", ".join(f"{count} {name}" for name, count in Counter(_caption_sources(store)).most_common())
    return [split, str(report.num_candidates), used, str(longest), sources]


def _caption_sources(store: Store) -> Iterator[str]:
    if isinstance(store, Shards):
        for batch in store.split.batches(["caption", "caption_source"]):
            for caption, source in zip(batch["caption"], batch["caption_source"], strict=True):
                yield source if caption else "none"
    elif isinstance(store, LooseFiles):
        for name, _ in walk_files(store.source.text):
            path = store.source.text if store.source.text.is_file() else store.source.text / name
            try:
                entries = json.loads(path.read_bytes())
            except ValueError:
                continue  # the overview counts it as unreadable
            if isinstance(entries, list):
                yield from (entry.get(SOURCE_KEY, "given") for entry in entries if isinstance(entry, dict))


def _columns(stores: dict[Split, Store]) -> Table:
    """What the shards know of the models themselves."""
    table = Table("models", "split", "median", "mean", "p95", "max")
    for split, store in stores.items():
        assert isinstance(store, Shards)
        for name in ("num_extrudes", "num_curves"):
            values = [value for batch in store.split.batches([name]) for value in batch[name]]
            table.add_row(name.removeprefix("num_"), split, *_distribution(values))
    return table


def _distribution(values: Iterable[int]) -> list[str]:
    numbers = np.asarray(list(values))
    return [
        f"{np.median(numbers):g}",
        f"{numbers.mean():.1f}",
        f"{np.percentile(numbers, 95):g}",
        str(numbers.max()),
    ]


def _show_sample(index: Index, tokenizer: Any, settings: InspectSettings, console: Console) -> None:
    number = _number(index, settings)
    record = index.record(number)
    console.print(Text(f"\nsample {record.id}", style="bold"))
    console.print(Text(f"caption: {record.caption}"), soft_wrap=True)
    console.print(Text(f"target:  {record.target}"), soft_wrap=True)
    sample, spec = _sample(index, number, tokenizer, settings, console)
    batch = collate([sample], spec, pad_id(tokenizer))
    table = Table("positions", "part", "token", "text", "supervised")
    for row in _rows(sample, batch, spec, tokenizer):
        table.add_row(*(Text(cell) for cell in row))  # as text: brackets are no markup
    console.print(table)
    length = batch.tokens_BT.shape[1]
    console.print(f"{length} positions, {batch.num_supervised} supervised; {sample.combo}")


def _number(index: Index, settings: InspectSettings) -> int:
    if settings.sample_id is None:
        return int(order.epoch_order(len(index), settings.seed, 0, 0)[0])
    for number, sample_id in enumerate(index.ids):
        if sample_id == settings.sample_id:
            return number
    raise DataError(
        f"there is no usable sample {settings.sample_id} in the {settings.split} split: try an id such as "
        f"{index.ids[0]}"
    )


def _sample(
    index: Index, number: int, tokenizer: TextTokenizer, settings: InspectSettings, console: Console
) -> tuple[Sample, SequenceSpec]:
    """The sample with whatever modalities it has, and the sizes to collate it with."""
    sample_id, row = index.ids[number], index.row(number)
    draw = (settings.seed, 0, 0, sample_id)
    image = points = None
    try:
        picture = index.store.image(sample_id, row, 0)
        image = image_array(picture, SPEC)
        console.print(f"view 0:  {picture.width} x {picture.height} pixels")
    except UnusableFileError as error:
        console.print(Text(f"view 0:  none ({error})"), soft_wrap=True)
    try:
        cloud = index.store.points(sample_id, row)
        points = select_points(cloud, SPEC, draw)
        norms = np.linalg.norm(cloud[:, 3:], axis=1)
        low, high = cloud[:, :3].min(axis=0), cloud[:, :3].max(axis=0)
        box = " x ".join(f"{low[axis]:.3g}..{high[axis]:.3g}" for axis in range(3))
        console.print(
            f"points:  {len(cloud)} in {box}, normals of length {norms.min():.3f}..{norms.max():.3f}"
        )
    except UnusableFileError as error:
        console.print(Text(f"points:  none ({error})"), soft_wrap=True)
    present = frozenset(name for name, array in (("image", image), ("points", points)) if array is not None)
    combo: Combo = next(combo for combo, modalities in MODALITIES.items() if modalities == present)
    sample = Sample(
        id=sample_id,
        combo=combo,
        bos=bos_ids(tokenizer),
        prompt=index.prompt(number),
        target=index.target(number),
        image_3HW=image,
        points_PC=points,
    )
    longest = settings.max_seq_length + SPEC.modality_tokens(MODALITIES[combo])
    return sample, replace(SPEC, max_seq_length=longest)


def _rows(sample: Sample, batch: Batch, spec: SequenceSpec, tokenizer: Any) -> Iterator[Sequence[str]]:
    """Position, part, token id, its text, and the label's state, as they stand in the batch."""
    tokens, labels = batch.tokens_BT[0].tolist(), batch.labels_BT[0].tolist()
    parts = {int(position): "image" for position in batch.image_rows}
    parts |= {int(position): "points" for position in batch.point_rows}
    target_start = len(tokens) - len(sample.target)
    position = 0
    while position < len(tokens):
        part = parts.get(position)
        if part is not None:
            end = position + (spec.image_tokens if part == "image" else spec.point_tokens)
            assert set(labels[position:end]) == {IGNORED}, "embeddings are not learned"
            yield f"{position}..{end - 1}", part, "", f"{end - position} embeddings", ""
            position = end
            continue
        part = "BOS" if position < len(sample.bos) else "prompt" if position < target_start else "target"
        text = repr(tokenizer.decode([tokens[position]]))
        label = labels[position]
        assert label in (IGNORED, tokens[position]), "a label is its own token"
        yield str(position), part, str(tokens[position]), text, "" if label == IGNORED else "yes"
        position += 1
