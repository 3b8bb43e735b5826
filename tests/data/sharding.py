"""A folder in the Omni-CAD layout as a sharded data set, for tests."""

import json
from pathlib import Path

import numpy as np

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.normalise import normalise
from cad_mllm.data.layout import CAPTION_KEY, Source, Split
from cad_mllm.data.shards import Manifest, ModelRow, Shard, ShardWriter, write_manifest


def shard_folder(folder: Path, root: Path, *, rows: int = 4, num_val: int = 0) -> Path:
    """The samples of `folder` as a data set at `root`, the last `num_val` as its val split."""
    source = Source.from_folder(folder)
    entries = [entry for path in sorted(source.text.glob("*.json")) for entry in json.loads(path.read_text())]
    models = [
        _row(source, entry["id"], entry[CAPTION_KEY]) for entry in sorted(entries, key=lambda e: e["id"])
    ]
    border = len(models) - num_val
    splits: dict[Split, tuple[Shard, ...]] = {}
    for split, part in (("train", models[:border]), ("val", models[border:])):
        shards = []
        for start in range(0, len(part), rows):
            file = f"{split}/{len(shards):05d}.arrow"
            with ShardWriter(root, file, points=len(models[0].points)) as writer:
                for model in part[start : start + rows]:
                    writer.add(model)
            shards.append(writer.shard)
        splits[split] = tuple(shards)  # type: ignore[index]
    settings = {"points": len(models[0].points), "views": len(models[0].views)} if models else {}
    write_manifest(root, Manifest(settings=settings, splits=splits))
    return root


def _row(source: Source, sample_id: str, caption: str) -> ModelRow:
    json_file, points_file = source.json_file(sample_id), source.points_file(sample_id)
    assert points_file is not None
    normalised = normalise(omnicad.read(json_file))
    with np.load(points_file) as stored:
        points = stored["points"].astype(np.float16)
    return ModelRow(
        id=sample_id,
        caption=caption,
        caption_source="given",
        json=json.dumps(json.loads(json_file.read_bytes()), separators=(",", ":"), ensure_ascii=False),
        command_8=codec.encode(normalised.program, bits=8),
        command_10=codec.encode(normalised.program, bits=10),
        points=points,
        views=tuple(path.read_bytes() for path in source.image_files(sample_id)),
        scale=normalised.scale,
        center=normalised.center,
        num_extrudes=len(normalised.program.extrudes),
        num_curves=1,
    )
