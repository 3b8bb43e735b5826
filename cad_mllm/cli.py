"""The `cad-mllm` command: one function per subcommand, one exit code per kind of mistake.

Nothing heavy is imported before it is needed, so that `--help` and a mistyped flag answer at once.
"""

import logging
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from cad_mllm.config import TargetFormat
from cad_mllm.errors import CadMllmError, ConfigError, DataError, ExitCode, without_credentials
from cad_mllm.settings import (
    TRAIN_EXAMPLES,
    Positional,
    leaves,
    parse_doctor_args,
    parse_flags,
    parse_train_args,
    show,
    to_flat,
)

_MAX_VIEWS = 8
_INTERRUPTED = 130
_BUG = 1
_LOST_BY_GLOO = re.compile(r"gloo/transport|connectFullMesh|Connection (closed|reset) by peer|Broken pipe")
_MISUSE_OF_NCCL = re.compile(r"ncclInvalid(Usage|Argument)")
_OUT_OF_MEMORY = re.compile(r"out of memory", re.IGNORECASE)


def train(argv: Sequence[str], prog: str = "cad-mllm train") -> ExitCode:
    """Train the three-stage curriculum."""
    config = parse_train_args(argv, prog)
    from cad_mllm.train.trainer import train as train_curriculum

    return train_curriculum(config)


def doctor(argv: Sequence[str]) -> ExitCode:
    """Check that the machines can run a training; takes its flags."""
    config, json_file = parse_doctor_args(argv, prog="cad-mllm doctor")
    from cad_mllm.train.doctor import examine

    return examine(config, json_file)


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
    _require("--workers", arguments.workers, 0)
    _require("--seconds", arguments.seconds, 0.1)
    _require("--views", arguments.views, 0, _MAX_VIEWS)
    _require("--points", arguments.points, 1)
    _require("--rows_per_shard", arguments.rows_per_shard, 1)
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
    _require("--seed", arguments.seed, 0)
    _require("--max_seq_length", arguments.max_seq_length, 1)
    _require("--workers", arguments.workers, 0)
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
    _require("--num_samples", arguments.num_samples, 1)
    _require("--views", arguments.views, 0, _MAX_VIEWS)
    _require("--size", arguments.size, 1)
    _require("--seed", arguments.seed, 0)
    _require("--workers", arguments.workers, 0)
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


@dataclass(frozen=True, kw_only=True)
class GenerateArguments:
    """Generate CAD programs from text, points and images; writes text, JSON, STEP and a picture of each."""

    checkpoint: Path
    """A checkpoint folder that training wrote, or an output folder (its newest checkpoint)."""
    out: Path
    """Folder for the program text, JSON, STEP and PNG."""
    text: str = ""
    """What to model."""
    points: Path | None = None
    """Point cloud: .npz with `points`, (N, 6) coordinates and normals."""
    image: Path | None = None
    """Picture of the model."""
    start: str = ""
    """Command text that the program begins with: it is gone on with."""
    folder: Path | None = None
    """Many inputs: NAME.txt (caption), NAME.npz (points), NAME.png (picture) of one stem; or a data set."""
    modalities: tuple[Literal["text", "points", "image"], ...] = ("text", "points", "image")
    """What of the folder is used, where it is there."""
    max_new_tokens: int = 1024
    """Longest program, in tokens: a longer one ends there, and that is said."""
    best_of: int = 1
    """Candidates for each input. The one nearest to the points is kept; without points, the one that the
    others agree with most."""
    temperature: float | None = None
    """Of drawn tokens; 0 takes the likeliest. Unset: 0; with --best_of .8, but for the first candidate."""
    fit: int = 0
    """Trials (some ms each) in which a number of the program is moved to bring it nearer to the points."""
    noise: float = 0.0
    """Robustness: standard deviation of Gaussian noise on the points, in half longest sides of their box."""
    dropped: float = 0.0
    """Robustness: share of the points that are left out at random, 0 to .99."""
    seed: int = 0
    """Of the draws, the noise and the points left out."""
    batch_size: int = 8
    """Inputs that are computed together."""
    programs_only: bool = False
    """Write program texts and JSON alone, which `evaluate` reads: no STEP, no pictures."""
    workers: int = 0
    """Processes that build solids. 0: one per core."""


_CANDIDATE_TEMPERATURE = 0.8


