"""Generation: under the grammar, in batches, from a checkpoint, and what it leaves on disk."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.grammar import CommandGrammar
from cad_mllm.cad.program import CadProgram
from cad_mllm.config import ModelConfig
from cad_mllm.errors import CadError, CheckpointError, ConfigError, DataError
from cad_mllm.generate import Generator, Input, Output, find_export, generate_files, write_outputs
from cad_mllm.model.build import build_model
from cad_mllm.model.export import export_weights

SEQUENCE = {"target_format": "command", "quantization_bits": 8, "max_seq_length": 512}
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
def test_whatever_an_untrained_model_says_is_command_text(generator: Generator, temperature: float) -> None:
    grammar = CommandGrammar(8)
    outputs = generator.generate(INPUTS * 2, 40, temperature=temperature, seed=3)
    assert len(outputs) == len(INPUTS) * 2
    for output in outputs:
        state = grammar.advance(grammar.start, output.text)
        assert output.text and state is not None, output.text
        if output.program is not None:
            assert grammar.is_complete(state)
            assert output.error is None
        else:
            assert output.error


def test_an_output_that_hits_the_limit_is_reported_never_cut_silently(generator: Generator) -> None:
    (output,) = generator.generate(INPUTS[:1], 7)
    assert output.program is None
    assert output.error is not None and "7 tokens" in output.error


def test_neighbours_in_the_batch_do_not_matter(generator: Generator) -> None:
    together = generator.generate(INPUTS, 20)
    assert together == generator.generate(INPUTS, 20, batch_size=1)
    assert together[::-1] == generator.generate(INPUTS[::-1], 20, batch_size=3)


def test_draws_follow_from_the_seed_and_leave_the_global_generator_alone(generator: Generator) -> None:
    torch.manual_seed(0)
    first = generator.generate(INPUTS, 20, temperature=1.5, seed=1)
    drawn = torch.rand(2)
    assert first == generator.generate(INPUTS, 20, temperature=1.5, seed=1)
    assert first != generator.generate(INPUTS, 20, temperature=1.5, seed=2)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(2), drawn)


def test_the_prompt_is_the_sequence_that_training_sees(generator: Generator) -> None:
    """The likeliest continuation after the cached, left-padded prompt is that of a plain forward pass."""
    from cad_mllm.model.multimodal import MultimodalLM

    model: MultimodalLM = generator._built.model
    sample = generator._sample(INPUTS[3])
    with torch.no_grad():
        from cad_mllm.data.collate import collate

        batch = collate([sample], generator._spec, 256)
        logits = model.lm(inputs_embeds=generator._embed(batch)).logits[0, -1]
    start = generator._masker.allowed(generator._grammar.start)
    best = int(logits.masked_fill(~torch.from_numpy(start.copy()), -torch.inf).argmax())
    assert generator.generate([INPUTS[0], INPUTS[3]], 3)[1].text[0] == chr(best)


def test_a_caption_that_leaves_no_room_is_refused(generator: Generator) -> None:
    with pytest.raises(DataError, match="512"):
        generator.generate([Input(caption="long " * 200)])


def test_json_targets_are_not_held_to_the_command_grammar(tmp_path: Path) -> None:
    folder = _write_checkpoint(tmp_path / "json", SEQUENCE | {"target_format": "json"}, TINY)
    (output,) = Generator.from_checkpoint(folder, torch.device("cpu")).generate(INPUTS[:1], 20)
    assert output.program is None and output.error


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
    outputs = _said([PLATE, "NZ0,0,127,25"])
    errors = write_outputs(tmp_path, outputs)
    assert errors["s0"] is None and errors["s1"] == outputs["s1"].error is not None
    assert {path.name for path in tmp_path.iterdir()} == {"s0.txt", "s0.json", "s0.step", "s0.png", "s1.txt"}
    assert (tmp_path / "s0.txt").read_text() == PLATE + "\n"
    written = omnicad.parse(json.loads((tmp_path / "s0.json").read_text()))
    assert isinstance(written, CadProgram) and len(written.extrudes) == 1
    assert (tmp_path / "s0.step").read_text().startswith("ISO-10303-21")
    with Image.open(tmp_path / "s0.png") as picture:
        assert picture.size == (448, 448) and len(picture.convert("L").getcolors() or []) > 2


def test_the_command_says_where_the_text_is_when_no_solid_came_out(tmp_path: Path, checkpoint: Path) -> None:
    np.savez(tmp_path / "scan.npz", points=_cloud(1))
    Image.new("RGB", (30, 30), "white").save(tmp_path / "view.png")
    with pytest.raises(CadError, match=r"incomplete.*program\.txt"):
        generate_files(
            checkpoint.parent.parent,
            tmp_path / "out",
            text="a plate",
            points=tmp_path / "scan.npz",
            image=tmp_path / "view.png",
            max_new_tokens=6,
        )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"program.txt"}


def test_an_out_that_cannot_be_written_is_named_before_any_work(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--out .*file: cannot be written"):
        generate_files(checkpoint, tmp_path / "file", text="a plate")
