"""Which samples of a split a run can use, and their tokens, decided once and written down for every rank.

`build_index` (one process) checks every sample and writes `<output_dir>/index-<split>.bin`: columns of ids,
texts, token ids and where each sample is read from. `load_index` (every rank) maps that file, and nothing
else decides about a sample: so all ranks agree, no text is tokenised while training, and a rank holds next to
nothing of its own, however many samples there are. An index is used again only if nothing that it was made
from has changed.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from cad_mllm.config import TargetFormat
from cad_mllm.data.atomic import atomic_path
from cad_mllm.data.augment import Augmentation, Variant, draw_variant, removable_features, split_features
from cad_mllm.data.check import Checked, Requirements, Skipped
from cad_mllm.data.columns import Arrays, ColumnsWriter, read_columns
from cad_mllm.data.layout import Split
from cad_mllm.data.sequence import (
    INSTRUCTION,
    Modality,
    SequenceSpec,
    TextTokenizer,
    bos_ids,
    inner_ids,
    prompt_ids,
    target_ids,
    tokenizer_identity,
)
from cad_mllm.data.stores import Store, open_store
from cad_mllm.errors import DataError

SKIPPED_FILE = "skipped.jsonl"

_FORMAT = "cad-mllm-index-3"
_TOKENIZED_AT_ONCE = 256

_LISTS = {
    "id": "|u1",
    "caption": "|u1",
    "text": "|u1",
    "prompt": "<i4",
    "target": "<i4",
    "instruction": "<i4",
    "feature": "<i4",
    "removable": "<i4",
    "prefix_note": "<i4",
    "removal_note": "<i4",
}
"""Columns with a list per sample (the notes: per feature number): the lists one after the other.

`id`, `caption`, `text` (the target) in UTF-8. `prompt` without BOS, `target` with EOS. `instruction`: one
list, the prompt of any sample that is given without its caption. `feature`: target tokens up to the end of
each feature; `removable`: the numbers, from 1, of the features that may be left out; both empty unless the
run augments its data. `prefix_note[k - 1]`, `removal_note[j - 1]`: tokens of `Variant.note`.
"""
_ENDS = "_end"
"""Name of the column beside each of those: [0, end of the first list, end of the second, ...]."""
_NUMBERS = {"row": "<i8", "views": "<i4"}
_DTYPES = {**_LISTS, **{name + _ENDS: "<i8" for name in _LISTS}, **_NUMBERS}


@dataclass(frozen=True, kw_only=True)
class Record:
    """One usable sample, as text."""

    id: str
    caption: str
    target: str


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What decides, beside the files, which samples are usable and what they teach."""

    requirements: Requirements
    longest: int
    """Most tokens of a sequence, everything counted."""
    modality_tokens: int
    """Placeholders of all modalities that the run can draw, together."""
    augmented: bool
    """Whether parts of programs are targets too: then their borders are looked for."""


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """What the check found; to be told before training starts."""

    split: Split
    path: Path
    num_candidates: int
    """Models and captions together."""
    num_usable: int
    num_skipped: int
    num_too_long: int
    """Usable but for their length; not among the skipped."""
    num_with_parts: int | None
    """Usable ones that can be augmented; None for a run that does not."""
    reasons: dict[str, int]
    """Why samples were set aside: category -> count."""
    reused: bool
    """Nothing changed since an index was written here: it was taken as it is."""

    @property
    def too_long_share(self) -> float:
        """Share of the usable or too long samples that is dropped for its length."""
        return self.num_too_long / max(1, self.num_usable + self.num_too_long)


