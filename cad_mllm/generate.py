"""From a caption, a point cloud and a picture to a CAD program, under the grammar of the command text.

Shapes: B inputs of T prompt positions, D hidden channels, V vocabulary, R new tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cad_mllm.artifacts import Artifact, write_artifacts
from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.grammar import ENDED, CommandGrammar, TokenMasker, vocabulary_bytes
from cad_mllm.cad.program import CadProgram
from cad_mllm.data.atomic import make_writable
from cad_mllm.data.collate import Batch, Sample, collate, image_array, select_points
from cad_mllm.data.files import FloatArray, load_image, load_points
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.sequence import MODALITIES, Modality, SequenceSpec, bos_ids, eos_id, pad_id, prompt_ids
from cad_mllm.errors import CadError, CheckpointError, DataError
from cad_mllm.model.export import MANIFEST, Exported, load_exported
from cad_mllm.model.seeding import private_rng

DEFAULT_MAX_NEW_TOKENS = 1024
_WRITING_SECONDS = 60.0
_POINT_DRAW = (0, 0, 0, "generate")
"""(seed, stage, epoch, id) by which the points of an input are drawn: always the same ones."""


@dataclass(frozen=True, kw_only=True)
class Input:
    """What to make a program from. An absent modality is not in the sequence."""

    caption: str = ""
    points_NC: FloatArray | None = None
    """(N, 6) coordinates and unit normals, at any scale; N >= 1, finite."""
    image: Path | Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Output:
    """What came out."""

    text: str
    """Whatever was generated, also if it is no program."""
    program: CadProgram | None
    """None exactly where there is an `error`."""
    error: str | None


class Generator:
    """A trained model that writes programs."""

    def __init__(self, exported: Exported) -> None:
        built, sequence = exported.built, exported.sequence
        self._built = built
        self._bits = int(sequence["quantization_bits"])
        self._is_command = sequence["target_format"] == "command"
        self._spec = SequenceSpec(
            image_tokens=built.image_tokens,
            image_size=built.image_size,
            image_mean=built.image_mean,
            image_std=built.image_std,
            point_tokens=built.point_tokens,
            num_points=built.num_points,
            max_seq_length=int(sequence["max_seq_length"]),
        )
        self._vocabulary = vocabulary_bytes(built.tokenizer, built.vocab_size)
        self._grammar = CommandGrammar(self._bits)
        self._masker = TokenMasker(self._grammar, self._vocabulary, eos_id(built.tokenizer))

    @classmethod
    def from_checkpoint(cls, path: Path, device: torch.device | None = None) -> "Generator":
        """Load a checkpoint folder, or the newest complete checkpoint of an output folder.

        `device` None: the GPU if there is one. CheckpointError, ConfigError: as `load_exported`.
        """
        chosen = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return cls(load_exported(find_export(path), chosen))

    def generate(
        self,
        inputs: Sequence[Input],
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        batch_size: int = 8,
    ) -> list[Output]:
        """Write one program per input, in their order.

        Args:
            inputs: any mix of modalities.
            max_new_tokens: a program that is longer is reported as incomplete, never cut silently.
            temperature: 0 takes the likeliest token; above, tokens are drawn from `seed`.
            seed: of the draws.
            batch_size: inputs that are computed together.

        DataError: a picture cannot be read, or a caption leaves no room for a program.
        """
        outputs: list[Output] = []
        limit = -(-len(inputs) // batch_size) * max_new_tokens
        with SlowProgress("generating tokens", limit) as progress:
            for start in range(0, len(inputs), batch_size):
                samples = [self._sample(given) for given in inputs[start : start + batch_size]]
                tokens_BR = self._generate_batch(samples, max_new_tokens, temperature, seed, progress)
                outputs += [self._read(tokens_R, max_new_tokens) for tokens_R in tokens_BR.tolist()]
                progress.advance(max_new_tokens - tokens_BR.shape[1])
        return outputs

    def _sample(self, given: Input) -> Sample:
        tokenizer, spec = self._built.tokenizer, self._spec
        image = points = None
        present: set[Modality] = set()
        if given.image is not None:
            picture = load_image(given.image) if isinstance(given.image, Path) else given.image.convert("RGB")
            image = image_array(picture, spec)
            present.add("image")
        if given.points_NC is not None:
            points = select_points(given.points_NC, spec, _POINT_DRAW)
            present.add("points")
        bos, prompt = bos_ids(tokenizer), prompt_ids(tokenizer, [given.caption])[0]
        length = len(bos) + spec.modality_tokens(present) + len(prompt)
        if length >= spec.max_seq_length:
            raise DataError(
                f"the input takes {length} tokens of the {spec.max_seq_length} that the model was trained "
                "with (--max_seq_length): no room is left for a program; shorten the caption"
            )
        return Sample(
            id="input",
            combo=next(combo for combo, modalities in MODALITIES.items() if modalities == present),
            bos=bos,
            prompt=prompt,
            target=[],
            image_3HW=image,
            points_PC=points,
        )

    @torch.no_grad()
    def _generate_batch(
        self, samples: Sequence[Sample], limit: int, temperature: float, seed: int, progress: SlowProgress
    ) -> Tensor:
        """Give the new tokens (B, R), padded behind EOS."""
        model, tokenizer = self._built.model, self._built.tokenizer
        device = next(model.parameters()).device
        batch = collate(samples, self._spec, pad_id(tokenizer)).to(device)
        embeds_BTD, attention_mask_BT = _left_padded(self._embed(batch), batch.attention_mask_BT)
        masker = self._masker if self._is_command else None
        processor = _StepProcessor(masker, self._grammar.start, progress)
        config = GenerationConfig(
            max_new_tokens=limit,
            # Spelled out, because a model's own defaults would fill the gaps.
            do_sample=temperature > 0,
            repetition_penalty=1.0,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
            pad_token_id=pad_id(tokenizer),
            eos_token_id=eos_id(tokenizer),
        )
        with private_rng(seed, device):
            tokens_BR: Tensor = model.lm.generate(
                inputs_embeds=embeds_BTD,
                attention_mask=attention_mask_BT,
                generation_config=config,
                logits_processor=LogitsProcessorList([processor]),
            )
        return tokens_BR

    def _embed(self, batch: Batch) -> Tensor:
        encoders = self._built.encoders
        embeds_BTD = self._built.model.embed(
            batch.tokens_BT,
            encoders.encode_images(batch.images_NCHW),
            batch.image_rows,
            encoders.encode_points(batch.points_MPC),
            batch.point_rows,
        )
        return embeds_BTD

    def _read(self, tokens_R: list[int], limit: int) -> Output:
        """Read one row of new tokens."""
        end = eos_id(self._built.tokenizer)
        is_complete = end in tokens_R
        body = tokens_R[: tokens_R.index(end)] if is_complete else tokens_R
        # The bytes that the grammar saw: a tokenizer's own decoding may move spaces.
        text = b"".join(self._vocabulary[token] or b"" for token in body).decode(errors="replace")
        if not is_complete:
            return Output(
                text=text,
                program=None,
                error=f"incomplete: no end within {limit} tokens (--max_new_tokens)",
            )
        try:
            return Output(text=text, program=self._parse(text), error=None)
        except CadError as error:
            return Output(text=text, program=None, error=str(error))

    def _parse(self, text: str) -> CadProgram:
        if self._is_command:
            return codec.decode(text, bits=self._bits)
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CadError(f"not JSON: {error}") from error
        if not isinstance(data, Mapping):
            raise CadError("not a JSON object")
        return omnicad.parse(data)


class _StepProcessor(LogitsProcessor):
    """Forbid every token that leaves the command language, and count steps. Holds one state per row."""

    def __init__(self, masker: TokenMasker | None, start: int, progress: SlowProgress) -> None:
        self._masker = masker
        self._start = start
        self._progress = progress
        self._states: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask (B, V) logits, given the (B, n) tokens that were generated so far."""
        self._progress.advance()
        if self._masker is None:
            return scores
        if not self._states:
            assert input_ids.shape[1] == 0, "the prompt is given as embeddings, it has no ids"
            self._states = [self._start] * len(scores)
        else:
            # Behind its EOS a row is padded; that is not part of its text.
            self._states = [
                state if state == ENDED else self._masker.advance(state, token)
                for state, token in zip(self._states, input_ids[:, -1].tolist(), strict=True)
            ]
        allowed_BV = np.stack([self._masker.allowed(state) for state in self._states])
        return scores.masked_fill(~torch.from_numpy(allowed_BV).to(scores.device), -torch.inf)


