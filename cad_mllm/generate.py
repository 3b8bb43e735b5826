"""From a caption, a point cloud and a picture to a CAD program, under the grammar of the command text.

Shapes: B inputs of T prompt positions, D hidden channels, V vocabulary, R new tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from cad_mllm.artifacts import Artifact, write_artifacts
from cad_mllm.cad import codec, omnicad
from cad_mllm.cad.draft import Draft, Drafts, TokenIds
from cad_mllm.cad.grammar import vocabulary_bytes
from cad_mllm.cad.program import CadProgram
from cad_mllm.cad.surface import Kernel, installed_kernel
from cad_mllm.choose import choose
from cad_mllm.data.atomic import atomic_path, make_writable
from cad_mllm.data.collate import Batch, Sample, collate, image_array, select_points
from cad_mllm.data.order import stable_hash
from cad_mllm.data.progress import SlowProgress
from cad_mllm.data.sequence import (
    MODALITIES,
    SequenceSpec,
    bos_ids,
    eos_id,
    pad_id,
    prompt_ids,
    target_ids,
)
from cad_mllm.errors import CadError, CheckpointError, ConfigError, DataError
from cad_mllm.fit import Unfitted, fit
from cad_mllm.inputs import Input, Unread, Worse
from cad_mllm.model.export import MANIFEST, Exported, load_exported
from cad_mllm.model.seeding import private_rng

DEFAULT_MAX_NEW_TOKENS = 1024
LIST_FILE = "generated.jsonl"
_WRITTEN_AT_ONCE = 512
"""Inputs after which files are written: a run that is stopped keeps most, workers start seldom."""
_WRITING_SECONDS = 60.0
_NO_KERNEL = "OpenCASCADE is not installed: solids are polygon models, and there are no STEP files"
_POINT_DRAW = (0, 0, 0, "generate")
"""(seed, stage, epoch, id) by which the points of an input are drawn: always the same ones."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """What came out."""

    text: str
    """Whatever was generated, also if it is no program."""
    program: CadProgram | None
    """None exactly where there is an `error`."""
    error: str | None
    was_cut: bool = False
    """It had to end where it does: `max_new_tokens` allowed no more."""


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
        self._drafts = Drafts(self._bits, self._vocabulary, eos_id(built.tokenizer))

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

        Command text is held to programs: each ends with a program within the limit. JSON may end in anything.

        Args:
            inputs: any mix of modalities.
            max_new_tokens: the longest program. One that had to end for it says so (`was_cut`); JSON that is
                longer is an error.
            temperature: 0 takes the likeliest token; above, tokens are drawn from `seed`.
            seed: of the draws.
            batch_size: inputs that are computed together.

        DataError: a picture cannot be read, or a caption leaves no room for a program. CadError: no program
        begins like an input's `start`. ConfigError: no program is as short as `max_new_tokens`.
        """
        outputs: list[Output] = []
        limit = -(-len(inputs) // batch_size) * max_new_tokens
        with SlowProgress("generating tokens", limit) as progress:
            for first in range(0, len(inputs), batch_size):
                batch = inputs[first : first + batch_size]
                drafts = [self._begin(given, max_new_tokens) for given in batch]
                distinct = {id(given): given for given in batch}  # several draws of one: encoded once
                samples = [self._sample(given) for given in distinct.values()]
                places = {key: row for row, key in enumerate(distinct)}
                rows = [places[id(given)] for given in batch]
                # Each batch has draws of its own: rows of one place in two batches would be alike.
                key = stable_hash("draws", seed, first) % 2**63
                tokens_BR = self._generate_batch(
                    samples, rows, drafts, max_new_tokens, temperature, key, progress
                )
                for given, draft, tokens_R in zip(batch, drafts, tokens_BR.tolist(), strict=True):
                    output = self._read(given.start, tokens_R, max_new_tokens)
                    outputs.append(replace(output, was_cut=draft is not None and draft.was_cut))
                progress.advance(max_new_tokens - tokens_BR.shape[1])
        return outputs

    def generate_best(
        self,
        inputs: Sequence[Input],
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        *,
        candidates: int,
        temperature: float,
        seed: int = 0,
        batch_size: int = 8,
        workers: int = 1,
    ) -> list[Output]:
        """The best of several programs per input, the first greedy and the others drawn; see `choose`.

        One candidate is drawn like any other. Arguments and errors as for `generate`; solids are built in
        `workers` processes.
        """
        if candidates == 1:
            return self.generate(
                inputs, max_new_tokens, temperature=temperature, seed=seed, batch_size=batch_size
            )
        greedy = self.generate(inputs, max_new_tokens, batch_size=batch_size)
        # A batch lasts as long as its longest program: programs of like length go together.
        by_length = sorted(range(len(inputs)), key=lambda number: len(greedy[number].text))
        drawn = iter(
            self.generate(
                [inputs[number] for number in by_length for _ in range(1, candidates)],
                max_new_tokens,
                temperature=temperature,
                seed=seed,
                batch_size=batch_size,
            )
        )
        of_input = {number: [greedy[number], *islice(drawn, candidates - 1)] for number in by_length}
        each = [of_input[number] for number in range(len(inputs))]
        chosen = choose(
            [[output.program for output in outputs] for outputs in each],
            [given.points_NC for given in inputs],
            workers=workers,
        )
        return [outputs[number] for outputs, number in zip(each, chosen, strict=True)]

    def fit(
        self, inputs: Sequence[Input], outputs: Sequence[Output], *, trials: int, workers: int = 1
    ) -> list[Output]:
        """The same programs, those of inputs with points brought nearer to them; see `fit.fit`.

        ConfigError: the model writes JSON.
        """
        self.require_command_text("fitted to points (--fit)")
        unfitted = {
            number: Unfitted(output.text, given.points_NC, self._bits, given.start)
            for number, (given, output) in enumerate(zip(inputs, outputs, strict=True))
            if output.program is not None and given.points_NC is not None
        }
        texts = dict(zip(unfitted, fit(list(unfitted.values()), trials=trials, workers=workers), strict=True))
        return [
            replace(output, text=texts[number], program=self._parse(texts[number]))
            if number in texts
            else output
            for number, output in enumerate(outputs)
        ]

    def require_command_text(self, wanted: str) -> None:
        """ConfigError for what can be done with command text alone, if the model writes JSON."""
        if not self._is_command:
            raise ConfigError(f"this model writes JSON: only command text can be {wanted}")

    def usable(self, given: Input, max_new_tokens: int) -> Input:
        """The same input; raises what `generate` would raise for it."""
        self._begin(given, max_new_tokens)
        self._sample(given)
        return given

    def _begin(self, given: Input, limit: int) -> Draft | None:
        """The draft that holds an input's text to a program; None for JSON."""
        if self._is_command:
            return self._drafts.begin(given.start, limit=limit)
        if given.start:
            self.require_command_text("gone on with (--start)")
        return None

    def _sample(self, given: Input) -> Sample:
        tokenizer, spec = self._built.tokenizer, self._spec
        image = points = None
        if given.image is not None:
            image = image_array(given.image.convert("RGB"), spec)
        if given.points_NC is not None:
            points = select_points(given.points_NC, spec, _POINT_DRAW)
        bos, prompt = bos_ids(tokenizer), prompt_ids(tokenizer, [given.caption])[0]
        start = target_ids(tokenizer, [given.start])[0][:-1]  # without EOS
        length = len(bos) + spec.modality_tokens(MODALITIES[given.combo]) + len(prompt) + len(start)
        if length >= spec.max_seq_length:
            raise DataError(
                f"the input takes {length} tokens of the {spec.max_seq_length} that the model was trained "
                "with (--max_seq_length): no room is left for a program; shorten the caption"
            )
        return Sample(
            id="input",
            combo=given.combo,
            bos=bos,
            prompt=prompt,
            target=start,
            image_3HW=image,
            points_PC=points,
            supervised=False,
        )

    @torch.no_grad()
    def _generate_batch(
        self,
        samples: Sequence[Sample],
        rows: Sequence[int],
        drafts: Sequence[Draft | None],
        limit: int,
        temperature: float,
        seed: int,
        progress: SlowProgress,
    ) -> Tensor:
        """Give the new tokens (B, R), padded behind EOS, of one draft for each of `rows` of the samples."""
        model, tokenizer = self._built.model, self._built.tokenizer
        device = next(model.parameters()).device
        batch = collate(samples, self._spec, pad_id(tokenizer)).to(device)
        embeds, attention_mask = _left_padded(self._embed(batch), batch.attention_mask_BT)
        rows_B = torch.tensor(rows, device=device)
        processor = _StepProcessor(drafts, progress)
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
                inputs_embeds=embeds[rows_B],
                attention_mask=attention_mask[rows_B],
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

    def _read(self, start: str, tokens_R: list[int], limit: int) -> Output:
        """Read one row of new tokens behind the given start."""
        end = eos_id(self._built.tokenizer)
        is_complete = end in tokens_R
        body = tokens_R[: tokens_R.index(end)] if is_complete else tokens_R
        # The bytes that the grammar saw: a tokenizer's own decoding may move spaces.
        text = start + b"".join(self._vocabulary[token] or b"" for token in body).decode(errors="replace")
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
    """Forbid every token that a row's draft does not allow, and count steps."""

    def __init__(self, drafts: Sequence[Draft | None], progress: SlowProgress) -> None:
        self._drafts = [draft for draft in drafts if draft is not None]
        self._progress = progress

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask (B, V) logits, given the (B, n) tokens that were generated so far."""
        self._progress.advance()
        if not self._drafts:
            return scores
        if input_ids.shape[1] > 0:  # the prompt is given as embeddings, it has no ids
            for draft, token in zip(self._drafts, input_ids[:, -1].tolist(), strict=True):
                if not draft.is_ended:  # behind its EOS a row is padded
                    draft.append(token)
        return _only([draft.allowed() for draft in self._drafts], scores)


def _only(allowed: Sequence[TokenIds], scores_BV: Tensor) -> Tensor:
    """The scores of each row's allowed tokens; -inf for all others. Few are allowed, so few are moved."""
    ids_BK = np.empty((len(allowed), max(map(len, allowed))), dtype=np.int64)
    for row_K, ids in zip(ids_BK, allowed, strict=True):
        row_K[: len(ids)] = ids
        row_K[len(ids) :] = ids[0]
    index_BK = torch.from_numpy(ids_BK).to(scores_BV.device)
    return torch.full_like(scores_BV, -torch.inf).scatter_(1, index_BK, scores_BV.gather(1, index_BK))


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
    out_dir: Path,
    outputs: Mapping[str, Output],
    *,
    programs_only: bool = False,
    workers: int = 1,
    seconds: float = _WRITING_SECONDS,
) -> dict[str, str | None]:
    """Write `<name>.txt` of every output, and .json, .step and .png of those that are programs.

    Without OpenCASCADE there is no .step. Solids are built in worker processes, `seconds` each at most. Gives
    for each name None, or why there is no solid (then .step and .png are missing). With `programs_only`
    none is built, and what is a program has no error.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    errors = {name: output.error for name, output in outputs.items()}
    artifacts: dict[str, Artifact] = {}
    for name, output in outputs.items():
        stem = out_dir / name
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".json", ".step", ".png"):  # of an earlier run
            stem.with_name(stem.name + suffix).unlink(missing_ok=True)
        stem.with_name(f"{stem.name}.txt").write_text(output.text + "\n", encoding="utf-8")
        if output.program is not None:
            written = json.dumps(omnicad.to_json(output.program), indent=1)
            stem.with_name(f"{stem.name}.json").write_text(written, encoding="utf-8")
            if not programs_only:
                artifacts[name] = Artifact(stem, output.program)
    failures = write_artifacts(list(artifacts.values()), workers=workers, seconds=seconds)
    return errors | dict(zip(artifacts, failures, strict=True))


@dataclass(frozen=True, kw_only=True)
class GenerateSettings:
    """How programs are generated from files."""

    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    best_of: int = 1
    """Candidates for each input."""
    temperature: float = 0.0
    """Of drawn tokens; the first of several candidates is greedy."""
    fit: int = 0
    """Trials in which the numbers of a program are moved to bring it nearer to the points."""
    seed: int = 0
    batch_size: int = 8
    workers: int = 1
    """Processes that build solids."""
    programs_only: bool = False
    """Write texts and JSON alone: no solid is built for STEP and picture."""
    worse: Worse = field(default_factory=Worse)
    """What is done to the points, by `seed`."""

    @property
    def builder(self) -> str | None:
        """What builds solids; None if none are built."""
        return None if self.programs_only else installed_kernel().value


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What became of one input."""

    id: str
    error: str | None
    """Why there is no solid; None if there is one. Of programs alone: why there is no program."""
    was_cut: bool
    """The program had to end where it does."""
    modalities: str
    """What the model was given, such as `text+points`; empty if it was given nothing."""
    caption: str
    builder: str | None
    """What built the solid: `opencascade`, or `polygons` where that is not installed (then no .step); None if
    programs alone were written."""
    fit: int
    """Trials of the fit to the points; 0: as the model wrote it."""
    noise: float
    """What was added to the points that the model was given: see `Worse`."""
    dropped: float
    """What was left out of them."""


