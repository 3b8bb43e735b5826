"""Make, prepare and show data."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cad_mllm.config import TargetFormat
from cad_mllm.errors import ConfigError, DataError, ExitCode
from cad_mllm.settings import Positional, parse_flags, require

_MAX_VIEWS = 8


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Make a data set from Omni-CAD: points with normals, rendered views. Resumes where it stopped."""

    out: Path
    """Data folder to write."""
    archive: Path | None = None
    """Omni-CAD.zip as it was downloaded (it is not unpacked), or the folder with json/ and txt/."""
    json_root: Path | None = None
    """Instead of --archive: folder of CAD JSON files (json/0000/*.json)."""
    txt_root: Path | None = None
    """With --json_root: folder of caption files (txt/0000.json ...)."""
    layout: Literal["files", "shards"] | None = None
    """`shards`: Arrow files under one index (unset, with --archive). `files`: json/ txt/ pcd/ img/ (with
    --json_root)."""
    split_file: Path | None = None
    """For shards: raw_train_test_split.json, whose `test` becomes the split `val`. Unset: all is `train`."""
    rows_per_shard: int = 1024
    """For shards: models in one file."""
    part: str = "0/1"
    """For shards: the share of this machine, 0/16 to 15/16. The last one to finish writes the index."""
    tokenizer: str = ""
    """For shards: tokenizer of a language model (path or hub name); the report then counts its tokens."""
    workers: int = 0
    """Worker processes (0: one per core)."""
    seconds: float = 60.0
    """Time limit of each model; a model that takes longer is skipped and listed."""
    views: int = 8
    """Rendered views of each model (0 to 8)."""
    points: int = 10_000
    """Points sampled on the surface of each model."""


def prepare(argv: Sequence[str]) -> ExitCode:
    """Make points and views from Omni-CAD JSON."""
    example = (
        "examples:\n"
        "  cad-mllm prepare --archive Omni-CAD.zip --out data/omnicad \\\n"
        "      --split_file raw_train_test_split.json\n"
        "  cad-mllm prepare --json_root download/json --txt_root download/txt --out data/Omni-CAD\n"
    )
    arguments = parse_flags(PrepareArguments, argv, prog="cad-mllm prepare", examples=example)
    require("--workers", arguments.workers, 0)
    require("--seconds", arguments.seconds, 0.1)
    require("--views", arguments.views, 0, _MAX_VIEWS)
    require("--points", arguments.points, 1)
    require("--rows_per_shard", arguments.rows_per_shard, 1)
    if (arguments.archive is None) == (arguments.json_root is None):
        raise ConfigError("nothing to prepare: give --archive, or --json_root, and not both")
    if arguments.txt_root is not None and arguments.json_root is None:
        raise ConfigError("--txt_root goes with --json_root: an --archive has its captions in txt/")
    layout = arguments.layout or ("files" if arguments.archive is None else "shards")
    if layout == "shards":
        return _prepare_shards(arguments)
    for flag in ("split_file", "part", "tokenizer", "rows_per_shard"):
        if getattr(arguments, flag) != getattr(PrepareArguments, flag):
            raise ConfigError(f"--{flag} is for shards: add --layout shards")
    return _prepare_files(arguments)


def _prepare_shards(arguments: PrepareArguments) -> ExitCode:
    from rich.console import Console

    from cad_mllm.data.archive import Splits, open_archive, open_folders
    from cad_mllm.data.layout import ModelSettings
    from cad_mllm.data.prepare_shards import prepare_shards, print_shards_report
    from cad_mllm.data.quality import Tokenizer
    from cad_mllm.data.survey import Part

    part, splits = Part.parse(arguments.part), Splits(arguments.split_file)
    tokenizer = Tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    if arguments.archive is not None:
        archive = open_archive(arguments.archive)
    else:
        assert arguments.json_root is not None
        archive = open_folders(arguments.json_root, arguments.txt_root)
    report = prepare_shards(
        archive,
        arguments.out,
        splits=splits,
        settings=ModelSettings(points=arguments.points, views=arguments.views),
        rows=arguments.rows_per_shard,
        part=part,
        tokenizer=tokenizer,
        workers=arguments.workers or os.cpu_count() or 1,
        seconds=arguments.seconds,
    )
    print_shards_report(report, arguments.out, Console())
    return ExitCode.DONE


