"""Flags and YAML files become frozen dataclasses; every mistake becomes one `ConfigError`.

Order of precedence: defaults of the dataclasses, then `--config FILE.yaml`, then the flags.
A flag, a YAML key and a dataclass field share one name, whatever section the field sits in.
"""

import contextlib
import dataclasses
import difflib
import io
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro
import yaml
from pydantic import TypeAdapter, ValidationError
from tyro.conf import Positional as Positional  # for the fields that are given without their name

from cad_mllm.config import TrainConfig
from cad_mllm.errors import ConfigError

T = TypeVar("T")

TRAIN_EXAMPLES = """\
examples:
  # a minute on this machine: procedural data, a tiny model, no GPU
  cad-mllm train --config configs/train/tiny.yaml --output_dir outputs/tiny
  # your own data on four GPUs
  deepspeed --num_gpus=4 cad_mllm/train_curriculum.py --config configs/train/qwen3-8b-lora.yaml \\
      --train_data_path data/omnicad --output_dir outputs/lora
"""

DOCTOR_EXAMPLES = """\
examples:
  # this machine alone, for the run that these flags describe
  cad-mllm doctor --config configs/train/qwen3-8b-lora.yaml
  # all ranks together, with the measured all-gather and the largest batch
  torchrun --nproc_per_node=4 cad_mllm/train_curriculum.py doctor --config configs/train/qwen3-8b-lora.yaml \\
      --deepspeed --deepspeed_config configs/deepspeed/ds_zero3_config.json --json doctor.json
"""

_ANY = math.inf
# Inclusive bounds of the numbers; the types are the dataclasses' own business.
_BOUNDS: dict[str, tuple[float, float]] = {
    "lora_r": (1, _ANY),
    "lora_alpha": (1, _ANY),
    "gpu_memory_gb": (0, 1e4),
    "num_dummy_samples": (1, _ANY),
    "max_seq_length": (1, _ANY),
    "augment_prefix": (0, 1),
    "augment_removal": (0, 1),
    "caption_dropout": (0, 1),
    "max_skipped_fraction": (0, 1),
    "num_workers": (0, _ANY),
    "batch_size": (1, _ANY),
    "pack_tokens": (0, _ANY),
    "gradient_accumulation_steps": (1, _ANY),
    "warmup_steps": (0, _ANY),
    "weight_decay": (0, 1),
    "max_grad_norm": (0, 1e6),
    "projector_lr_multiplier": (0, 1e6),
    "stage1_epochs": (0, _ANY),
    "stage2_epochs": (0, _ANY),
    "stage3_epochs": (0, _ANY),
    "stage1_lr": (0, 1),
    "stage2_lr": (0, 1),
    "stage3_lr": (0, 1),
    "seed": (0, 2**32 - 1),
    "logging_steps": (1, _ANY),
    "save_steps": (1, _ANY),
    "keep_last_n_checkpoints": (0, _ANY),
    "max_restarts_without_progress": (0, _ANY),
    "hang_timeout_minutes": (0.01, 7 * 24 * 60),
}


@dataclass(frozen=True, kw_only=True)
class _TrainArguments(TrainConfig):
    """Train the curriculum: text, then text + points, then text + points + image."""

    config: Path | None = None
    """YAML file of flag names and values; flags given on the command line win over it."""


@dataclass(frozen=True, kw_only=True)
class _DoctorArguments(_TrainArguments):
    """Check that the machines can run a training, given its flags; exit 5 if they cannot."""

    json: Path | None = None
    """File for the findings and the facts behind them, as JSON."""


A = TypeVar("A", bound=_TrainArguments)


def parse_train_args(argv: Sequence[str], prog: str = "train_curriculum.py") -> TrainConfig:
    """Flags over the YAML file that `--config` names over the defaults.

    Raises ConfigError for an unknown flag or key, a bad value, or a file that is not there.
    `--help` prints and raises SystemExit(0).
    """
    return _parse_over_yaml(_TrainArguments, argv, prog, TRAIN_EXAMPLES)[0]


def parse_doctor_args(argv: Sequence[str], prog: str) -> tuple[TrainConfig, Path | None]:
    """Training flags as in `parse_train_args`, and where the report goes (`--json`)."""
    config, parsed = _parse_over_yaml(_DoctorArguments, argv, prog, DOCTOR_EXAMPLES)
    return config, parsed.json


