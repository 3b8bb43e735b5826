"""Which samples of a split a run can use, decided once and written down for every rank.

`build_index` (one process) checks every sample and writes `<output_dir>/index-<split>.jsonl`: a header line,
then one line per usable sample. `load_index` (every rank) reads that file, and nothing else decides about a
sample: so all ranks agree. An index is used again only if nothing that it was made from has changed.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cad_mllm.config import TargetFormat
from cad_mllm.data.atomic import atomic_path
from cad_mllm.data.check import Candidate, Checked, Requirements, Skipped, check_all, read_candidates
from cad_mllm.data.layout import Source, Split, walk_files
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.sequence import (
    INSTRUCTION,
    Modality,
    SequenceSpec,
    TextTokenizer,
    bos_ids,
    prompt_ids,
    target_ids,
    tokenizer_identity,
)
from cad_mllm.errors import ConfigError, DataError

SKIPPED_FILE = "skipped.jsonl"

_FORMAT = "cad-mllm-index-1"
_TOKENIZED_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True)
class Record:
    """One usable sample. Paths are relative to the folders of the index's `Source`."""

    id: str
    caption: str
    target: str
    num_prompt_tokens: int
    """BOS (if the tokenizer adds one), instruction and caption."""
    num_target_tokens: int
    """Target text and EOS: the supervised tokens."""
    json: str
    points: str | None
    images: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """What decides, beside the files, which samples are usable and what they teach."""

    requirements: Requirements
    longest: int
    """Most tokens of a sequence, everything counted."""
    modality_tokens: int
    """Placeholders of all modalities that the run can draw, together."""


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
    reasons: dict[str, int]
    """Why samples were set aside: category -> count."""
    reused: bool
    """Nothing changed since an index was written here: it was taken as it is."""

    @property
    def too_long_share(self) -> float:
        """Share of the usable or too long samples that is dropped for its length."""
        return self.num_too_long / max(1, self.num_usable + self.num_too_long)


class Index:
    """The usable samples of a split, sorted by id. Captions and targets stay on disk until asked for."""

    def __init__(self, path: Path, header: dict[str, Any], columns: "_Columns") -> None:
        self.path = path
        self.fingerprint: str = header["fingerprint"]
        """sha256 over ids, captions, targets, file sizes, target format and bits, for checkpoints."""
        self.needs: frozenset[Modality] = frozenset(header["needs"])
        roots = header["source"]
        self.source = Source(
            text=Path(roots["text"]),
            json=Path(roots["json"]),
            points=None if roots["points"] is None else Path(roots["points"]),
            images=None if roots["images"] is None else Path(roots["images"]),
        )
        self.ids = columns.ids
        self.num_prompt_tokens = columns.num_prompt_tokens
        """int64 (num_samples,)."""
        self.num_target_tokens = columns.num_target_tokens
        """int64 (num_samples,), EOS included."""
        self._offsets = columns.offsets

    def __len__(self) -> int:
        return len(self.ids)

    def record(self, number: int) -> Record:
        """One sample, read from the file."""
        with self.path.open("rb") as file:
            file.seek(int(self._offsets[number]))
            line = file.readline()
        try:
            record = _record_of(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{self.path} was overwritten while a run used it: start the run again"
            ) from error
        if record.id != self.ids[number]:
            raise DataError(f"{self.path} was overwritten while a run used it: start the run again")
        return record