def generate_file(checkpoint: Path, out: Path, given: Unread, settings: GenerateSettings) -> None:
    """Generate one program and write it as `<out>/program.{txt,json,step,png}`.

    Errors as for `Generator.generate`; CadError as well: no solid came out (the .txt is there to look at).
    """
    make_writable(out, "--out")
    read = settings.worse.of(given.read(), settings.seed, "program")
    (result,) = _generate_and_write(Generator.from_checkpoint(checkpoint), out, {"program": read}, settings)
    if result.error is not None:
        raise CadError(f"no solid came out: {result.error}; the text is in {out / 'program.txt'}")
    cut = f" (ended after {settings.max_new_tokens} tokens: --max_new_tokens)" if result.was_cut else ""
    made = ["program.txt", "program.json"]
    has_step = installed_kernel() is Kernel.OPENCASCADE
    if not settings.programs_only:
        made += ["program.step", "program.png"] if has_step else ["program.png"]
    print(f"wrote {out}/{', '.join(made[:-1])} and {made[-1]}{cut}")
    if not (has_step or settings.programs_only):
        print(_NO_KERNEL)


def generate_folder(
    checkpoint: Path, out: Path, inputs: Mapping[str, Unread], settings: GenerateSettings
) -> list[Generated]:
    """Generate a program for each input and write it as `<out>/<id>.{txt,json,step,png}`.

    An input that cannot be used costs itself alone. `<out>/generated.jsonl` lists all, in their order.
    """
    make_writable(out, "--out")
    return generate_all(Generator.from_checkpoint(checkpoint), out, inputs, settings)