def _parse_over_yaml(
    arguments: type[A], argv: Sequence[str], prog: str, examples: str
) -> tuple[TrainConfig, A]:
    config_path = _find_config_path(argv)
    base = TrainConfig() if config_path is None else read_yaml(config_path)
    if _is_given("--batch_size", argv) and not _is_given("--pack_tokens", argv):
        # Two ways to say what a micro-batch is, and a flag wins over the file.
        base = dataclasses.replace(base, optim=dataclasses.replace(base.optim, pack_tokens=0))
    default = arguments(config=config_path, **_sections(base))
    parsed = parse_flags(arguments, argv, prog=prog, examples=examples, default=default)
    config = TrainConfig(**_sections(parsed))
    _check(config)
    return config, parsed


def parse_flags(
    arguments: type[T], argv: Sequence[str], *, prog: str, examples: str, default: T | None = None
) -> T:
    """One flag per field of the dataclass `arguments` (nested dataclasses are sections of the help).

    Raises ConfigError in one line for whatever is wrong; `--help` prints and raises SystemExit(0).
    """
    stdout, stderr = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            parsed, unknown = tyro.cli(
                arguments,
                args=list(argv),
                prog=prog,
                default=default,
                use_underscores=True,
                return_unknown_args=True,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as exit_request:
        if exit_request.code in (0, None):
            # `{None}|PATH` is tyro's way to write an optional path; a newcomer reads `PATH`.
            text = stdout.getvalue().replace("{None}|", "")
            lines = [line.rstrip() for line in text.rstrip().splitlines()]
            show("\n".join([*lines, "", examples.rstrip()]))
            raise
        raise ConfigError(f"{_first_paragraph(stderr.getvalue())} (see `{prog} --help`)") from None
    if unknown:
        raise ConfigError(_explain_unknown(unknown[0], flag_names(arguments), prog))
    assert parsed is not None
    return parsed


def require(flag: str, value: float, low: float, high: float = math.inf) -> None:
    """ConfigError if a number is out of its range."""
    if not low <= value <= high:
        wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"{flag} must be {wanted}, got {value}")


