"""`make demo`: data, training of all three stages under ZeRO-3, generation for held-out inputs, a report.

Everything goes through the code that real runs use; nothing here knows better than the trained model.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from cad_mllm.artifacts import Artifact, write_artifacts
from cad_mllm.cad import omnicad
from cad_mllm.cad.normalise import normalise
from cad_mllm.cli import run_and_exit
from cad_mllm.data import preview
from cad_mllm.data.dummy import write_dummy_data
from cad_mllm.data.files import load_image, load_points
from cad_mllm.data.layout import CAPTION_KEY, Source, view_path
from cad_mllm.errors import ExitCode
from cad_mllm.report import ReportSample, read_metrics, write_report

_ROOT = Path(__file__).resolve().parent.parent
_OUT = Path("outputs/demo")
_CONFIG = "configs/train/demo.yaml"
_ZERO = "configs/deepspeed/ds_zero3_config.json"
_RANKS = 2
_TRAIN_SAMPLES, _TRAIN_SEED = 256, 1
_TRAIN_VIEW_SIZE = 112
"""Pixels; the tiny vision encoder takes half of that, and drawing is most of the work."""
_HELD_OUT_SEED = 2
_MODALITIES = ("text+points",) * 4 + ("text",) * 2 + ("text+points+image",) * 2
"""What the model is given for each held-out sample."""
_MAX_NEW_TOKENS = 700
_PICTURE_SIZE = 448

Points = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """One sample that the training never saw."""

    id: str
    caption: str
    modalities: str
    points_NC: Points | None
    """(N, 6), if the model is given them."""
    image: Path | None

    @property
    def name(self) -> str:
        """Name of its files."""
        return self.id.replace("/", "_")


def main() -> ExitCode:
    """Run the demo in the current folder."""
    console = Console(highlight=False)
    started = time.monotonic()
    report = run_demo(_OUT, console)
    console.print(f"\nDone in {time.monotonic() - started:.0f} s. Look at {report.resolve()}", soft_wrap=True)
    return ExitCode.DONE


def run_demo(out: Path, console: Console) -> Path:
    """Write data, train, generate, report; returns the HTML file."""
    console.rule("1 of 3  data")
    cores = os.cpu_count() or 1
    train = out / "data" / "train"
    write_dummy_data(train, _TRAIN_SAMPLES, _TRAIN_SEED, workers=cores, size=_TRAIN_VIEW_SIZE)
    write_dummy_data(out / "data" / "held_out", len(_MODALITIES), _HELD_OUT_SEED, workers=cores)

    console.rule(f"2 of 3  training: three stages, ZeRO-3, {_RANKS} processes")
    for earlier in ("training", "generated", "truth"):
        shutil.rmtree(out / earlier, ignore_errors=True)
    started = time.monotonic()
    _train(out)
    seconds = time.monotonic() - started

    console.rule("3 of 3  generation for held-out inputs")
    source = Source.from_folder(out / "data" / "held_out")
    samples = _held_out(source)
    metrics = out / "training" / "metrics.jsonl"
    curves = read_metrics(metrics)
    summary = {
        "training": f"{max(curves.stages)} stages, {curves.steps[-1]} steps",
        "time": f"{seconds:.0f} s",
        "processes": f"{_RANKS} (ZeRO-3, CPU)",
        "training models": _TRAIN_SAMPLES,
        "loss, first and last": f"{curves.losses[0]:.2f}, {curves.losses[-1]:.2f}",
    }
    shown = _generate(out, samples, source)
    for sample in shown:
        outcome = "solid" if sample.error is None else f"no solid: {sample.error}"
        console.print(f"  {sample.id}  {sample.modalities:<18} {outcome}", soft_wrap=True, markup=False)
    return write_report(out, shown, metrics, summary)


def _train(out: Path) -> None:
    """Launch the training as a person would, and let it write to this terminal."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(_RANKS)]
    command += [str(_ROOT / "cad_mllm" / "train_curriculum.py"), "--config", str(_ROOT / _CONFIG)]
    command += ["--deepspeed", "--deepspeed_config", str(_ROOT / _ZERO)]
    command += ["--train_data_path", str(out / "data" / "train"), "--output_dir", str(out / "training")]
    command += ["--val_data_path", str(out / "data" / "held_out")]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, env=environment, check=False)
    if finished.returncode != 0:
        sys.exit(f"error: the training ended with exit code {finished.returncode}; see its message above")


def _held_out(source: Source) -> list[HeldOut]:
    entries = [entry for file in sorted(source.text.glob("*.json")) for entry in json.loads(file.read_text())]
    samples = []
    for entry, modalities in zip(entries, _MODALITIES, strict=True):
        points_file = source.points_file(entry["id"])
        assert points_file is not None and source.images is not None
        samples.append(
            HeldOut(
                id=entry["id"],
                caption=entry[CAPTION_KEY],
                modalities=modalities,
                points_NC=load_points(points_file) if "points" in modalities else None,
                image=view_path(source.images, entry["id"], 0) if "image" in modalities else None,
            )
        )
    return samples


def _generate(out: Path, samples: list[HeldOut], source: Source) -> list[ReportSample]:
    """Generate from the checkpoint that the training wrote, and build what was generated and what is true."""
    from cad_mllm.generate import Generator, write_outputs
    from cad_mllm.inputs import Input

    generator = Generator.from_checkpoint(out / "training")
    inputs = [
        Input(
            caption=s.caption,
            points_NC=s.points_NC,
            image=None if s.image is None else load_image(s.image),
        )
        for s in samples
    ]
    outputs = dict(zip((s.name for s in samples), generator.generate(inputs, _MAX_NEW_TOKENS), strict=True))
    generated, truth = out / "generated", out / "truth"
    errors = write_outputs(generated, outputs, workers=os.cpu_count() or 1)
    truth.mkdir(parents=True, exist_ok=True)
    programs = [normalise(omnicad.read(source.json_file(s.id))).program for s in samples]
    true_solids = [Artifact(truth / s.name, program) for s, program in zip(samples, programs, strict=True)]
    failures = write_artifacts(true_solids, workers=os.cpu_count() or 1, seconds=60.0)
    assert failures == [None] * len(samples), failures
    return [
        ReportSample(
            id=s.id,
            caption=s.caption,
            modalities=s.modalities,
            input_view=draw_input(s, out / "inputs" / f"{s.name}.png"),
            truth_view=truth / f"{s.name}.png",
            prediction_view=None if errors[s.name] else generated / f"{s.name}.png",
            prediction_text=outputs[s.name].text,
            error=errors[s.name],
            step=None if errors[s.name] else generated / f"{s.name}.step",
        )
        for s in samples
    ]


def draw_input(sample: HeldOut, path: Path) -> Path | None:
    """Write a picture of what the model was given besides the caption."""
    image = None if sample.image is None else load_image(sample.image)
    picture = preview.draw_input(image, sample.points_NC, _PICTURE_SIZE)
    if picture is None:
        return None
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    return path


if __name__ == "__main__":
    run_and_exit(main)
