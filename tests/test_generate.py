"""Generation: under the grammar, in batches, from a checkpoint, and what it leaves on disk."""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.program import CadProgram
from cad_mllm.config import ModelConfig
from cad_mllm.data.dummy import write_dummy_data
from cad_mllm.data.layout import Split
from cad_mllm.data.shards import Manifest, ModelRow, Shard, ShardWriter, write_manifest
from cad_mllm.errors import CadError, CheckpointError, ConfigError, DataError
from cad_mllm.generate import (
    GenerateSettings,
    Generator,
    Output,
    find_export,
    generate_file,
    generate_folder,
    print_generated,
    write_outputs,
)
from cad_mllm.inputs import Input, InputFiles, Worse, read_folder
from cad_mllm.model.build import build_model
from cad_mllm.model.export import export_weights
from tests.kernel import CAD_MLLM, without_opencascade

SEQUENCE = {"target_format": "command", "quantization_bits": 8, "max_seq_length": 512}
CROSSING = "NZ10,127,0,0,199F180P0,190H254V232A24,14,24D0,120,127R0,190,127"
PLATE = "NZ0,0,127,254,254E60P0,0H254V254H0"


def _cloud(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(300, 3))
    normals /= np.linalg.norm(normals, axis=1, keepdims=True)
    return np.concatenate([rng.uniform(-1, 1, (300, 3)), normals], axis=1).astype(np.float32)


INPUTS = (
    Input(caption="a plate with two holes"),
    Input(points_NC=_cloud(1)),
    Input(caption="a ring", image=Image.new("RGB", (80, 40), "red")),
    Input(caption="a rather long caption about a bracket", points_NC=_cloud(2), image=Image.new("L", (9, 9))),
)


