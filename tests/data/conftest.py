"""A small data set in the Omni-CAD layout, made by hand: real programs, stand-in points and pictures."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cad_mllm.cad import omnicad, synth
from cad_mllm.data import prepare
from cad_mllm.data.index import Index, IndexReport, build_index, load_index
from cad_mllm.data.layout import Source
from cad_mllm.data.order import draw_combos
from cad_mllm.data.sequence import Combo, Mix, SequenceSpec, TextTokenizer
from cad_mllm.data.stores import LooseFiles
from cad_mllm.model.presets import byte_tokenizer

SPEC = SequenceSpec(
    image_tokens=3,
    image_size=8,
    image_mean=(0.5, 0.5, 0.5),
    image_std=(0.5, 0.5, 0.5),
    point_tokens=2,
    num_points=5,
    max_seq_length=4096,
)
VIEWS = 2


def draw_combo(seed: int, stage: int, epoch: int, sample_id: str, mix: Mix) -> Combo:
    """What one sample alone is fed with."""
    combos, drawn = draw_combos(seed, stage, epoch, [sample_id], mix)
    return combos[int(drawn[0])]


@pytest.fixture(scope="session")
def tokenizer() -> TextTokenizer:
    return byte_tokenizer()


@pytest.fixture(scope="session")
def model_texts() -> list[str]:
    """JSON of a few procedural models."""
    return [json.dumps(omnicad.to_json(synth.make_program(seed)[0])) for seed in range(4)]


@dataclass(frozen=True)
class Folder:
    """A data set on disk and the ids in it."""

    root: Path
    ids: tuple[str, ...]

    def file(self, kind: str, sample: int) -> Path:
        suffix = {"json": ".json", "pcd": ".npz", "img": "_000.png"}[kind]
        return self.root / kind / f"{self.ids[sample]}{suffix}"

    @property
    def caption_file(self) -> Path:
        return self.root / "txt" / "0000.json"

    def write_captions(self, entries: object) -> None:
        self.caption_file.write_text(json.dumps(entries))

    def captions(self) -> list[dict[str, str]]:
        return list(json.loads(self.caption_file.read_text()))


@pytest.fixture
def make_folder(tmp_path: Path, model_texts: Sequence[str]) -> Callable[..., Folder]:
    def make(num_samples: int = 6, name: str = "data") -> Folder:
        root = tmp_path / name
        ids = tuple(f"0000/{number:08d}_00001" for number in range(num_samples))
        for kind in ("json/0000", "pcd/0000", "img/0000", "txt"):
            (root / kind).mkdir(parents=True)
        folder = Folder(root, ids)
        for number, sample_id in enumerate(ids):
            rng = np.random.default_rng(number)
            folder.file("json", number).write_text(model_texts[number % len(model_texts)])
            normals = np.tile([[0.0, 0.0, 1.0]], (7, 1))
            points = np.concatenate([rng.normal(size=(7, 3)), normals], axis=1).astype(np.float16)
            np.savez(folder.file("pcd", number), points=points)
            for view in range(VIEWS):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / "img" / f"{sample_id}_{view:03d}.png")
        folder.write_captions([{"id": i, "text caption": f"part {n}"} for n, i in enumerate(ids)])
        return folder

    return make


@pytest.fixture
def no_worker_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `prepare` work in this process: another one takes seconds to load the geometry kernel."""

    def run_here(
        fn: Callable[[object], object], items: Sequence[object], *, workers: int, seconds: float
    ) -> Iterator[tuple[int, object]]:
        yield from ((number, fn(item)) for number, item in enumerate(items))

    monkeypatch.setattr(prepare, "run_limited", run_here)


def contents(root: Path) -> dict[str, bytes]:
    """Every file below `root` but the report, which holds times."""
    files = (path for path in root.rglob("*") if path.is_file() and path.name != prepare.REPORT_FILE)
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


Build = Callable[..., IndexReport]


@pytest.fixture
def build(tmp_path: Path, tokenizer: TextTokenizer) -> Build:
    """`build_index` with everything but the interesting arguments filled in."""

    def build_with(folder: Folder, *, spec: SequenceSpec = SPEC, **changes: object) -> IndexReport:
        settings: dict[str, object] = {
            "store": LooseFiles(Source.from_folder(folder.root)),
            "split": "train",
            "tokenizer": tokenizer,
            "spec": spec,
            "needs": frozenset({"points", "image"}),
            "target_format": "command",
            "bits": 8,
            "max_skipped_fraction": 1.0,
            "output_dir": tmp_path / "out",
            "workers": 0,
        }
        return build_index(**(settings | changes))  # type: ignore[arg-type]

    return build_with


@pytest.fixture
def index(make_folder: Callable[..., Folder], build: Build) -> Index:
    return load_index(build(make_folder(11)).path)