def _prepare_files(arguments: PrepareArguments) -> ExitCode:
    from rich.console import Console

    from cad_mllm.data.prepare import prepare as prepare_data
    from cad_mllm.data.prepare import print_report

    json_root, txt_root = arguments.json_root, arguments.txt_root
    if json_root is None:
        assert arguments.archive is not None
        if not arguments.archive.is_dir():
            raise ConfigError(
                f"--archive {arguments.archive}: --layout files needs a folder: unpack the zip file"
                " first, or leave --layout out"
            )
        json_root, texts = arguments.archive / "json", arguments.archive / "txt"
        txt_root = texts if texts.is_dir() else None
    report = prepare_data(
        json_root,
        arguments.out,
        txt_root=txt_root,
        workers=arguments.workers or os.cpu_count() or 1,
        seconds=arguments.seconds,
        views=arguments.views,
        points=arguments.points,
    )
    print_report(report, Console())
    if report.made + report.already_there == 0:
        raise DataError(
            f"none of the {len(report.skipped)} models could be prepared: the table above says why"
        )
    return ExitCode.DONE


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Show what is in a data set, and one sample as the sequence that training sees."""

    data: Positional[str]
    """Sharded data set (folder or URL), or folder in the Omni-CAD layout."""
    tokenizer: str = "tiny"
    """Whose tokens to count and show: local folder, hub name, or `tiny` (one token a byte)."""
    id: str | None = None
    """Which sample to show. Unset: one drawn by --seed."""
    split: Literal["train", "val"] = "train"
    """Which split it comes from."""
    seed: int = 0
    """Draws the sample."""
    target_format: TargetFormat = "command"
    """As in training."""
    quantization_bits: Literal[8, 10] = 8
    """As in training."""
    max_seq_length: int = 2048
    """As in training; here of the text alone."""
    workers: int = 0
    """Worker processes that read loose files (0: one per core)."""


def inspect(argv: Sequence[str]) -> ExitCode:
    """Show what is in a data set, and one training sequence token by token."""
    example = (
        "examples:\n"
        "  cad-mllm data inspect data/omnicad --tokenizer Qwen/Qwen3-8B\n"
        "  cad-mllm data inspect s3://bucket/omnicad --split val --id 0000/00000071_00005\n"
    )
    arguments = parse_flags(InspectArguments, argv, prog="cad-mllm data inspect", examples=example)
    require("--seed", arguments.seed, 0)
    require("--max_seq_length", arguments.max_seq_length, 1)
    require("--workers", arguments.workers, 0)
    from rich.console import Console

    from cad_mllm.data.inspect import InspectSettings
    from cad_mllm.data.inspect import inspect as inspect_data
    from cad_mllm.model.build import load_tokenizer

    try:
        tokenizer = load_tokenizer(arguments.tokenizer)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--llm_model_name", "--tokenizer")) from error
    settings = InspectSettings(
        split=arguments.split,
        sample_id=arguments.id,
        seed=arguments.seed,
        target_format=arguments.target_format,
        bits=arguments.quantization_bits,
        max_seq_length=arguments.max_seq_length,
        workers=arguments.workers or os.cpu_count() or 1,
    )
    inspect_data(arguments.data, tokenizer, settings, Console())
    return ExitCode.DONE


@dataclass(frozen=True, kw_only=True)
class MakeDummyArguments:
    """Write procedural CAD models with captions, points and views in the Omni-CAD layout."""

    out: Path
    """Data folder to write."""
    num_samples: int = 100
    """How many models."""
    complexity: Literal["real", "simple", "varied"] = "real"
    """Operations and lengths distributed as in real models; or a handful of features each: those of a few
    families (simple), or of free dimensions (varied)."""
    views: int = 8
    """Pictures of each model (drawing them takes most of the time)."""
    size: int = 224
    """Width and height of each, in pixels."""
    seed: int = 42
    """The same seed writes the same models."""
    workers: int = 0
    """Worker processes (0: one per core)."""


def make_dummy(argv: Sequence[str]) -> ExitCode:
    """Write procedural models in the Omni-CAD layout."""
    example = (
        "examples:\n"
        "  cad-mllm make-dummy --out data/dummy --num_samples 200 --seed 7\n"
        "  cad-mllm make-dummy --out data/synth/train --num_samples 50000 --complexity varied --views 1\n"
    )
    arguments = parse_flags(MakeDummyArguments, argv, prog="cad-mllm make-dummy", examples=example)
    require("--num_samples", arguments.num_samples, 1)
    require("--views", arguments.views, 0, _MAX_VIEWS)
    require("--size", arguments.size, 1)
    require("--seed", arguments.seed, 0)
    require("--workers", arguments.workers, 0)
    from cad_mllm.cad.synth import Complexity
    from cad_mllm.data.dummy import write_dummy_data

    write_dummy_data(
        arguments.out,
        complexity=Complexity(arguments.complexity),
        num_samples=arguments.num_samples,
        views=arguments.views,
        size=arguments.size,
        seed=arguments.seed,
        workers=arguments.workers or os.cpu_count() or 1,
    )
    return ExitCode.DONE
