"""`cad-mllm doctor`: everything that can be known of the machines before a run, as a table and as JSON."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cad_mllm.config import TrainConfig
from cad_mllm.data.atomic import make_writable, write_json
from cad_mllm.data.sequence import needed_modalities
from cad_mllm.errors import GPU_MEMORY_REMEDY, ConfigError, ExitCode, PreflightError
from cad_mllm.model.build import check_attention
from cad_mllm.train.assemble import build_engine, build_networks, resolve_zero, sequence_spec
from cad_mllm.train.checks import Finding, Verdict
from cad_mllm.train.demand import demand_of
from cad_mllm.train.distributed import World, world
from cad_mllm.train.machine import RankFacts
from cad_mllm.train.preflight import Checked, check_machines
from cad_mllm.train.rehearsal import PROJECTORS, rehearse_largest
from cad_mllm.train.stages import plan
from cad_mllm.train.transport import judge_bandwidth, measure_all_gather
from cad_mllm.train.zero import ZeroConfig

_SHORTEST_PROMPT = 16
"""Tokens; the instruction alone takes about as many."""
_LOG_WIDTH = 160
_STYLES: dict[Verdict, str] = {"ok": "green", "warning": "yellow", "REFUSED": "bold red"}


def examine(config: TrainConfig, json_file: Path | None) -> ExitCode:
    """Check the machines for the run that `config` describes, on all ranks that the environment names.

    On CUDA the all-gather is measured and the largest batch is computed too, with an engine that is thrown
    away; on a CPU neither tells anything. The output folder is left as it was.

    Returns DONE, or PREFLIGHT if something is refused.

    Raises:
        ConfigError: the configuration itself cannot be honoured.
        PreflightError: the largest batch does not fit a GPU.
    """
    report = _Report(json_file)
    with world(config.run) as ranks:
        zero = resolve_zero(config, ranks)
        checked = _check(config, zero, ranks)
        if ranks.is_main:
            report.add(checked.findings, checked.ranks)
        if not checked.refusals:
            check_attention(config.model, ranks.device, packed=config.optim.pack_tokens > 0)
            if ranks.device.type == "cuda":
                measured = _measure(config, zero, ranks)
                if ranks.is_main:
                    report.add(measured, checked.ranks)
        if ranks.is_main:
            report.conclude()
    return ExitCode.PREFLIGHT if checked.refusals else ExitCode.DONE


def _check(config: TrainConfig, zero: ZeroConfig | None, world: World) -> Checked:
    """The checks of every run; an output folder made for them is removed again."""
    output_dir = config.run.output_dir
    is_new = world.from_main(lambda: not output_dir.exists())
    make_writable(output_dir, "--output_dir")
    checked = check_machines(config, zero, world)
    if is_new and world.is_main:
        with suppress(OSError):  # it is not empty: somebody uses it by now
            output_dir.rmdir()
    return checked


def _measure(config: TrainConfig, zero: ZeroConfig | None, world: World) -> list[Finding]:
    """What only a GPU can tell. Leaves networks and engine behind: for the end of the process."""
    findings = []
    if world.size > 1:
        findings.append(judge_bandwidth(measure_all_gather(world), demand_of(config, zero, world)))
    built = build_networks(config, zero, world)
    spec = sequence_spec(config, built)
    modalities = needed_modalities(stage.mix for stage in plan(config.curriculum))
    text_tokens = spec.max_seq_length - spec.modality_tokens(modalities)
    if text_tokens <= _SHORTEST_PROMPT:
        raise ConfigError(
            f"--max_seq_length {spec.max_seq_length} leaves no room for text beside "
            f"{spec.modality_tokens(modalities)} tokens of {' and '.join(sorted(modalities))}."
        )
    with tempfile.TemporaryDirectory() as log_dir:
        engine = build_engine(config, built, zero, world, log_dir=Path(log_dir))
        optim = config.optim
        size = optim.pack_tokens or f"{optim.batch_size} x {spec.max_seq_length}"
        batch = f"{size} tokens with {', '.join(sorted(modalities))}"
        try:
            peak = rehearse_largest(
                engine,
                built.encoders,
                spec,
                config.optim,
                world.device,
                modalities=modalities,
                trainable=PROJECTORS,
                prompt_tokens=_SHORTEST_PROMPT,
                text_tokens=text_tokens,
            )
        except torch.OutOfMemoryError as error:
            # The other ranks may be waiting in a collective: this one ends alone, and its launcher ends them.
            raise PreflightError(
                f"largest batch: {batch} do not fit the GPU of rank {world.rank}: {GPU_MEMORY_REMEDY} "
                f"({str(error).splitlines()[0]})"
            ) from error
    peaks = world.gather(peak)
    total = torch.cuda.get_device_properties(world.device).total_memory
    most = max(range(len(peaks)), key=lambda rank: peaks[rank])
    found = f"{batch}: at most {peaks[most] / 1e9:.1f} of {total / 1e9:.1f} GB (rank {most})"
    return [*findings, Finding(check="largest batch", found=found)]


class _Report:
    """Tables on the console, and the file for machines after each of them. Rank 0 only."""

    def __init__(self, json_file: Path | None) -> None:
        self._file = json_file
        console = Console()
        # In a log nobody can make the window wider.
        self._console = console if console.is_terminal else Console(width=_LOG_WIDTH)
        self._findings: list[Finding] = []

    def add(self, findings: Sequence[Finding], ranks: Sequence[RankFacts]) -> None:
        """ConfigError: the file cannot be written."""
        self._findings += findings
        if not findings:
            return
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in ("check", "found", "verdict", "remedy"):
            table.add_column(name, overflow="fold")
        for finding in findings:
            style = _STYLES[finding.verdict]
            table.add_row(
                finding.check, Text(finding.found), Text(finding.verdict, style=style), Text(finding.remedy)
            )
        self._console.print(table)
        if self._file is not None:
            content = {
                "findings": [asdict(finding) for finding in self._findings],
                "ranks": [asdict(facts) for facts in ranks],
            }
            try:
                write_json(self._file, content)
            except OSError as error:
                raise ConfigError(f"--json {self._file}: cannot be written ({error.strerror})") from error

    def conclude(self) -> None:
        """The result in one line."""
        numbers = Counter(finding.verdict for finding in self._findings)
        self._console.print(
            "doctor: " + ", ".join(f"{numbers[verdict]} {verdict}" for verdict in _STYLES), highlight=False
        )