def generate_all(
    generator: Generator, out: Path, inputs: Mapping[str, Unread], settings: GenerateSettings
) -> list[Generated]:
    """`generate_folder` with a model that is loaded already, into a folder that can be written."""
    ids = list(inputs)
    results: dict[str, Generated] = {}
    for first in range(0, len(ids), _WRITTEN_AT_ONCE):
        some = ids[first : first + _WRITTEN_AT_ONCE]
        if len(ids) > _WRITTEN_AT_ONCE:
            print(f"inputs {first + 1} to {first + len(some)} of {len(ids)}")
        usable: dict[str, Input] = {}
        for one in some:
            try:
                given = settings.worse.of(inputs[one].read(), settings.seed, one)
                usable[one] = generator.usable(given, settings.max_new_tokens)
            except DataError as error:
                results[one] = Generated(
                    id=one,
                    error=str(error),
                    was_cut=False,
                    modalities="",
                    caption=inputs[one].caption,
                    builder=settings.builder,
                    fit=0,
                    **asdict(settings.worse),
                )
        for result in _generate_and_write(generator, out, usable, settings):
            results[result.id] = result
    ordered = [results[one] for one in ids]
    with atomic_path(out / LIST_FILE) as path:
        path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in ordered), encoding="utf-8")
    return ordered