def generate(argv: Sequence[str]) -> ExitCode:
    """Generate CAD programs from text, points and images."""
    example = (
        "examples:\n"
        '  cad-mllm generate --checkpoint outputs/tiny --out out --text "a plate with two holes"\n'
        "  cad-mllm generate --checkpoint outputs/tiny --out out --points scan.npz --best_of 8 --fit 500\n"
        "  cad-mllm generate --checkpoint outputs/tiny --out out --folder inputs --modalities points\n"
    )
    arguments = parse_flags(GenerateArguments, argv, prog="cad-mllm generate", examples=example)
    for flag, value in (("max_new_tokens", 1), ("best_of", 1), ("batch_size", 1), ("workers", 0), ("fit", 0)):
        _require(f"--{flag}", getattr(arguments, flag), value)
    _require("--temperature", arguments.temperature or 0.0, 0)
    _require("--noise", arguments.noise, 0)
    _require("--dropped", arguments.dropped, 0, 0.99)
    if arguments.best_of > 1 and arguments.temperature == 0:
        raise ConfigError("--best_of with --temperature 0 would make the same candidate every time: raise it")
    single = arguments.text or arguments.points is not None or arguments.image is not None
    if not single and arguments.folder is None:
        raise ConfigError("nothing to generate from: give --text, --points or --image, or --folder")
    if arguments.folder is not None and (single or arguments.start):
        raise ConfigError("--folder stands for --text, --points, --image and --start: give one or the other")
    from rich.console import Console

    from cad_mllm.generate import GenerateSettings, generate_file, generate_folder, print_generated
    from cad_mllm.inputs import InputFiles, Worse, read_folder

    drawn = _CANDIDATE_TEMPERATURE if arguments.best_of > 1 else 0.0
    how = GenerateSettings(
        max_new_tokens=arguments.max_new_tokens,
        best_of=arguments.best_of,
        temperature=drawn if arguments.temperature is None else arguments.temperature,
        fit=arguments.fit,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        workers=arguments.workers or os.cpu_count() or 1,
        programs_only=arguments.programs_only,
        worse=Worse(noise=arguments.noise, dropped=arguments.dropped),
    )
    if arguments.folder is None:
        given = InputFiles(
            caption=arguments.text, points=arguments.points, image=arguments.image, start=arguments.start
        )
        generate_file(arguments.checkpoint, arguments.out, given, how)
    else:
        inputs = read_folder(arguments.folder, set(arguments.modalities))
        print_generated(
            generate_folder(arguments.checkpoint, arguments.out, inputs, how), arguments.out, Console()
        )
    return ExitCode.DONE


@dataclass(frozen=True, kw_only=True)
class EvaluateArguments:
    """Compare generated models with the true ones; writes a table of all, a summary and a page to look at."""

    pred: Path
    """Folder of predictions, as `generate` writes them: command text, Omni-CAD JSON, STEP, STL, PLY, OBJ."""
    true: Path
    """Folder of the true models, of the same kinds, or a data set: in the Omni-CAD layout or sharded."""
    train: Path | None = None
    """Training set, for novelty: a folder of programs, a data set, or a file with one command text a line."""
    out: Path = Path("outputs/evaluation")
    """Folder for samples.csv, summary.json and report.html."""
    workers: int = 0
    """Worker processes (0: one per core)."""


def evaluate(argv: Sequence[str]) -> ExitCode:
    """Compare generated models with the true ones."""
    example = (
        "examples:\n"
        "  cad-mllm evaluate --pred outputs/generated --true data/omnicad --out outputs/evaluation\n"
        "  # a point of a robustness curve: the report of outputs/evaluation shows it when written again\n"
        "  cad-mllm evaluate --pred outputs/noisy --true data/omnicad --out outputs/evaluation/noise-0.02\n"
    )
    arguments = parse_flags(EvaluateArguments, argv, prog="cad-mllm evaluate", examples=example)
    _require("--workers", arguments.workers, 0)
    from rich.console import Console

    from cad_mllm.data.atomic import make_writable
    from cad_mllm.evaluate import report, run

    make_writable(arguments.out, "--out")
    workers = arguments.workers or os.cpu_count() or 1
    evaluation = run.evaluate(arguments.pred, arguments.true, training=arguments.train, workers=workers)
    run.write_tables(arguments.out, evaluation)
    page = report.write_report(arguments.out, evaluation, workers=workers)
    run.print_summary(evaluation, console := Console())
    console.print(f"wrote {page}", highlight=False, soft_wrap=True)
    return ExitCode.DONE