def _write_checkpoint(folder: Path, sequence: dict[str, object], config: ModelConfig) -> Path:
    """A checkpoint folder as training leaves it, of a model that has learned nothing."""
    built = build_model(config, seed=1, device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(7)
    tensors = {
        name: parameter.detach() + 0.05 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in built.model.named_parameters()
        if parameter.requires_grad
    }
    (folder / "model").mkdir(parents=True)
    export_weights(folder / "model", built, config, sequence, tensors)
    (folder / "COMPLETE").write_text("{}")
    return folder


TINY = ModelConfig(llm_model_name="tiny", dtype="float32", lora_r=4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _write_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints" / "step-00000010", SEQUENCE, TINY)


@pytest.fixture(scope="module")
def generator(checkpoint: Path) -> Generator:
    return Generator.from_checkpoint(checkpoint, torch.device("cpu"))


@pytest.mark.parametrize("temperature", [0.0, 1.5])
@pytest.mark.parametrize("limit", [25, 90, 300])
def test_whatever_an_untrained_model_says_is_a_program(
    generator: Generator, temperature: float, limit: int
) -> None:
    outputs = generator.generate(INPUTS * 2, limit, temperature=temperature, seed=3)
    assert len(outputs) == len(INPUTS) * 2
    for output in outputs:
        assert output.program == codec.decode(output.text, 8)
        assert output.error is None


def test_a_program_that_hits_the_limit_ends_there_and_says_so(generator: Generator) -> None:
    (output,) = generator.generate(INPUTS[:1], 30)
    assert output.program is not None and output.was_cut
    with pytest.raises(ConfigError, match=r"limit of 7 tokens is too low.*--max_new_tokens"):
        generator.generate(INPUTS[:1], 7)


def test_a_given_beginning_is_gone_on_with(generator: Generator) -> None:
    start = PLATE + ";JZ0,0"
    outputs = generator.generate([replace(one, start=start) for one in INPUTS], 60, temperature=1.0)
    for output in outputs:
        assert output.text.startswith(start) and output.program is not None
        assert len(output.program.extrudes) >= 2
        assert output.program.extrudes[0] == codec.decode(PLATE, 8).extrudes[0]
    with pytest.raises(CadError, match="no program begins like that"):
        generator.generate([Input(start="plate")])


def test_what_was_given_is_what_the_model_reads(generator: Generator) -> None:
    """The likeliest text, and the likeliest text behind its own first half, are the same."""
    (whole,) = generator.generate(INPUTS[:1], 200)
    half = whole.text[: len(whole.text) // 2]  # of single bytes: tiny's tokens are bytes
    (rest,) = generator.generate([replace(INPUTS[0], start=half)], 200 - len(half))
    assert rest.text == whole.text


def test_the_best_of_several_is_the_nearest_to_the_points(generator: Generator) -> None:
    best = generator.generate_best(INPUTS[1:2], 60, candidates=4, temperature=1.5, seed=1)
    greedy = generator.generate(INPUTS[1:2], 60)
    drawn = generator.generate(INPUTS[1:2] * 3, 60, temperature=1.5, seed=1)
    assert len({one.text for one in drawn}) == 3
    assert best[0] in [*greedy, *drawn]
    once = generator.generate_best(INPUTS[1:2], 60, candidates=1, temperature=0.0)
    assert once == greedy


def test_programs_are_fitted_to_points_where_there_are_some(generator: Generator) -> None:
    outputs = generator.generate(INPUTS, 60)
    fitted = generator.fit(INPUTS, outputs, trials=5)
    for given, before, after in zip(INPUTS, outputs, fitted, strict=True):
        assert after.program is not None and codec.decode(after.text, 8) == after.program
        if given.points_NC is None:
            assert after == before


def test_neighbours_in_the_batch_do_not_matter(generator: Generator) -> None:
    together = generator.generate(INPUTS, 120)
    assert together == generator.generate(INPUTS, 120, batch_size=1)
    assert together[::-1] == generator.generate(INPUTS[::-1], 120, batch_size=3)


def test_draws_follow_from_the_seed_and_leave_the_global_generator_alone(generator: Generator) -> None:
    torch.manual_seed(0)
    first = generator.generate(INPUTS, 120, temperature=1.5, seed=1)
    drawn = torch.rand(2)
    assert first == generator.generate(INPUTS, 120, temperature=1.5, seed=1)
    assert first != generator.generate(INPUTS, 120, temperature=1.5, seed=2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), drawn)


def test_the_prompt_is_the_sequence_that_training_sees(generator: Generator) -> None:
    """The likeliest continuation after the cached, left-padded prompt is that of a plain forward pass."""
    from cad_mllm.model.multimodal import MultimodalLM

    model: MultimodalLM = generator._built.model
    sample = generator._sample(replace(INPUTS[3], start="N"))
    with torch.no_grad():
        from cad_mllm.data.collate import collate

        batch = collate([sample], generator._spec, 256)
        logits = model.lm(inputs_embeds=generator._embed(batch)).logits[0, -1]
    # The grammar leaves the first token no choice but N: so the second is compared.
    logits = logits[[ord("X"), ord("Y"), ord("Z"), ord("O")]]
    best = "XYZO"[int(logits.argmax())]
    outputs = generator.generate([INPUTS[0], replace(INPUTS[3], start="N")], 150)
    assert outputs[1].text[1] == best


def test_a_caption_that_leaves_no_room_is_refused(generator: Generator) -> None:
    with pytest.raises(DataError, match="512"):
        generator.generate([Input(caption="long " * 200)])


def test_json_targets_are_not_held_to_the_command_grammar(tmp_path: Path) -> None:
    folder = _write_checkpoint(tmp_path / "json", SEQUENCE | {"target_format": "json"}, TINY)
    (output,) = Generator.from_checkpoint(folder, torch.device("cpu")).generate(INPUTS[:1], 20)
    assert output.program is None and output.error


def test_a_fit_of_json_is_refused_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = _write_checkpoint(tmp_path / "json", SEQUENCE | {"target_format": "json"}, TINY)
    monkeypatch.setattr(Generator, "generate", lambda *_, **__: pytest.fail("it was generated"))
    given = InputFiles(caption="a plate", points=None, image=None, start="")
    with pytest.raises(ConfigError, match=r"writes JSON.*--fit"):
        generate_file(folder, tmp_path / "out", given, GenerateSettings(fit=5))


def test_the_newest_complete_checkpoint_of_an_output_folder_is_taken(tmp_path: Path) -> None:
    for name, complete in (("step-00000005", True), ("step-00000010", True), ("step-00000020", False)):
        folder = tmp_path / "checkpoints" / name
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "cad_mllm.json").write_text("{}")
        if complete:
            (folder / "COMPLETE").write_text("{}")
    newest = tmp_path / "checkpoints" / "step-00000010"
    assert find_export(tmp_path) == find_export(newest) == find_export(newest / "model") == newest / "model"
    with pytest.raises(CheckpointError, match="no such folder"):
        find_export(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="neither a checkpoint"):
        find_export(tmp_path / "checkpoints")


def _said(texts: Sequence[str]) -> dict[str, Output]:
    outputs = {}
    for number, text in enumerate(texts):
        try:
            outputs[f"s{number}"] = Output(text=text, program=codec.decode(text, bits=8), error=None)
        except CadError as error:
            outputs[f"s{number}"] = Output(text=text, program=None, error=str(error))
    return outputs


def test_a_program_leaves_text_json_step_and_picture_and_a_failure_only_its_text(tmp_path: Path) -> None:
    (tmp_path / "s1.step").write_text("of an earlier run")
    outputs = _said([PLATE, "NZ0,0,127,25", CROSSING])
    errors = write_outputs(tmp_path, outputs)
    assert "loops of one profile cross" in (errors.pop("s2") or "")
    for suffix in ("txt", "json"):
        (tmp_path / f"s2.{suffix}").unlink()
    assert errors["s0"] is None and errors["s1"] == outputs["s1"].error is not None
    assert {path.name for path in tmp_path.iterdir()} == {"s0.txt", "s0.json", "s0.step", "s0.png", "s1.txt"}
    assert (tmp_path / "s0.txt").read_text() == PLATE + "\n"
    written = omnicad.parse(json.loads((tmp_path / "s0.json").read_text()))
    assert isinstance(written, CadProgram) and len(written.extrudes) == 1
    assert (tmp_path / "s0.step").read_text().startswith("ISO-10303-21")
    with Image.open(tmp_path / "s0.png") as picture:
        assert picture.size == (448, 448) and len(picture.convert("L").getcolors() or []) > 2


def test_programs_alone_leave_no_step_and_no_picture(tmp_path: Path) -> None:
    (tmp_path / "s0.png").write_text("of an earlier run")
    outputs = _said([PLATE, "NZ0,0,127,25"])
    errors = write_outputs(tmp_path, outputs, programs_only=True)
    assert errors == {"s0": None, "s1": outputs["s1"].error}
    assert {path.name for path in tmp_path.iterdir()} == {"s0.txt", "s0.json", "s1.txt"}


@pytest.fixture
def twelve(tmp_path: Path) -> Path:
    """A folder with inputs of every kind."""
    folder = tmp_path / "inputs"
    (folder / "more").mkdir(parents=True)
    for number in range(4):
        (folder / f"text{number}.txt").write_text("A plate.\n")
        np.savez(folder / "more" / f"cloud{number}.npz", points=_cloud(number))
        (folder / f"all{number}.txt").write_text("A ring.")
        np.savez(folder / f"all{number}.npz", points=_cloud(number))
        Image.new("RGB", (30, 30), "white").save(folder / f"all{number}.png")
    return folder


def test_a_folder_of_inputs_becomes_a_folder_of_programs(
    tmp_path: Path, checkpoint: Path, twelve: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (twelve / "broken.npz").write_bytes(b"no points")
    (twelve / "long.txt").write_text("long " * 300)
    inputs = read_folder(twelve)
    assert len(inputs) == 14
    everything = inputs["all0"].read()
    assert everything.caption == "A ring." and everything.points_NC is not None and everything.image
    out = tmp_path / "out"
    how = GenerateSettings(max_new_tokens=60, batch_size=5)
    results = generate_folder(checkpoint, out, inputs, how)
    assert [one.id for one in results] == sorted(inputs)
    unusable = {one.id: one.error for one in results if one.id in ("broken", "long")}
    assert "unreadable points" in (unusable["broken"] or "") and "512" in (unusable["long"] or "")
    for one in results:
        if one.id not in unusable:
            codec.decode((out / f"{one.id}.txt").read_text().strip(), 8)
            assert (out / f"{one.id}.step").is_file() == (one.error is None)
    lines = [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]
    assert lines == [asdict(one) for one in results]
    made_from = {line["id"]: (line["modalities"], line["caption"]) for line in lines}
    assert made_from["all0"] == ("text+points+image", "A ring.")
    assert made_from["more/cloud0"] == ("text+points", "") and made_from["broken"] == ("", "")
    print_generated(results, out, Console(width=120))
    assert "broken" in capsys.readouterr().out


def test_worse_points_follow_from_seed_and_id_alone() -> None:
    cloud = _cloud(1) * np.array([3, 1, 1, 1, 1, 1], np.float32)  # longest half side: 3
    given = Input(caption="a ring", points_NC=cloud)
    assert Worse().of(given, 1, "a") is given

    def worse(noise: float, dropped: float, seed: int = 1, sample_id: str = "a") -> np.ndarray:
        changed = Worse(noise=noise, dropped=dropped).of(given, seed, sample_id)
        assert changed.caption == "a ring" and changed.points_NC is not None
        return changed.points_NC

    noisy = worse(0.02, 0.0)
    moved = noisy[:, :3] - cloud[:, :3]
    half_side = np.ptp(cloud[:, :3], axis=0).max() / 2
    assert moved.std() == pytest.approx(0.02 * half_side, rel=0.1) and abs(moved.mean()) < 0.01
    assert np.array_equal(noisy[:, 3:], cloud[:, 3:])
    np.testing.assert_allclose(worse(0.04, 0.0)[:, :3] - cloud[:, :3], 2 * moved, atol=1e-5)
    half, few = ({row.tobytes() for row in worse(0.0, share)} for share in (0.5, 0.95))
    assert (len(half), len(few)) == (150, 15) and few < half < {row.tobytes() for row in cloud}
    assert len(Worse(dropped=0.99).of(replace(given, points_NC=cloud[:5]), 1, "a").points_NC) == 1  # type: ignore[arg-type]
    assert np.array_equal(worse(0.02, 0.5), worse(0.02, 0.5))
    assert not np.array_equal(worse(0.02, 0.0), worse(0.02, 0.0, seed=2))
    assert not np.array_equal(worse(0.02, 0.0), worse(0.02, 0.0, sample_id="b"))


def test_the_list_says_how_much_worse_the_points_were(
    tmp_path: Path, checkpoint: Path, generator: Generator
) -> None:
    np.savez(tmp_path / "cloud.npz", points=_cloud(1))
    files = InputFiles(caption="", points=tmp_path / "cloud.npz", image=None)
    worse = Worse(noise=0.05, dropped=0.8)
    how = GenerateSettings(max_new_tokens=60, seed=3, worse=worse)
    (result,) = generate_folder(checkpoint, tmp_path / "out", {"cloud": files}, how)
    assert (result.noise, result.dropped) == (0.05, 0.8)
    (line,) = (tmp_path / "out/generated.jsonl").read_text().splitlines()
    assert (json.loads(line)["noise"], json.loads(line)["dropped"]) == (0.05, 0.8)
    (expected,) = generator.generate([worse.of(files.read(), 3, "cloud")], 60)
    assert (tmp_path / "out/cloud.txt").read_text() == expected.text + "\n"


def test_without_opencascade_programs_become_polygon_models_and_it_is_said(
    tmp_path: Path, checkpoint: Path, twelve: Path
) -> None:
    command = [*CAD_MLLM, "generate", "--checkpoint", str(checkpoint)]
    command += ["--folder", str(twelve), "--modalities", "points", "--best_of", "2", "--max_new_tokens", "60"]
    out = tmp_path / "out"
    done = subprocess.run(
        [*command, "--out", str(out), "--workers", "1"],
        env=without_opencascade(tmp_path / "hidden"),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "OpenCASCADE is not installed: solids are polygon models" in done.stdout
    lines = [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]
    assert len(lines) == 8 and {line["builder"] for line in lines} == {"polygons"}
    solids = [line["id"] for line in lines if line["error"] is None]
    assert solids and all((out / f"{one}.png").is_file() for one in solids)
    assert not list(out.rglob("*.step"))


def test_a_data_set_is_a_folder_of_inputs_and_modalities_narrow_it(tmp_path: Path) -> None:
    write_dummy_data(tmp_path, num_samples=2, seed=1, workers=1)
    everything = read_folder(tmp_path)
    read = [one.read() for one in everything.values()]
    assert all(one.caption and one.points_NC is not None and one.image for one in read)
    points = read_folder(tmp_path, {"points"})
    assert points.keys() == everything.keys()
    read = [one.read() for one in points.values()]
    assert all(not one.caption and one.points_NC is not None and not one.image for one in read)


def test_a_sharded_data_set_is_a_folder_of_inputs(tmp_path: Path) -> None:
    row = ModelRow(
        id="0000/00000001_00001",
        caption="a ring",
        caption_source="given",
        json="{}",
        command_8=PLATE,
        command_10=None,
        points=_cloud(1).astype(np.float16),
        views=(_png("red"), _png("blue")),
        scale=1.0,
        center=(0.0, 0.0, 0.0),
        num_extrudes=1,
        num_curves=4,
    )
    with ShardWriter(tmp_path, "val/00000.arrow", points=300) as writer:
        writer.add(row)
    splits: dict[Split, tuple[Shard, ...]] = {"train": (), "val": (writer.shard,)}
    write_manifest(tmp_path, Manifest(settings={"points": 300, "views": 2}, splits=splits))
    given = read_folder(tmp_path)[row.id].read()
    assert given.caption == "a ring" and given.image is not None and given.points_NC is not None
    assert given.image.getpixel((0, 0)) == (255, 0, 0)
    assert np.array_equal(given.points_NC, row.points.astype(np.float32))
    (points,) = read_folder(tmp_path, {"points"}).values()
    assert points.read().caption == "" and points.read().image is None


def _png(colour: str) -> bytes:
    file = BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def test_a_folder_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a folder"):
        read_folder(tmp_path / "none")
    (tmp_path / "README.md").write_text("no input")
    with pytest.raises(DataError, match=r"nothing to generate from: .*NAME\.txt"):
        read_folder(tmp_path)


def test_the_command_says_where_the_text_is_when_no_solid_came_out(tmp_path: Path, checkpoint: Path) -> None:
    # What follows cuts all of it away again.
    start = PLATE + ";CZ0,0,127,254,254E254P0,0H254V254H0;CZ0,0,127,254,254F254P0,0H254V254H0"
    with pytest.raises(CadError, match=r"no solid came out.*program\.txt"):
        given = InputFiles(caption="a plate", points=None, image=None, start=start)
        generate_file(checkpoint, tmp_path / "out", given, GenerateSettings(max_new_tokens=5))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"program.txt", "program.json"}


def test_an_out_that_cannot_be_written_is_named_before_any_work(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    given = InputFiles(caption="a plate", points=None, image=None)
    with pytest.raises(ConfigError, match=r"--out .*file: cannot be written"):
        generate_file(checkpoint, tmp_path / "file", given, GenerateSettings())