def show(text: str) -> None:
    """Print to a reader who may stop reading: `--help | head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def read_yaml(path: Path) -> TrainConfig:
    """The defaults, overridden by a flat YAML mapping of flag names. Raises ConfigError naming the file."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"--config {path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {_one_line(str(error))}") from error
    if values is None:
        values = {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"--config {path}: expected lines of `flag_name: value`")
    return config_from_flat(values, source=str(path))


def config_from_flat(values: Mapping[str, object], *, source: str) -> TrainConfig:
    """A config from flat names; types are checked and coerced (`"2e-5"` is a float, `"yes"` is no int).

    Raises ConfigError naming `source` and the key.
    """
    known = [leaf.name for _, leaf in leaves()]
    for key in values:
        if key not in known:
            raise ConfigError(f"{source}: unknown key {key!r}{_suggestion(key, known)}")
    sections = {}
    hints = get_type_hints(TrainConfig)
    for section in dataclasses.fields(TrainConfig):
        owner = hints[section.name]
        own = {f.name: values[f.name] for f in dataclasses.fields(owner) if f.name in values}
        sections[section.name] = _validated(owner, own, source)
    return TrainConfig(**sections)


def to_flat(config: TrainConfig) -> dict[str, Any]:
    """Flat name -> plain value (paths as strings), in the order of the help. Undone by `config_from_flat`."""
    dumped = TypeAdapter(TrainConfig).dump_python(config, mode="json")
    return {name: value for section in dumped.values() for name, value in section.items()}


def leaves() -> Iterator[tuple[str, dataclasses.Field[Any]]]:
    """(section name, field) of every training flag, in the order of the help."""
    hints = get_type_hints(TrainConfig)
    for section in dataclasses.fields(TrainConfig):
        for leaf in dataclasses.fields(hints[section.name]):
            yield section.name, leaf


def flag_names(arguments: type) -> list[str]:
    """Every flag that `parse_flags` accepts for this dataclass, with its dashes."""
    names = ["--help"]
    for name, hint in get_type_hints(arguments).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            names += [flag for flag in flag_names(hint) if flag != "--help"]
        else:
            names += [f"--{name}", f"--no_{name}"] if hint is bool else [f"--{name}"]
    return names


def _find_config_path(argv: Sequence[str]) -> Path | None:
    """The value of the last `--config`; a missing value is left to the real parser to report."""
    found = None
    for position, token in enumerate(argv):
        if token.startswith("--config="):
            found = token.removeprefix("--config=")
        elif token == "--config" and position + 1 < len(argv):
            found = argv[position + 1]
    return None if found is None else Path(found)


def _is_given(flag: str, argv: Sequence[str]) -> bool:
    """Whether the command line names the flag, in any of its spellings (`--batch-size=4`)."""
    spelled = (token.partition("=")[0] for token in argv if token.startswith("--"))
    return flag in ("--" + name[2:].replace("-", "_") for name in spelled)


def _sections(config: TrainConfig) -> dict[str, Any]:
    return {section.name: getattr(config, section.name) for section in dataclasses.fields(TrainConfig)}


def _validated(owner: type[T], values: dict[str, object], source: str) -> T:
    """Construct one section through pydantic, refusing what it would bend: true for a number."""
    hints = get_type_hints(owner)
    for key, value in values.items():
        if isinstance(value, bool) and hints[key] in (int, float):
            raise ConfigError(f"{source}: {key}: expected a number, got {str(value).lower()}")
    try:
        return TypeAdapter(owner).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        reason = first["msg"][0].lower() + first["msg"][1:]
        raise ConfigError(f"{source}: {first['loc'][0]}: {reason} (got {first['input']!r})") from None


def _check(config: TrainConfig) -> None:
    """Refuse numbers out of range and flags that contradict each other."""
    values = to_flat(config)
    for name, (low, high) in _BOUNDS.items():
        # Written so that NaN fails too; pydantic dumps NaN and infinity to JSON as None.
        if values[name] is None or not low <= values[name] <= high:
            wanted = f"at least {low}" if high == _ANY else f"between {low} and {high:g}"
            raise ConfigError(f"--{name} must be {wanted}, got {values[name]}")
    data = config.data
    if data.augment_prefix + data.augment_removal > 1:
        raise ConfigError(
            "--augment_prefix and --augment_removal are more than 1 together: what is left is the share of "
            "whole programs"
        )
    if data.target_format == "json" and data.augment_prefix + data.augment_removal > 0:
        raise ConfigError(
            "--augment_prefix and --augment_removal are for command text: leave out --target_format json"
        )
    if data.encoder_features is not None and config.model.train_encoders:
        raise ConfigError(
            "--encoder_features keeps what frozen encoders compute, and --train_encoders changes it: "
            "leave out one of them"
        )
    pack_tokens, longest = config.optim.pack_tokens, config.data.max_seq_length
    if 0 < pack_tokens < longest:
        raise ConfigError(
            f"--pack_tokens {pack_tokens} has no room for a sample of --max_seq_length {longest}: "
            f"raise it ({4 * longest} or more packs well), or leave it out"
        )
    if config.model.gpu_memory_gb and not config.model.use_gradient_checkpointing:
        raise ConfigError(
            "--gpu_memory_gb says how much of the gradient checkpointing is needed: "
            "add --use_gradient_checkpointing, or leave it out"
        )
    run = config.run
    if run.deepspeed and run.deepspeed_config is None:
        raise ConfigError(
            "--deepspeed needs --deepspeed_config, for example configs/deepspeed/ds_zero3_config.json"
        )
    if run.deepspeed_config is not None and not run.deepspeed:
        raise ConfigError("--deepspeed_config is given without --deepspeed: add --deepspeed or leave it out")
    if run.deepspeed_config is not None and not run.deepspeed_config.is_file():
        raise ConfigError(f"--deepspeed_config {run.deepspeed_config}: no such file")


def _explain_unknown(token: str, known: Iterable[str], prog: str) -> str:
    if token.startswith("-"):
        flag = token.split("=", 1)[0].replace("-", "_")
        flag = "--" + flag.lstrip("_")
        return f"unknown flag {token}{_suggestion(flag, known)} (see `{prog} --help`)"
    return f"unexpected argument `{token}`: a switch such as --deepspeed takes no value (see `{prog} --help`)"


def _suggestion(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _first_paragraph(report: str) -> str:
    """What tyro says under its title: its error reports are paragraphs with dashed rules between."""
    paragraphs = re.split(r"^\s*-{5,}\s*$", report, flags=re.MULTILINE)
    return _one_line(paragraphs[1] if len(paragraphs) > 1 else report)


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()