@dataclass(frozen=True, kw_only=True)
class ClusterArguments:
    """What every command that talks to a cluster takes."""

    namespace: str | None = None
    """Namespace of the job. Unset: the overlay's own, else the kubeconfig's."""
    context: str | None = None
    """Context of the kubeconfig. Unset: the current one."""


@dataclass(frozen=True, kw_only=True)
class SubmitArguments(ClusterArguments):
    """Send an overlay's job to a cluster: render, check what it needs, apply server-side."""

    overlay: Positional[Path]
    """Folder of the overlay, such as k8s/overlays/zero3."""
    follow: bool = False
    """Show what happens and what rank 0 prints until the job ends, and exit with its result."""
    delete_on_interrupt: bool = False
    """Delete the job when Ctrl-C or SIGTERM ends the following."""


def submit(argv: Sequence[str]) -> int:
    """Send an overlay's job to a cluster."""
    example = (
        "examples:\n"
        "  cad-mllm submit k8s/overlays/zero3 --namespace training\n"
        "  cad-mllm submit k8s/overlays/smoke-cpu --follow --delete_on_interrupt\n"
    )
    arguments = parse_flags(SubmitArguments, argv, prog="cad-mllm submit", examples=example)
    if arguments.delete_on_interrupt and not arguments.follow:
        raise ConfigError("--delete_on_interrupt needs --follow: without it there is nothing to interrupt")
    from cad_mllm.cluster import run

    return run.submit(
        arguments.overlay,
        namespace=arguments.namespace,
        context=arguments.context,
        follow=arguments.follow,
        delete_on_interrupt=arguments.delete_on_interrupt,
    )


@dataclass(frozen=True, kw_only=True)
class WatchArguments(ClusterArguments):
    """Follow a job in a cluster: what happens to it and its pods, in words; exit with its result."""

    job: Positional[str]
    """NAME, or KIND/NAME where two kinds share it: cad-mllm-zero3, mpijob/cad-mllm-mpi-zero3."""
    delete_on_interrupt: bool = False
    """Delete the job when Ctrl-C or SIGTERM ends the following."""


def watch(argv: Sequence[str]) -> int:
    """Follow a job in a cluster, and exit with its result."""
    example = "example:\n  cad-mllm watch cad-mllm-zero3 --namespace training\n"
    arguments = parse_flags(WatchArguments, argv, prog="cad-mllm watch", examples=example)
    from cad_mllm.cluster import run

    return run.watch(
        arguments.job,
        namespace=arguments.namespace,
        context=arguments.context,
        delete_on_interrupt=arguments.delete_on_interrupt,
    )


@dataclass(frozen=True, kw_only=True)
class LogsArguments(ClusterArguments):
    """Print what rank 0 of a job prints, from its start to its end, across restarts."""

    job: Positional[str]
    """NAME, or KIND/NAME where two kinds share it."""


def logs(argv: Sequence[str]) -> int:
    """Print what rank 0 of a job prints, across restarts."""
    example = "example:\n  cad-mllm logs cad-mllm-zero3 --namespace training > zero3.log\n"
    arguments = parse_flags(LogsArguments, argv, prog="cad-mllm logs", examples=example)
    from cad_mllm.cluster import run

    return run.logs(arguments.job, namespace=arguments.namespace, context=arguments.context)


@dataclass(frozen=True, kw_only=True)
class SmokeArguments(ClusterArguments):
    """Run the smoke job: it must train, lose a pod, resume from its checkpoint and succeed."""

    overlay: Path = Path("k8s/overlays/smoke")
    """Folder of a smoke overlay: k8s/overlays/smoke (GPUs) or k8s/overlays/smoke-cpu (any cluster)."""
    kill_pod: bool = True
    """Kill one pod after the first checkpoint; off (`--no_kill_pod`): let the job run through."""
    minutes: float = 30.0
    """Time limit of the job."""
    keep: bool = False
    """Leave the job, its pods and its volume for a look."""
    json: Path | None = None
    """File for the report as JSON."""


def smoke(argv: Sequence[str]) -> int:
    """Run the smoke job on a cluster, and assert what it shows."""
    example = (
        "examples:\n"
        "  cad-mllm smoke --overlay k8s/overlays/smoke --namespace ci --json smoke.json\n"
        "  cad-mllm smoke --overlay k8s/overlays/smoke-cpu --no_kill_pod --keep\n"
    )
    arguments = parse_flags(SmokeArguments, argv, prog="cad-mllm smoke", examples=example)
    _require("--minutes", arguments.minutes, 0.1)
    from cad_mllm.cluster import run

    return run.smoke(
        arguments.overlay,
        namespace=arguments.namespace,
        context=arguments.context,
        kill_pod=arguments.kill_pod,
        minutes=arguments.minutes,
        keep=arguments.keep,
        json=arguments.json,
    )


