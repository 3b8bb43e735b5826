"""Is a sample usable, and if not, why: one function per question, run in worker processes."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cad_mllm.cad.worker import run_limited
from cad_mllm.config import TargetFormat
from cad_mllm.data.files import UnusableFileError, check_points, load_image, read_target
from cad_mllm.data.layout import CAPTION_KEY, POINT_SUFFIXES, Source, id_fault, view_path, walk_files
from cad_mllm.data.sequence import Modality
from cad_mllm.errors import CadError

_SAMPLES_PER_WORKER = 64
"""Fewer than this per worker are not worth the start of a process."""
_SECONDS_PER_SAMPLE = 60.0


@dataclass(frozen=True)
class Skipped:
    """A sample set aside. The reason begins with its category, details follow after `: `."""

    id: str
    file: str
    reason: str

    @property
    def category(self) -> str:
        """What samples set aside are counted by."""
        return self.reason.partition(": ")[0]


@dataclass(frozen=True)
class Candidate:
    """A sample that has a caption, and may have the rest."""

    id: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Requirements:
    """What a sample must have and how its target is written."""

    needs: frozenset[Modality]
    target_format: TargetFormat
    bits: int


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A usable sample."""

    id: str
    caption: str
    target: str
    row: int
    """Where it stands among the rows of its shards; 0 for loose files."""
    views: int
    """Pictures of it, if the run needs them."""
    sizes: tuple[int, ...]
    """Bytes of each of its files, if they are loose."""


def read_candidates(source: Source) -> tuple[list[Candidate], list[Skipped]]:
    """All samples with caption and model, sorted by id; and those set aside already."""
    captions, skipped = _read_captions(source.text)
    models = {name.removesuffix(".json") for name, _ in walk_files(source.json) if name.endswith(".json")}
    refused = {fault.id for fault in skipped}
    for sample_id in sorted(models - captions.keys() - refused):
        skipped.append(Skipped(sample_id, str(source.json_file(sample_id)), "no caption"))
    for sample_id in sorted(captions.keys() - models):
        skipped.append(Skipped(sample_id, str(source.json_file(sample_id)), "no model"))
    return [
        Candidate(sample_id, captions[sample_id]) for sample_id in sorted(captions.keys() & models)
    ], skipped


def _read_captions(root: Path) -> tuple[dict[str, str], list[Skipped]]:
    captions: dict[str, str] = {}
    skipped: list[Skipped] = []
    for name, _ in walk_files(root):
        if not name.endswith(".json"):
            continue
        path = root if root.is_file() else root / name
        try:
            entries = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            skipped.append(Skipped("", str(path), f"unreadable captions: {error}"))
            continue
        if not isinstance(entries, list):
            skipped.append(Skipped("", str(path), "unreadable captions: not a list of entries"))
            continue
        for entry in entries:
            fault = _caption_fault(entry, captions)
            if fault is None:
                captions[entry["id"]] = entry[CAPTION_KEY]
            else:
                sample_id = entry.get("id", "") if isinstance(entry, dict) else ""
                skipped.append(Skipped(str(sample_id), str(path), fault))
    return captions, skipped


def _caption_fault(entry: object, captions: dict[str, str]) -> str | None:
    if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
        return "caption entry without an id"
    fault = id_fault(entry["id"])
    if fault is not None:
        return fault
    caption = entry.get(CAPTION_KEY)
    if not isinstance(caption, str) or not caption.strip():
        return "empty caption"
    try:
        caption.encode()
    except UnicodeEncodeError:
        return "caption is not valid text"
    return "second caption for the same id" if entry["id"] in captions else None


def check(source: Source, requirements: Requirements, candidate: Candidate) -> Checked | Skipped:
    """Read everything of one sample that the run will read."""
    try:
        return _checked(source, requirements, candidate)
    except UnusableFileError as fault:
        return Skipped(candidate.id, str(fault.path), fault.reason)
    except OSError as error:  # a name too long for the file system, a disk that fails
        path = error.filename or source.json_file(candidate.id)
        return Skipped(candidate.id, str(path), f"unreadable file: {error.strerror}")


def _checked(source: Source, requirements: Requirements, candidate: Candidate) -> Checked:
    json_file = source.json_file(candidate.id)
    target = read_target(json_file, requirements.target_format, requirements.bits)
    files = [json_file]
    images: list[Path] = []
    if "points" in requirements.needs:
        assert source.points is not None, "build_index asks for the folder"
        points = source.points_file(candidate.id)
        if points is None:
            raise UnusableFileError(source.points / f"{candidate.id}{POINT_SUFFIXES[0]}", "no points")
        check_points(points)
        files.append(points)
    if "image" in requirements.needs:
        assert source.images is not None, "build_index asks for the folder"
        images = source.image_files(candidate.id)
        if not images:
            raise UnusableFileError(view_path(source.images, candidate.id, 0), "no image")
        for image in images:
            load_image(image)
        files += images
    return Checked(
        id=candidate.id,
        caption=candidate.caption,
        target=target,
        row=0,
        views=len(images),
        sizes=tuple(path.stat().st_size for path in files),
    )


def check_all(
    source: Source, requirements: Requirements, candidates: Sequence[Candidate], workers: int
) -> Iterator[Checked | Skipped]:
    """`check` of every candidate, in their order, in up to `workers` processes, each within a minute."""
    job = partial(check, source, requirements)
    processes = min(workers, len(candidates) // _SAMPLES_PER_WORKER)
    if processes <= 1:
        yield from map(job, candidates)
        return
    early: dict[int, Checked | Skipped] = {}
    expected = 0
    for number, outcome in run_limited(job, candidates, workers=processes, seconds=_SECONDS_PER_SAMPLE):
        if isinstance(outcome, CadError):
            sample_id = candidates[number].id
            outcome = Skipped(sample_id, str(source.json_file(sample_id)), f"check failed: {outcome}")
        early[number] = outcome
        while expected in early:
            yield early.pop(expected)
            expected += 1