def _left_padded(embeds_BTD: Tensor, attention_mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Move the padding from the right, where training has it, to the left, where the next token is not."""
    length = attention_mask_BT.shape[1]
    used_B1 = attention_mask_BT.sum(dim=1, keepdim=True)
    source_BT = (torch.arange(length, device=used_B1.device) + used_B1) % length
    rows_B1 = torch.arange(len(used_B1), device=used_B1.device)[:, None]
    return embeds_BTD[rows_B1, source_BT], attention_mask_BT[rows_B1, source_BT]


def find_export(path: Path) -> Path:
    """Find the exported weights in a checkpoint folder, or in the newest complete one of an output folder.

    CheckpointError: there are none.
    """
    if not path.is_dir():
        raise CheckpointError(f"--checkpoint {path}: no such folder")
    complete = sorted(mark.parent for mark in path.glob("checkpoints/step-*/COMPLETE"))
    for folder in (path, path / "model", *(step / "model" for step in reversed(complete[-1:]))):
        if (folder / MANIFEST).is_file():
            return folder
    raise CheckpointError(
        f"--checkpoint {path}: neither a checkpoint (model/{MANIFEST}) nor an output folder with a complete "
        "one (checkpoints/step-*/COMPLETE)"
    )


def write_outputs(
    out_dir: Path, outputs: Mapping[str, Output], *, workers: int = 1, seconds: float = _WRITING_SECONDS
) -> dict[str, str | None]:
    """Write `<name>.txt` of every output, and .json, .step and .png of those that are programs.

    Solids are built in worker processes, `seconds` each at most. Gives for each name None, or why there
    is no solid (then .step and .png are missing).
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    errors = {name: output.error for name, output in outputs.items()}
    artifacts: dict[str, Artifact] = {}
    for name, output in outputs.items():
        stem = out_dir / name
        for suffix in (".json", ".step", ".png"):  # of an earlier run
            stem.with_name(stem.name + suffix).unlink(missing_ok=True)
        stem.with_name(f"{stem.name}.txt").write_text(output.text + "\n", encoding="utf-8")
        if output.program is not None:
            written = json.dumps(omnicad.to_json(output.program), indent=1)
            stem.with_name(f"{stem.name}.json").write_text(written, encoding="utf-8")
            artifacts[name] = Artifact(stem, output.program)
    failures = write_artifacts(list(artifacts.values()), workers=workers, seconds=seconds)
    return errors | dict(zip(artifacts, failures, strict=True))


def generate_files(
    checkpoint: Path,
    out: Path,
    *,
    text: str = "",
    points: Path | None = None,
    image: Path | None = None,
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
) -> None:
    """Generate one program and write it as `<out>/program.{txt,json,step,png}`.

    CadError: what came out is no program or no solid (the .txt is there to look at).
    """
    make_writable(out, "--out")
    given = Input(caption=text, points_NC=None if points is None else load_points(points), image=image)
    generator = Generator.from_checkpoint(checkpoint)
    output = generator.generate([given], max_new_tokens)[0]
    error = write_outputs(out, {"program": output})["program"]
    if error is not None:
        raise CadError(f"no solid came out: {error}; the text is in {out / 'program.txt'}")
    print(f"wrote {out}/program.txt, program.json, program.step and program.png")