class Index:
    """The usable samples of a split, sorted by id. All columns stay in the mapped file until asked for."""

    def __init__(self, path: Path, header: dict[str, Any], arrays: Arrays) -> None:
        self.path = path
        self.fingerprint: str = header["fingerprint"]
        """sha256 over ids, captions, targets, file sizes, target format and bits, for checkpoints."""
        self.needs: frozenset[Modality] = frozenset(header["needs"])
        self.store: Store = open_store(header["store"])
        self.num_prompt_tokens = np.diff(arrays["prompt" + _ENDS]) + header["num_bos"]
        """int64 (num_samples,) of whole samples: BOS (if the tokenizer adds one), instruction, caption."""
        self.num_instruction_tokens = len(arrays["instruction"]) + int(header["num_bos"])
        """The same of any sample without its caption: BOS and instruction."""
        self.num_target_tokens = np.diff(arrays["target" + _ENDS])
        """int64 (num_samples,) of whole samples: target text and EOS, the supervised tokens."""
        self.ids = _Ids(self)
        self._digest: str = header["body_sha256"]
        self._arrays = arrays

    def __reduce__(self) -> tuple[Callable[..., "Index"], tuple[Path, str]]:
        return _load_same, (self.path, self._digest)

    def __len__(self) -> int:
        return len(self.num_target_tokens)

    def record(self, number: int) -> Record:
        """One sample as text."""
        return Record(
            id=self._text("id", number),
            caption=self._text("caption", number),
            target=self._text("text", number),
        )

    def row(self, number: int) -> int:
        """Where the sample stands in its store."""
        return int(self._arrays["row"][number])

    def num_views(self, number: int) -> int:
        """Pictures of a sample; 0 if the run needs none."""
        return int(self._arrays["views"][number])

    def prompt(self, number: int, variant: Variant | None = None, *, captioned: bool = True) -> list[int]:
        """Ids of instruction, caption (if wanted) and the variant's note, without BOS."""
        ids = self._list("prompt", number) if captioned else self._list("instruction", 0)
        return [*ids.tolist(), *([] if variant is None else self._note(variant).tolist())]

    def target(self, number: int, variant: Variant | None = None) -> list[int]:
        """Ids of the target text, or of the part that the variant asks for, and EOS."""
        ids = self._list("target", number)
        if variant is None:
            return list(ids.tolist())
        start, end = self._left_out(number, variant)
        return [*ids[:start].tolist(), *ids[end:].tolist()]

    def num_tokens(
        self, number: int, variant: Variant | None = None, *, captioned: bool = True
    ) -> tuple[int, int]:
        """Prompt tokens (BOS counted) and target tokens (EOS counted) of a sample as it is given."""
        prompt = int(self.num_prompt_tokens[number]) if captioned else self.num_instruction_tokens
        target = int(self.num_target_tokens[number])
        if variant is None:
            return prompt, target
        start, end = self._left_out(number, variant)
        return prompt + len(self._note(variant)), target - (end - start)

    def draw_variant(
        self, number: int, augmentation: Augmentation, seed: int, stage: int, epoch: int
    ) -> Variant | None:
        """What a sample is given as in an epoch; see `cad_mllm.data.augment`."""
        features = self._list("feature", number)
        if not augmentation.parts or len(features) < 2:
            return None
        removable = self._list("removable", number).tolist()
        variant = draw_variant(augmentation, (seed, stage, epoch, self.ids[number]), len(features), removable)
        if variant is not None:
            start, end = self._left_out(number, variant)
            if len(self._note(variant)) > end - start:
                return None
        return variant

    def _left_out(self, number: int, variant: Variant) -> tuple[int, int]:
        """The target tokens [start, end) that a variant lacks."""
        features = self._list("feature", number)
        if variant.kind == "prefix":
            return int(features[variant.feature - 1]), int(features[-1])
        return int(features[variant.feature - 2]), int(features[variant.feature - 1])

    def _note(self, variant: Variant) -> npt.NDArray[np.int32]:
        return self._list(f"{variant.kind}_note", variant.feature - 1)

    def _list(self, column: str, number: int) -> npt.NDArray[Any]:
        ends = self._arrays[column + _ENDS]
        if not 0 <= number < len(ends) - 1:
            raise IndexError(number)
        return self._arrays[column][ends[number] : ends[number + 1]]

    def _text(self, column: str, number: int) -> str:
        return bytes(self._list(column, number)).decode()


