"""Generate programs, and score them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cad_mllm.errors import ConfigError, ExitCode
from cad_mllm.settings import parse_flags, require

_CANDIDATE_TEMPERATURE = 0.8


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
        require(f"--{flag}", getattr(arguments, flag), value)
    require("--temperature", arguments.temperature or 0.0, 0)
    require("--noise", arguments.noise, 0)
    require("--dropped", arguments.dropped, 0, 0.99)
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
    require("--workers", arguments.workers, 0)
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
