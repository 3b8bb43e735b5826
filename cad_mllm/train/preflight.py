"""What must be true of the machines before a run spends GPU time.

The launcher in a container checks what concerns it before it starts the ranks (`launch/preflight.py`);
this is what only the ranks together, or only torch and the model's sizes, can tell.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cad_mllm.config import TrainConfig
from cad_mllm.errors import PreflightError
from cad_mllm.settings import to_flat
from cad_mllm.train import checks
from cad_mllm.train.checks import Check, Finding
from cad_mllm.train.demand import demand_of
from cad_mllm.train.distributed import World
from cad_mllm.train.machine import RankFacts, gather_facts
from cad_mllm.train.transport import check_transport
from cad_mllm.train.zero import ZeroConfig, needed_ops

CHECKS: tuple[Check, ...] = (
    checks.check_world,
    checks.check_versions,
    checks.check_config,
    checks.check_gpus,
    checks.check_driver,
    checks.check_flash_attention,
    checks.check_ops,
    checks.check_shared_memory,
    checks.check_host_memory,
    checks.check_output,
    checks.check_disk,
    check_transport,
)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The machines of a run, and what was found."""

    ranks: Sequence[RankFacts]
    findings: Sequence[Finding]

    @property
    def warnings(self) -> list[str]:
        """One line each."""
        return [f"WARNING: {finding.line}" for finding in self.findings if finding.verdict == "warning"]

    @property
    def refusals(self) -> list[str]:
        """One line each."""
        return [finding.line for finding in self.findings if finding.verdict == "REFUSED"]

    def require(self) -> None:
        """Go on only if nothing is refused.

        Raises:
            PreflightError: with every refused line in it.
        """
        if self.refusals:
            raise PreflightError("\n".join(self.refusals))


def check_machines(config: TrainConfig, zero: ZeroConfig | None, world: World) -> Checked:
    """All checks, with the same result on every rank; takes about a second. The output folder exists."""
    demand = demand_of(config, zero, world)
    ranks = gather_facts(
        world,
        config=_told(config, zero),
        output_dir=config.run.output_dir,
        flash_attention=demand.flash_attention,
        deepspeed_ops=needed_ops(zero, world.device.type) if zero is not None else (),
    )
    findings = [finding for check in CHECKS if (finding := check(ranks, demand)) is not None]
    return Checked(ranks=ranks, findings=findings)


def _told(config: TrainConfig, zero: ZeroConfig | None) -> dict[str, object]:
    """Flags and resolved DeepSpeed JSON; without what a launcher gives each rank for itself."""
    flags = {f"--{name}": value for name, value in to_flat(config).items() if name != "local_rank"}
    return {**flags, **dict(_flattened(zero.config, "DeepSpeed JSON: ") if zero is not None else ())}


def _flattened(section: Mapping[str, object], prefix: str) -> Iterable[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from _flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