class _Ids(Sequence[str]):
    """The ids of an index, read from it one by one."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, number: int) -> str: ...
    @overload
    def __getitem__(self, number: slice) -> Sequence[str]: ...
    def __getitem__(self, number: int | slice) -> str | Sequence[str]:
        if isinstance(number, slice):
            return [self[n] for n in range(*number.indices(len(self)))]
        return self._index._text("id", number)


def build_index(
    store: Store,
    split: Split,
    tokenizer: TextTokenizer,
    spec: SequenceSpec,
    *,
    needs: frozenset[Modality],
    target_format: TargetFormat,
    bits: int,
    max_skipped_fraction: float,
    output_dir: Path,
    workers: int,
    augmented: bool = False,
) -> IndexReport:
    """Check every sample with `workers` processes and write the index, unless a current one is there.

    Call it in one process only. Samples set aside are listed in `<output_dir>/skipped.jsonl`.
    Raises DataError if more than `max_skipped_fraction` of the samples are set aside or none is left, and for
    a shard that is not what its checksum says; ConfigError if a folder that `needs` asks for was not given.
    """
    store.require(needs)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"index-{split}.bin"
    settings = IndexSettings(
        requirements=Requirements(needs=needs, target_format=target_format, bits=bits),
        longest=spec.max_seq_length,
        modality_tokens=spec.modality_tokens(needs),
        augmented=augmented,
    )
    inputs = _digest_inputs(store, settings, tokenizer)
    header = _current_header(path, inputs)
    reused = header is not None and (header["num_skipped"] == 0 or (output_dir / SKIPPED_FILE).is_file())
    if header is None or not reused:
        header = _write_index(path, store, split, tokenizer, settings, inputs, workers)
    report = IndexReport(
        split=split,
        path=path,
        num_candidates=header["num_candidates"],
        num_usable=header["num_samples"],
        num_skipped=header["num_skipped"],
        num_too_long=header["num_too_long"],
        num_with_parts=header["num_with_parts"] if augmented else None,
        reasons=header["reasons"],
        reused=reused,
    )
    _require_enough(report, output_dir, max_skipped_fraction, spec.max_seq_length)
    return report


def load_index(path: Path) -> Index:
    """The index that `build_index` wrote; DataError if it is torn or not there."""
    loaded = read_columns(path, verify=False)
    if loaded is None or loaded[0].get("format") != _FORMAT:
        raise DataError(f"{path} is missing or damaged: start the run again, it will be rebuilt")
    return Index(path, *loaded)


def _load_same(path: Path, digest: str) -> Index:
    index = load_index(path)
    if index._digest != digest:
        raise DataError(f"{path} was overwritten while a run used it: start the run again")
    return index


def _digest_inputs(store: Store, settings: IndexSettings, tokenizer: TextTokenizer) -> str:
    """A digest of everything that the index follows from: files (path, size, time), settings, tokenizer."""
    facts = [asdict(settings), INSTRUCTION, tokenizer_identity(tokenizer)]
    digest = hashlib.sha256(json.dumps([_FORMAT, facts], sort_keys=True, default=sorted).encode())
    for line in store.facts(settings.requirements.needs):
        digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()


def _current_header(path: Path, inputs: str) -> dict[str, Any] | None:
    loaded = read_columns(path, verify=True)
    if loaded is None or loaded[0].get("format") != _FORMAT:
        return None
    return loaded[0] if loaded[0]["inputs"] == inputs else None


class _Body:
    """The columns of an index that is being written."""

    def __init__(self, writer: ColumnsWriter) -> None:
        self._writer = writer
        self._ends = dict.fromkeys(_LISTS, 0)
        for name in _LISTS:
            writer.add(name + _ENDS, [0])

    def add_lists(self, name: str, lists: Sequence[Sequence[int]]) -> None:
        """A list per sample, for some samples at once: a call of numpy costs as much as a short list."""
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        self._writer.add(name, np.fromiter(chain.from_iterable(lists), _LISTS[name], lengths.sum()))
        self._add_ends(name, lengths)

    def add_texts(self, name: str, texts: Sequence[str]) -> None:
        encoded = [text.encode() for text in texts]
        self._writer.add(name, np.frombuffer(b"".join(encoded), np.uint8))
        self._add_ends(name, np.fromiter(map(len, encoded), np.int64, len(encoded)))

    def add_numbers(self, name: str, values: Sequence[int]) -> None:
        self._writer.add(name, values)

    def _add_ends(self, name: str, lengths: npt.NDArray[np.int64]) -> None:
        ends = self._ends[name] + np.cumsum(lengths)
        self._writer.add(name + _ENDS, ends)
        self._ends[name] += int(lengths.sum())


@dataclass(frozen=True, kw_only=True)
class _Tokenized:
    sample: Checked
    prompt: list[int]
    target: list[int]
    features: list[int]
    removable: list[int]


def _write_index(
    path: Path,
    store: Store,
    split: Split,
    tokenizer: TextTokenizer,
    settings: IndexSettings,
    inputs: str,
    workers: int,
) -> dict[str, Any]:
    """Check all samples, write the index and the list of those set aside; the header of the index."""
    requirements = settings.requirements
    identity = [requirements.target_format, requirements.bits, *([store.identity] if store.identity else [])]
    fingerprint = hashlib.sha256(json.dumps(identity).encode())
    num_bos = len(bos_ids(tokenizer))
    room = settings.longest - settings.modality_tokens - num_bos
    num_candidates = num_samples = num_too_long = num_with_parts = most_features = 0
    skipped: list[Skipped] = []
    with ColumnsWriter(path, _DTYPES) as writer:
        body = _Body(writer)
        for chunk in _in_chunks(store.check(requirements, workers)):
            num_candidates += len(chunk)
            skipped += [one for one in chunk if isinstance(one, Skipped)]
            usable = [one for one in chunk if isinstance(one, Checked)]
            tokenized = _tokenized(usable, tokenizer, settings)
            fitting = [one for one in tokenized if len(one.prompt) + len(one.target) <= room]
            num_too_long += len(tokenized) - len(fitting)
            num_samples += len(fitting)
            samples = [one.sample for one in fitting]
            body.add_texts("id", [sample.id for sample in samples])
            body.add_texts("caption", [sample.caption for sample in samples])
            body.add_texts("text", [sample.target for sample in samples])
            body.add_lists("prompt", [one.prompt for one in fitting])
            body.add_lists("target", [one.target for one in fitting])
            body.add_lists("feature", [one.features for one in fitting])
            body.add_lists("removable", [one.removable for one in fitting])
            body.add_numbers("row", [sample.row for sample in samples])
            body.add_numbers("views", [sample.views for sample in samples])
            for one in samples:
                fingerprint.update(json.dumps([one.id, one.caption, one.target, one.sizes]).encode())
            num_with_parts += sum(len(one.features) > 1 for one in fitting)
            most_features = max([most_features, *(len(one.features) for one in fitting)])
        body.add_lists("instruction", prompt_ids(tokenizer, [""]))
        _add_notes(body, tokenizer, most_features)
        header = writer.finish(
            {
                "format": _FORMAT,
                "split": split,
                "inputs": inputs,
                "needs": sorted(requirements.needs),
                "store": store.describe(),
                "fingerprint": fingerprint.hexdigest(),
                "num_bos": num_bos,
                "num_candidates": num_candidates,
                "num_samples": num_samples,
                "num_too_long": num_too_long,
                "num_with_parts": num_with_parts,
                "num_skipped": len(skipped),
                "reasons": dict(Counter(sample.category for sample in skipped).most_common()),
            }
        )
    _write_skipped(path.parent / SKIPPED_FILE, split, skipped)
    return header


def _in_chunks(checked: Iterator[Checked | Skipped]) -> Iterator[list[Checked | Skipped]]:
    while chunk := list(islice(checked, _TOKENIZED_AT_ONCE)):
        yield chunk


def _tokenized(
    samples: Sequence[Checked], tokenizer: TextTokenizer, settings: IndexSettings
) -> list[_Tokenized]:
    if not samples:
        return []
    prompts = prompt_ids(tokenizer, [sample.caption for sample in samples])
    targets = target_ids(tokenizer, [sample.target for sample in samples])
    parts: Iterable[tuple[list[int], list[int]]] = [([], [])] * len(samples)
    if settings.augmented:
        parts = _parts(samples, targets, tokenizer, settings)
    return [
        _Tokenized(sample=sample, prompt=prompt, target=target, features=features, removable=removable)
        for sample, prompt, target, (features, removable) in zip(
            samples, prompts, targets, parts, strict=True
        )
    ]


def _parts(
    samples: Sequence[Checked],
    targets: Sequence[list[int]],
    tokenizer: TextTokenizer,
    settings: IndexSettings,
) -> Iterator[tuple[list[int], list[int]]]:
    """Where the features of each target end, in tokens, and the numbers of those that may be left out.

    Nothing for a tokenizer that writes the end of one feature and the begin of the next as one token: such a
    target has no parts.
    """
    texts = [split_features(sample.target) for sample in samples]
    pieces_of_all = [text for several in texts if len(several) > 1 for text in several]
    ids = iter(inner_ids(tokenizer, pieces_of_all) if pieces_of_all else [])
    for sample, target, several in zip(samples, targets, texts, strict=True):
        found = list(islice(ids, len(several))) if len(several) > 1 else []
        pieces = [piece for piece in found if piece is not None]
        if len(pieces) < len(several) or [token for piece in pieces for token in piece] != target[:-1]:
            yield [], []
            continue
        may_go = removable_features(sample.target, settings.requirements.bits)
        ends = np.cumsum([len(piece) for piece in pieces]).tolist()
        yield ends, [number for number, may in enumerate(may_go, start=1) if may]


def _add_notes(body: _Body, tokenizer: TextTokenizer, most_features: int) -> None:
    numbers = range(1, most_features + 1)
    for column, notes in (
        ("prefix_note", [Variant("prefix", number).note for number in numbers]),
        ("removal_note", [Variant("removal", number).note for number in numbers]),
    ):
        body.add_lists(column, [ids[:-1] for ids in target_ids(tokenizer, notes)] if notes else [])


def _write_skipped(path: Path, split: Split, skipped: Sequence[Skipped]) -> None:
    """Put this split's samples into the list; those of the other split stay."""
    kept = []
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if not line.startswith(_split_prefix(split))]
    own = [json.dumps({"split": split, **asdict(sample)}) for sample in skipped]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in [*kept, *own]), encoding="utf-8")


def _split_prefix(split: Split) -> str:
    return json.dumps({"split": split}).removesuffix("}")


def _require_enough(report: IndexReport, output_dir: Path, max_skipped_fraction: float, longest: int) -> None:
    share = report.num_skipped / max(1, report.num_candidates)
    reasons = ", ".join(f"{reason} ({count})" for reason, count in list(report.reasons.items())[:3])
    if share > max_skipped_fraction:
        raise DataError(
            f"{report.num_skipped} of {report.num_candidates} {report.split} samples ({share:.1%}) cannot be "
            f"used: {reasons}; all are listed in {output_dir / SKIPPED_FILE}. Mend them, or allow more with "
            f"--max_skipped_fraction (now {max_skipped_fraction:g})"
        )
    if report.num_usable == 0:
        raise DataError(
            f"none of {report.num_candidates} {report.split} samples is usable: {report.num_too_long} are "
            f"longer than --max_seq_length {longest}, {report.num_skipped} were set aside {reasons}".rstrip()
        )
