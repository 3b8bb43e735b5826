"""A small multimodal data set in the Omni-CAD layout, without the geometry kernel: fast, always the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cad_mllm.cad import omnicad, synth
from cad_mllm.cad.mesh import mesh_by_manifold

SHORT_SEEDS = (11, 23, 0, 19, 3, 25, 1, 51)
"""Procedural models with short programs: these tests compare numbers, and bf16 is slow on a CPU."""
NUM_SAMPLES = len(SHORT_SEEDS)


def write_data(root: Path, *, caption: str | None = None) -> Path:
    """Procedural models with points and a picture; one and the same caption for all if it is given."""
    entries = []
    for number, seed in enumerate(SHORT_SEEDS):
        sample_id = f"0000/{number:08d}_00001"
        program, _ = synth.make_program(seed)
        entries.append({"id": sample_id, "text caption": caption or f"Part {number}."})
        points = mesh_by_manifold(program).sample(512, seed=number)
        pixels = np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8)
        for folder in ("json", "pcd", "img"):
            (root / folder / "0000").mkdir(parents=True, exist_ok=True)
        (root / "json" / f"{sample_id}.json").write_text(json.dumps(omnicad.to_json(program)))
        np.savez(root / "pcd" / f"{sample_id}.npz", points=points)
        Image.fromarray(pixels).save(root / "img" / f"{sample_id}_000.png")
    (root / "txt").mkdir()
    (root / "txt" / "0000.json").write_text(json.dumps(entries))
    return root


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))