def build_index(
    source: Source,
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
) -> IndexReport:
    """Check every sample with `workers` processes and write the index, unless a current one is there.

    Call it in one process only. Samples set aside are listed in `<output_dir>/skipped.jsonl`.
    Raises DataError if more than `max_skipped_fraction` of the samples are set aside or none is left,
    ConfigError if a folder that `needs` asks for was not given.
    """
    _require_folders(source, needs)
    output_dir.mkdir(parents=True, exist_ok=True)
    path = output_dir / f"index-{split}.jsonl"
    settings = IndexSettings(
        requirements=Requirements(needs=needs, target_format=target_format, bits=bits),
        longest=spec.max_seq_length,
        modality_tokens=spec.modality_tokens(needs),
    )
    inputs = _digest_inputs(source, settings, tokenizer)
    header = _current_header(path, inputs)
    reused = header is not None and (header["num_skipped"] == 0 or (output_dir / SKIPPED_FILE).is_file())
    if header is None or not reused:
        header = _write_index(path, source, split, tokenizer, settings, inputs, workers)
    report = IndexReport(
        split=split,
        path=path,
        num_candidates=header["num_candidates"],
        num_usable=header["num_samples"],
        num_skipped=header["num_skipped"],
        num_too_long=header["num_too_long"],
        reasons=header["reasons"],
        reused=reused,
    )
    _require_enough(report, output_dir, max_skipped_fraction, spec.max_seq_length)
    return report


def load_index(path: Path) -> Index:
    """The index that `build_index` wrote; DataError if it is torn or not there."""
    loaded = _read_index(path)
    if loaded is None:
        raise DataError(f"{path} is missing or damaged: start the run again, it will be rebuilt")
    header, columns = loaded
    return Index(path, header, columns)


@dataclass(frozen=True)
class _Columns:
    ids: tuple[str, ...]
    num_prompt_tokens: np.ndarray
    num_target_tokens: np.ndarray
    offsets: np.ndarray


def _record_of(line: dict[str, Any]) -> Record:
    return Record(**{**line, "images": tuple(line["images"])})


def _require_folders(source: Source, needs: frozenset[Modality]) -> None:
    folders = {
        "points": (source.points, "--omnicad_pc_root (point clouds)"),
        "image": (source.images, "--omnicad_img_root (rendered views)"),
    }
    for modality in sorted(needs):
        folder, flag = folders[modality]
        if folder is None:
            raise ConfigError(f"a stage of this run uses {modality}, but {flag} is not given")
        if not folder.is_dir():
            raise DataError(
                f"a stage of this run uses {modality}, but there is no folder {folder}: make it with "
                f"`cad-mllm prepare`, or give {flag}"
            )


def _digest_inputs(source: Source, settings: IndexSettings, tokenizer: TextTokenizer) -> str:
    """A digest of everything that the index follows from: files (path, size, time), settings, tokenizer."""
    needs = settings.requirements.needs
    used = [source.text, source.json]
    used += [source.points] if "points" in needs and source.points else []
    used += [source.images] if "image" in needs and source.images else []
    facts = [asdict(settings), INSTRUCTION, tokenizer_identity(tokenizer)]
    digest = hashlib.sha256(json.dumps([_FORMAT, facts], sort_keys=True, default=sorted).encode())
    with SlowProgress("Looking for changed files", len(used)) as progress:
        for root in used:
            digest.update(f"\n{root.resolve()}\n".encode(errors="surrogateescape"))
            for name, stat in walk_files(root):
                digest.update(
                    f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}\n".encode(errors="surrogateescape")
                )
            progress.advance()
    return digest.hexdigest()


def _current_header(path: Path, inputs: str) -> dict[str, Any] | None:
    loaded = _read_index(path)
    return loaded[0] if loaded is not None and loaded[0]["inputs"] == inputs else None


def _read_index(path: Path) -> tuple[dict[str, Any], _Columns] | None:
    """Header and columns of an intact index, None for a missing, foreign or torn one."""
    digest = hashlib.sha256()
    ids: list[str] = []
    numbers: list[tuple[int, int, int]] = []
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
            offset = file.tell()
            for line in file:
                digest.update(line)
                entry = json.loads(line)
                ids.append(entry["id"])
                numbers.append((entry["num_prompt_tokens"], entry["num_target_tokens"], offset))
                offset += len(line)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None  # whatever a torn line holds: the caller rebuilds
    if (
        not isinstance(header, dict)
        or header.get("format") != _FORMAT
        or header["body_sha256"] != digest.hexdigest()
    ):
        return None
    columns = np.asarray(numbers, dtype=np.int64).reshape(-1, 3)
    return header, _Columns(tuple(ids), *(np.ascontiguousarray(column) for column in columns.T))