@dataclass(frozen=True, kw_only=True)
class BenchArguments:
    """Time training steps beside other ways to compute the same: JSON, a table and a plot."""

    workload: Literal["A", "B", "C", "D"] = "A"
    """A: multimodal LoRA; B: full fine-tuning; C, D: text LoRA of 2,048 and 4,096 tokens."""
    model: Literal["qwen3-8b-random", "tiny"] = "qwen3-8b-random"
    """Which LM; `tiny` takes the workload in small, for a CPU."""
    ranks: tuple[int, ...] = ()
    """Numbers of GPUs to time on, such as `1 2 4`. Unset: all GPUs, or two processes on a CPU."""
    peers: tuple[str, ...] = ()
    """original-zero3 (the reference for the loss), original-zero2, zero3, zero3-resident, zero3-offload,
    zero2, fsdp2, plain. Unset: all, or the variants alone."""
    transport: Literal["nvlink", "shm", "socket"] = "nvlink"
    """What NCCL may use at most: shm as on a node without NVLink, socket as between one-GPU pods."""
    gpu_memory_cap_gb: float | None = None
    """GPU memory that a rank may allocate, as on a smaller card. Unset: all."""
    micro_batch_tokens: int | None = None
    """Tokens of a micro-batch in place of the workload's: a multiple of its longest sample."""
    variants: Path | None = None
    """JSON file with ZeRO settings to time: [{"name": "x", "peer": "zero3", "zero": {"KEY": VALUE}}]."""
    steps: int = 6
    """Timed steps of each peer."""
    minutes: float = 9.0
    """Time limit of all peers together; what was timed until then is written."""
    out: Path = Path("outputs/bench")
    """Folder for figures, plot and logs."""


def bench(argv: Sequence[str]) -> ExitCode:
    """Time training steps beside other ways to compute them."""
    example = (
        "examples:\n"
        "  cad-mllm bench --workload A --out outputs/bench\n"
        "  cad-mllm bench --workload C --ranks 1 2 4 --peers original-zero3 zero3 zero2 fsdp2 plain\n"
        "  cad-mllm bench --model tiny --steps 2   # about a minute on a CPU\n"
    )
    arguments = parse_flags(BenchArguments, argv, prog="cad-mllm bench", examples=example)
    _require("--steps", arguments.steps, 1)
    _require("--minutes", arguments.minutes, 0.01)
    for count in arguments.ranks:
        _require("--ranks", count, 1)
    if arguments.gpu_memory_cap_gb is not None:
        _require("--gpu_memory_cap_gb", arguments.gpu_memory_cap_gb, 0.1)
    from cad_mllm.bench.run import bench as time_peers

    return time_peers(
        arguments.workload,
        model=arguments.model,
        ranks=arguments.ranks,
        peers=arguments.peers,
        steps=arguments.steps,
        minutes=arguments.minutes,
        out=arguments.out,
        transport=arguments.transport,
        gpu_memory_cap_gb=arguments.gpu_memory_cap_gb,
        micro_batch_tokens=arguments.micro_batch_tokens,
        variants=arguments.variants,
    )


def show_config(argv: Sequence[str]) -> ExitCode:
    """Print the training configuration that the flags and --config give, as YAML."""
    import yaml

    config = parse_train_args(argv, prog="cad-mllm show-config")
    values = to_flat(config)
    section = None
    lines: list[str] = []
    for owner, leaf in leaves():
        if owner != section:
            section = owner
            lines.append(f"# {section}")
        lines.append(yaml.safe_dump({leaf.name: values[leaf.name]}).rstrip())
    show("\n".join(lines))
    return ExitCode.DONE


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train,
    "doctor": doctor,
    "prepare": prepare,
    "make-dummy": make_dummy,
    "data inspect": inspect,
    "generate": generate,
    "evaluate": evaluate,
    "show-config": show_config,
    "submit": submit,
    "watch": watch,
    "logs": logs,
    "smoke": smoke,
    "bench": bench,
}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry of the console script: never returns."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    run_and_exit(lambda: _dispatch(arguments))