def _generate_and_write(
    generator: Generator, out: Path, inputs: Mapping[str, Input], settings: GenerateSettings
) -> list[Generated]:
    if settings.fit:  # said before anything is generated
        generator.require_command_text("fitted to points (--fit)")
    generated = generator.generate_best(
        list(inputs.values()),
        settings.max_new_tokens,
        candidates=settings.best_of,
        temperature=settings.temperature,
        seed=settings.seed,
        batch_size=settings.batch_size,
        workers=settings.workers,
    )
    if settings.fit:
        generated = generator.fit(
            list(inputs.values()), generated, trials=settings.fit, workers=settings.workers
        )
    outputs = dict(zip(inputs, generated, strict=True))
    errors = write_outputs(out, outputs, programs_only=settings.programs_only, workers=settings.workers)
    return [
        Generated(
            id=one,
            error=errors[one],
            was_cut=outputs[one].was_cut,
            modalities=given.combo,
            caption=given.caption,
            builder=settings.builder,
            fit=settings.fit if given.points_NC is not None else 0,
            **asdict(settings.worse),
        )
        for one, given in inputs.items()
    ]


def print_generated(results: Sequence[Generated], out: Path, console: Console) -> None:
    """Counts as a table, then each input without a solid and why."""
    table = Table("generated", "")
    table.add_row("inputs", str(len(results)))
    done = "programs" if all(one.builder is None for one in results) else "solids"
    table.add_row(done, str(sum(one.error is None for one in results)))
    table.add_row("ended by --max_new_tokens", str(sum(one.was_cut for one in results)))
    console.print(table)
    failed = [one for one in results if one.error is not None]
    if failed:
        reasons = Table(f"no {done.removesuffix('s')}", "reason")
        for one in failed:
            reasons.add_row(Text(one.id), Text(one.error or ""))  # as text: brackets are no markup
        console.print(reasons)
    if any(one.builder == Kernel.POLYGONS.value for one in results):
        console.print(_NO_KERNEL, highlight=False)
    console.print(f"written to {out}", highlight=False, markup=False)
