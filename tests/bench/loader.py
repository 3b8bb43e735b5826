"""How many samples a second the loader gives, and whether its memory stays flat.

    python tests/bench/loader.py --folder /tmp/loader-bench [--rows 4000] [--samples 100000] [--workers 2]

Makes `--models` procedural models with 10,000 points and 8 views each, and a sharded data set of `--rows`
rows of them, in `--folder` (kept, and used again); the programs that they are to teach are those of the real
files in `tests/data/omnicad`, which are longer. Then iterates over `--samples` samples of each modality
combination with `--workers` loader processes, in micro-batches of 32, shuffled, over as many epochs as that
takes; the shards are in the page cache from the second epoch on. Prints one JSON object.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))

from cad_mllm.cad import codec, omnicad  # noqa: E402
from cad_mllm.cad.normalise import normalise  # noqa: E402
from cad_mllm.data.dummy import write_dummy_data  # noqa: E402
from cad_mllm.data.files import load_points  # noqa: E402
from cad_mllm.data.index import Index, build_index, load_index  # noqa: E402
from cad_mllm.data.layout import view_path  # noqa: E402
from cad_mllm.data.loader import StepLoader  # noqa: E402
from cad_mllm.data.sequence import Combo, SequenceSpec, TextTokenizer  # noqa: E402
from cad_mllm.data.shards import (  # noqa: E402
    INDEX_FILE,
    Manifest,
    ModelRow,
    ShardedSplit,
    ShardWriter,
    read_manifest,
    write_manifest,
)
from cad_mllm.data.stores import Shards  # noqa: E402

POINTS, VIEWS, SIZE = 10_000, 8, 224
ROWS_PER_SHARD = 1000
BATCH_SIZE = 32
SPEC = SequenceSpec(
    image_tokens=256,
    image_size=SIZE,
    image_mean=(0.485, 0.456, 0.406),
    image_std=(0.229, 0.224, 0.225),
    point_tokens=257,
    num_points=4096,
    max_seq_length=4096,
)


def rows_of(folder: Path, models: int) -> list[ModelRow]:
    """The models as rows; made through the same path as real data."""
    write_dummy_data(
        folder, models, seed=1, workers=os.cpu_count() or 1, points=POINTS, views=VIEWS, size=SIZE
    )
    found = []
    real = sorted((ROOT / "tests" / "data" / "omnicad" / "json").rglob("*.json"))
    for path in sorted((folder / "json").rglob("*.json")):
        sample_id = path.relative_to(folder / "json").as_posix().removesuffix(".json")
        normalised = normalise(omnicad.read(real[len(found) % len(real)]))
        found.append(
            ModelRow(
                id=sample_id,
                caption="A part of several features, sketched with lines and arcs, and of this or that size.",
                caption_source="procedural",
                json=path.read_text(),
                command_8=codec.encode(normalised.program, bits=8),
                command_10=codec.encode(normalised.program, bits=10),
                points=load_points(folder / "pcd" / f"{sample_id}.npz").astype(np.float16),
                views=tuple(view_path(folder / "img", sample_id, view).read_bytes() for view in range(VIEWS)),
                scale=normalised.scale,
                center=normalised.center,
                num_extrudes=len(normalised.program.extrudes),
                num_curves=0,
            )
        )
    return found


def make_shards(root: Path, models: list[ModelRow], rows: int) -> None:
    """A data set of `rows` rows, the models over and over."""
    if (root / INDEX_FILE).is_file() and read_manifest(root).num_rows("train") == rows:
        return
    shards = []
    for start in range(0, rows, ROWS_PER_SHARD):
        with ShardWriter(root, f"train/{len(shards):05d}.arrow", points=POINTS) as writer:
            for number in range(start, min(rows, start + ROWS_PER_SHARD)):
                writer.add(dataclasses.replace(models[number % len(models)], id=f"{number:08d}"))
        shards.append(writer.shard)
    write_manifest(
        root, Manifest(settings={"points": POINTS, "views": VIEWS}, splits={"train": tuple(shards)})
    )


def own_memory(pids: list[int]) -> float:
    """Megabytes that these processes hold and no file stands behind (shared memory of batches counted)."""
    total = 0
    for pid in pids:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem")))
    return total / 1024


def with_descendants(pid: int) -> list[int]:
    """A process, those that it started, and those that they did: the loader's come from one of them."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for path in tasks for child in path.read_text().split()]
    return [pid, *(found for child in children for found in with_descendants(child))]


def cpu_seconds(pids: list[int]) -> float:
    """User and system time of these processes so far: what the work costs, whoever else uses the machine."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(
    index: Index, tokenizer: TextTokenizer, combo: Combo, samples: int, workers: int
) -> dict[str, float]:
    """Speed and CPU time from the second quarter on; memory at that point and at the end."""
    loader = StepLoader(
        index,
        tokenizer,
        SPEC,
        seed=1,
        stage=3,
        mix={combo: 1.0},
        batch_size=BATCH_SIZE,
        accumulation=1,
        rank=0,
        world_size=1,
        num_workers=workers,
        start_step=0,
        num_steps=samples // BATCH_SIZE,
    )
    marks = {}
    for step in loader:
        assert not step.lost
        if step.index in (len(loader) // 4, len(loader) - 8):  # before the workers end
            pids = with_descendants(os.getpid())
            marks[step.index] = time.perf_counter(), cpu_seconds(pids), own_memory(pids)
    (first, before), (last, after) = marks.items()
    count = (last - first) * BATCH_SIZE
    seconds, cpu = after[0] - before[0], after[1] - before[1]
    return {
        "samples/s": round(count / seconds),
        "CPU ms a sample": round(cpu / count * 1000, 3),
        "samples/s of two cores to itself": round(2 * count / cpu),
        "MB after a quarter": round(before[2]),
        "MB at the end": round(after[2]),
    }


def main(argv: list[str]) -> None:
    """Make the data, measure, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--models", type=int, default=64)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--tokenizer", type=Path, help="folder of a Hugging Face tokenizer (default: bytes)")
    parser.add_argument("--combos", nargs="+", default=["text", "text+points+image"])
    arguments = parser.parse_args(argv)
    if arguments.tokenizer is None:
        from cad_mllm.model.presets import byte_tokenizer

        tokenizer = byte_tokenizer()
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    root = arguments.folder / "shards"
    make_shards(root, rows_of(arguments.folder / "models", arguments.models), arguments.rows)
    started = time.perf_counter()
    report = build_index(
        Shards(ShardedSplit(root, "train")),
        "train",
        tokenizer,
        SPEC,
        needs=frozenset({"points", "image"}),
        target_format="command",
        bits=8,
        max_skipped_fraction=0.0,
        output_dir=arguments.folder / "out",
        workers=arguments.workers,
    )
    seconds = time.perf_counter() - started
    index = load_index(report.path)
    result: dict[str, object] = {
        "rows": len(index),
        "MB of shards": round(sum(s.bytes for s in read_manifest(root).shards) / 2**20),
        "mean target tokens": round(float(index.num_target_tokens.mean())),
        "index s": None if report.reused else round(seconds, 1),
        "workers": arguments.workers,
    }
    for combo in arguments.combos:
        result[combo] = measure(index, tokenizer, combo, arguments.samples, arguments.workers)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