def _write_index(
    path: Path,
    source: Source,
    split: Split,
    tokenizer: TextTokenizer,
    settings: IndexSettings,
    inputs: str,
    workers: int,
) -> dict[str, Any]:
    """Check all samples, write the index and the list of those set aside; the header of the index."""
    candidates, skipped = read_candidates(source)
    num_candidates = len(candidates) + len(skipped)
    fingerprint = hashlib.sha256(
        json.dumps([settings.requirements.target_format, settings.requirements.bits]).encode()
    )
    body_digest = hashlib.sha256()
    num_samples = num_too_long = 0
    body_path = path.with_name(f".{path.name}.body")
    with body_path.open("wb") as body:
        for checked in _check_in_chunks(source, settings.requirements, candidates, workers):
            usable = [sample for sample in checked if isinstance(sample, Checked)]
            skipped += [sample for sample in checked if isinstance(sample, Skipped)]
            for sample, record in zip(usable, _tokenized(usable, tokenizer), strict=True):
                if (
                    record.num_prompt_tokens + settings.modality_tokens + record.num_target_tokens
                    > settings.longest
                ):
                    num_too_long += 1
                    continue
                line = json.dumps(asdict(record)).encode() + b"\n"
                body.write(line)
                body_digest.update(line)
                fingerprint.update(
                    json.dumps([sample.id, sample.caption, sample.target, sample.sizes]).encode()
                )
                num_samples += 1
    header = {
        "format": _FORMAT,
        "split": split,
        "inputs": inputs,
        "needs": sorted(settings.requirements.needs),
        "source": {
            name: None if root is None else str(root.absolute()) for name, root in vars(source).items()
        },
        "fingerprint": fingerprint.hexdigest(),
        "num_candidates": num_candidates,
        "num_samples": num_samples,
        "num_too_long": num_too_long,
        "num_skipped": len(skipped),
        "reasons": dict(Counter(sample.category for sample in skipped).most_common()),
        "body_sha256": body_digest.hexdigest(),
    }
    _write_skipped(path.parent / SKIPPED_FILE, split, skipped)
    with (
        atomic_path(path, durable=True) as temporary,
        temporary.open("wb") as file,
        body_path.open("rb") as body,
    ):
        file.write(json.dumps(header).encode() + b"\n")
        shutil.copyfileobj(body, file)
    body_path.unlink()
    return header


def _check_in_chunks(
    source: Source, requirements: Requirements, candidates: Sequence[Candidate], workers: int
) -> Iterator[list[Checked | Skipped]]:
    results = check_all(source, requirements, candidates, workers)
    with SlowProgress("Checking samples", len(candidates)) as progress:
        chunk: list[Checked | Skipped] = []
        for result in results:
            progress.advance()
            chunk.append(result)
            if len(chunk) == _TOKENIZED_AT_ONCE:
                yield chunk
                chunk = []
        yield chunk


def _tokenized(samples: Sequence[Checked], tokenizer: TextTokenizer) -> list[Record]:
    if not samples:
        return []
    num_bos = len(bos_ids(tokenizer))
    prompts = prompt_ids(tokenizer, [sample.caption for sample in samples])
    targets = target_ids(tokenizer, [sample.target for sample in samples])
    return [
        Record(
            id=sample.id,
            caption=sample.caption,
            target=sample.target,
            num_prompt_tokens=num_bos + len(prompt),
            num_target_tokens=len(target),
            json=sample.json,
            points=sample.points,
            images=sample.images,
        )
        for sample, prompt, target in zip(samples, prompts, targets, strict=True)
    ]


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