def train_main() -> NoReturn:
    """Entry of `cad_mllm/train_curriculum.py`: never returns.

    `doctor` before the flags examines instead of training, so that whatever launches the ranks of a training
    can launch those of its examination.
    """
    argv = sys.argv[1:]
    # The deepspeed launcher puts a --local_rank of its own in front.
    first = next((word for word in argv if not word.startswith(("--local_rank=", "--local-rank="))), None)
    if first == "doctor":
        argv.remove(first)
        run_and_exit(lambda: doctor(argv))
    run_and_exit(lambda: train(argv, prog="train_curriculum.py"))


def run_and_exit(body: Callable[[], int]) -> NoReturn:
    """Run, say what went wrong in one line, and exit with the documented code.

    The last line of each rank states its code where a launcher set RANK: torchrun and deepspeed
    turn every failure into 1. A bug keeps its traceback and exits with 1. What torch raises for a lost peer
    or a full GPU is no bug: it has codes of its own.
    """
    prefix = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    logging.setLogRecordFactory(_LogRecord)
    try:
        code = body()
    except CadMllmError as error:
        print(f"{prefix}error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"{prefix}interrupted", file=sys.stderr)
        code = _INTERRUPTED
    except Exception as error:
        known = _known_to_torch(error)
        if known is None:
            print(without_credentials(traceback.format_exc()), file=sys.stderr, end="")
            code = _BUG
        else:
            code, line = known
            print(f"{prefix}error: {without_credentials(line)}", file=sys.stderr)
    if "RANK" in os.environ:
        print(f"{prefix}exit code {int(code)}", file=sys.stderr, flush=True)
    if code != ExitCode.DONE and _in_process_group():
        # Tearing down a process group whose other ranks are gone can hang, or abort with another code.
        sys.stdout.flush()
        os._exit(int(code))
    sys.exit(int(code))


class _LogRecord(logging.LogRecord):
    """Whatever library logs it, with whatever handler."""

    def getMessage(self) -> str:  # noqa: N802 (logging's name)
        return without_credentials(super().getMessage())


def _known_to_torch(error: Exception) -> tuple[ExitCode, str] | None:
    """Code and line for a full GPU and for a lost peer; None for everything else.

    NCCL and torch's rendezvous have error types, gloo raises a bare RuntimeError.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    text = str(error).strip()
    of_peers = isinstance(error, torch.distributed.DistError)
    of_gpu = isinstance(error, (torch.OutOfMemoryError, torch.AcceleratorError))
    if (of_peers or of_gpu) and _OUT_OF_MEMORY.search(text):
        return ExitCode.OUT_OF_MEMORY, (
            "the GPU is out of memory: --batch_size 1 with more --gradient_accumulation_steps, "
            "--use_gradient_checkpointing, a smaller --max_seq_length, then ZeRO-3 or ds_zero3_offload.json "
            f"({_first_line(text)})"
        )
    if (of_peers and not _MISUSE_OF_NCCL.search(text)) or (
        type(error) is RuntimeError and _in_process_group() and _LOST_BY_GLOO.search(text)
    ):
        return ExitCode.PEER_LOST, (
            "another rank was lost, or the network to it; look for the first rank that ended. "
            f"A restart with --resume_from_ckpt auto goes on from the last checkpoint ({_first_line(text)})"
        )
    return None


def _in_process_group() -> bool:
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and bool(distributed.is_initialized())


def _first_line(text: str) -> str:
    return text.partition("\n")[0]


def _dispatch(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        show(_overview())
        return ExitCode.DONE if argv else ExitCode.CONFIG
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    command = COMMANDS.get(" ".join(argv[:words]))
    if command is None:
        raise ConfigError(
            f"unknown command {argv[0]!r}: one of {', '.join(COMMANDS)} (see `cad-mllm --help`)"
        )
    return command(argv[words:])


def _overview() -> str:
    lines = [
        "usage: cad-mllm COMMAND [--flags]",
        "",
        "Text, image and point cloud in, parametric CAD out.",
        "",
    ]
    lines += [f"  {name:<12} {command.__doc__}" for name, command in COMMANDS.items()]
    lines += ["", "`cad-mllm COMMAND --help` explains the flags of a command.", "", TRAIN_EXAMPLES]
    return "\n".join(lines)


def _require(flag: str, value: float, low: float, high: float = math.inf) -> None:
    if not low <= value <= high:
        wanted = f"at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise ConfigError(f"{flag} must be {wanted}, got {value}")
