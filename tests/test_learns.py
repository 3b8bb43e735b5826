"""It learns what it is shown: under one caption, only the points or only the picture tell parts apart."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cad_mllm.data.files import load_image, load_points
from cad_mllm.data.layout import view_path
from cad_mllm.generate import Generator, Input
from cad_mllm.settings import parse_train_args
from cad_mllm.train.distributed import world
from cad_mllm.train.run import prepare_run
from cad_mllm.train.stages import IMAGE_PROJECTOR, LM, POINT_PROJECTOR, Stage
from cad_mllm.train.stop import StopSignal
from cad_mllm.train.trainer import fit
from cad_mllm.train.watchdog import Watchdog
from tests.distributed.conftest import NUM_SAMPLES, write_data
from tests.distributed.runs import flags

CAPTION = "A part."


@pytest.mark.parametrize("combo", ["text+points", "text+image"])
def test_eight_models_with_one_caption_are_reproduced_exactly(combo: str, tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", caption=CAPTION)
    more = {
        "use_lora": False,
        "start_from_stage": 3,
        "batch_size": NUM_SAMPLES,
        "gradient_accumulation_steps": 1,
        "projector_lr_multiplier": 1.0,
        "warmup_steps": 20,
    }
    config = parse_train_args(flags(data, tmp_path / "out", ranks=1, zero=None, **more))
    only = Stage(
        number=3,
        name=combo,
        mix={combo: 1.0},  # type: ignore[dict-item]
        trains=frozenset({LM, POINT_PROJECTOR, IMAGE_PROJECTOR}),
        epochs=72,  # one step each
        lr=2e-3,
    )
    with world(config.run) as alone, StopSignal() as stop, Watchdog(600, tmp_path, 0) as watchdog:
        run = replace(prepare_run(config, alone), stages=(only,))
        fit(run, stop, watchdog)
        run.tracker.close()
    records = [run.index.record(number) for number in range(NUM_SAMPLES)]
    targets = [record.target for record in records]
    assert len(set(targets)) == NUM_SAMPLES
    inputs = []
    for record in records:
        points = load_points(data / "pcd" / f"{record.id}.npz") if "points" in combo else None
        image = load_image(view_path(data / "img", record.id, 0)) if "image" in combo else None
        inputs.append(Input(caption=CAPTION, points_NC=points, image=image))
    shutil.rmtree(data)  # what is generated comes from the checkpoint alone
    outputs = Generator.from_checkpoint(tmp_path / "out").generate(inputs, max_new_tokens=400)
    assert [output.text for output in outputs] == targets
