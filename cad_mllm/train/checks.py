"""The checks of `preflight`: each is a function of facts and of what the run asks for."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from cad_mllm.train.demand import Demand
from cad_mllm.train.machine import RankFacts

Verdict = Literal["ok", "warning", "REFUSED"]

_GB = 1e9
_NCCL_SHM_BYTES = 16 * 9_637_888
"""NCCL's segments of a rank: 16 channels of the size that its error message names when there is no room."""
_PINNED = 1.5
"""Offloaded buffers are pinned, and pinned memory is handed out in larger pieces."""
_TAKEN_SHARE = 0.1
"""More of a GPU than this in use before the run starts is another process."""
_MAX_DIFFERENCES = 5


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found."""

    check: str
    found: str
    verdict: Verdict = "ok"
    remedy: str = ""

    @property
    def line(self) -> str:
        """For people, in one line."""
        return f"{self.check}: {self.found}. {self.remedy}".rstrip(" .") + "."


Check = Callable[[Sequence[RankFacts], Demand], Finding | None]
"""None: the check does not concern this run."""


def check_world(ranks: Sequence[RankFacts], demand: Demand) -> Finding:
    """Which ranks are where; NCCL refuses two ranks on one GPU with words that nobody understands."""
    where = ", ".join(
        f"{host}: {name_ranks([facts.rank for facts in here])}" for host, here in by_host(ranks).items()
    )
    hosts = len(by_host(ranks))
    found = f"{_count(len(ranks), 'rank')} on {_count(hosts, 'host')} ({where})"
    owners: dict[str, list[int]] = {}
    for facts in ranks:
        if facts.gpu is not None:
            owners.setdefault(facts.gpu.uuid, []).append(facts.rank)
    shared = [numbers for numbers in owners.values() if len(numbers) > 1]
    if shared:
        return Finding(
            check="world",
            found=f"{found}; {name_ranks(shared[0])} have the same GPU",
            verdict="REFUSED",
            remedy="Start at most as many processes on a machine as it has GPUs, and give each pod its own",
        )
    return Finding(check="world", found=found)


def check_versions(ranks: Sequence[RankFacts], demand: Demand) -> Finding:
    """Python, this project, packages: the same on all ranks."""
    shown = ("python", "torch", "deepspeed", "transformers")
    first = ranks[0].versions
    return _agreement(
        "versions",
        [facts.versions for facts in ranks],
        found=": " + ", ".join(f"{name} {first[name]}" for name in shown if name in first),
        remedy="Start every rank from the same image (by digest, not by a tag that moves) or environment",
    )


def check_config(ranks: Sequence[RankFacts], demand: Demand) -> Finding:
    """Flags, YAML and DeepSpeed JSON, resolved: the same on all ranks."""
    return _agreement(
        "configuration",
        [facts.config for facts in ranks],
        found="",
        remedy="Give every rank the same flags and files; in Kubernetes restart pods that still have the old "
        "ConfigMap",
    )


def check_gpus(ranks: Sequence[RankFacts], demand: Demand) -> Finding | None:
    """Models, free memory, and whether the weights fit at all."""
    gpus = {facts.rank: facts.gpu for facts in ranks if facts.gpu is not None}
    if not gpus:
        return None
    models = Counter(gpu.model for gpu in gpus.values())
    least = min(gpus, key=lambda rank: gpus[rank].free_bytes)
    free, needed = gpus[least].free_bytes, demand.gpu_bytes(len(ranks))
    found = ", ".join(f"{number} x {model}" for model, number in models.items())
    found += f"; least free memory {_gb(free)} (rank {least})"
    if needed > free:
        return Finding(
            check="GPUs",
            found=f"{found}; weights and optimiser state alone take {_gb(needed)} of each",
            verdict="REFUSED",
            remedy="Use ZeRO-3, then ds_zero3_offload.json; LoRA; more GPUs; or end what else runs on them",
        )
    taken = [rank for rank, gpu in gpus.items() if gpu.free_bytes < (1 - _TAKEN_SHARE) * gpu.total_bytes]
    if taken:
        return Finding(
            check="GPUs",
            found=f"{found}; something else holds memory on the GPU of {name_ranks(taken)}",
            verdict="warning",
            remedy="See nvidia-smi, and end what is left of an earlier run",
        )
    if len(models) > 1:
        return Finding(
            check="GPUs",
            found=found,
            verdict="warning",
            remedy="Every step waits for the slowest GPU, and the smallest limits the batch: select nodes "
            "of one model",
        )
    return Finding(check="GPUs", found=found)


def check_driver(ranks: Sequence[RankFacts], demand: Demand) -> Finding:
    """The driver's CUDA against torch's: an older major version does not run, an older minor one does.

    Without this, `--device auto` would train on the CPU beside a GPU that torch cannot use.
    """
    on_purpose = "or ask for the CPU with --device cpu"
    for facts in ranks:
        if demand.may_use_cpu or facts.driver_cuda is None:
            continue
        here = f"rank {facts.rank}: driver {facts.driver or 'of unknown version'} supports CUDA "
        here += _dotted(facts.driver_cuda)
        if facts.torch_cuda is None:
            return Finding(
                check="driver",
                found=f"{here}, but torch is a build for the CPU, which computes now",
                verdict="warning",
                remedy=f"Install torch with CUDA, {on_purpose}",
            )
        if facts.driver_cuda[0] < facts.torch_cuda[0]:
            return Finding(
                check="driver",
                found=f"{here}, torch needs {_dotted(facts.torch_cuda)}",
                verdict="REFUSED",
                remedy="Update the driver, select nodes that have a newer one, install a torch for an older "
                f"CUDA, {on_purpose}",
            )
        if facts.gpu is None:
            return Finding(
                check="driver",
                found=f"{here}, but torch finds no GPU",
                verdict="REFUSED",
                remedy=f"See what nvidia-smi says, and the pod's nvidia.com/gpu, {on_purpose}",
            )
    first = ranks[0]
    if first.driver_cuda is None or first.torch_cuda is None or first.gpu is None:
        return Finding(check="driver", found="not needed: the CPU computes")
    drivers = ", ".join(sorted({facts.driver or "of unknown version" for facts in ranks}))
    return Finding(
        check="driver",
        found=f"{drivers} (CUDA {_dotted(first.driver_cuda)}), torch for CUDA {_dotted(first.torch_cuda)}",
    )


def check_flash_attention(ranks: Sequence[RankFacts], demand: Demand) -> Finding | None:
    """Present, and built for this torch; whether a GPU is there to use it is the model builder's question."""
    if not demand.flash_attention:
        return None
    broken = [facts for facts in ranks if facts.flash_attention_fault is not None]
    if broken:
        return Finding(
            check="flash-attn",
            found=f"cannot be imported on {name_ranks([facts.rank for facts in broken])} "
            f"({broken[0].flash_attention_fault})",
            verdict="REFUSED",
            remedy="Use --attn_implementation sdpa, or install flash-attn built for this torch "
            "(pip install .[gpu])",
        )
    return Finding(check="flash-attn", found=ranks[0].versions.get("flash-attn", "present"))


def check_ops(ranks: Sequence[RankFacts], demand: Demand) -> Finding | None:
    """DeepSpeed's compiled ops: built ahead, or a compiler for their first use."""
    if not demand.zero_stage:
        return None
    lacking = [facts for facts in ranks if facts.missing_for_ops]
    if lacking:
        return Finding(
            check="DeepSpeed ops",
            found=f"not built, and {name_ranks([facts.rank for facts in lacking])} cannot compile them "
            f"without {', '.join(lacking[0].missing_for_ops)}",
            verdict="REFUSED",
            remedy="Install that, or DeepSpeed with its ops (DS_BUILD_CPU_ADAM=1, as docker/Dockerfile "
            "does), or use a DeepSpeed JSON without offload",
        )
    return Finding(check="DeepSpeed ops", found="built, or can be compiled at first use")


def check_shared_memory(ranks: Sequence[RankFacts], demand: Demand) -> Finding:
    """/dev/shm: without room there, loader processes die of SIGBUS and NCCL stops."""
    remedy = (
        "Make it larger (docker run --shm-size; in Kubernetes an emptyDir with medium: Memory and a "
        "sizeLimit), or use fewer --num_workers"
    )
    findings = []
    for host, here in by_host(ranks).items():
        free = min(facts.shm_bytes for facts in here)
        loaders = demand.loader_bytes * len(here)
        nccl = _NCCL_SHM_BYTES * len(here) if len(here) > 1 and here[0].gpu is not None else 0
        found = f"{_gb(free)} free on {host}; loader processes take up to {_gb(loaders)}"
        found += f", NCCL about {_gb(nccl)}" if nccl else ""
        findings.append(_room("/dev/shm", found, remedy, free=free, least=loaders, better=loaders + nccl))
    return _worst(findings)


def check_host_memory(ranks: Sequence[RankFacts], demand: Demand) -> Finding | None:
    """Offload: what moves to the host must fit there (`Demand.offload_bytes` has the formula)."""
    if not (demand.offload_optimizer or demand.offload_param):
        return None
    remedy = "Use LoRA, more machines, a pod with a larger memory limit, or a DeepSpeed JSON without offload"
    findings = []
    for host, here in by_host(ranks).items():
        free = min(facts.memory_available_bytes for facts in here)
        least = demand.offload_bytes(len(ranks), len(here))
        better = int(least * _PINNED)
        found = f"{_gb(free)} available on {host}; offload takes {_gb(least)}, pinned up to {_gb(better)}"
        findings.append(_room("host memory", found, remedy, free=free, least=least, better=better))
    return _worst(findings)


def check_output(ranks: Sequence[RankFacts], demand: Demand) -> Finding:
    """Every rank writes its part of a checkpoint and reads the index that rank 0 made: one folder for all."""
    faults = [facts for facts in ranks if facts.output.fault is not None]
    where = f"--output_dir {demand.output_dir}"
    if faults:
        return Finding(
            check="output folder",
            found=f"{where}: writing, syncing or renaming a file fails on "
            f"{name_ranks([facts.rank for facts in faults])} ({faults[0].output.fault})",
            verdict="REFUSED",
            remedy="Name a folder on a writable volume with space left",
        )
    blind = [facts.rank for facts in ranks if not facts.output.sees_main]
    if blind:
        return Finding(
            check="output folder",
            found=f"{where}: {len(blind)} of {len(ranks)} ranks do not see what rank 0 writes there "
            f"({name_ranks(blind)})",
            verdict="REFUSED",
            remedy="Put it on a volume that all machines share (in Kubernetes: access mode ReadWriteMany)",
        )
    return Finding(check="output folder", found=f"{where}: write, sync and rename work; all ranks share it")


def check_disk(ranks: Sequence[RankFacts], demand: Demand) -> Finding:
    """One checkpoint must fit; those that are kept, and the one being written, should."""
    free, one = ranks[0].output.free_bytes, demand.checkpoint_bytes
    return _room(
        "disk",
        f"{_gb(free)} free; a checkpoint takes about {_gb(one)}, and {demand.checkpoints_kept} are kept",
        "Remove old runs, enlarge the volume, name another --output_dir, or keep fewer "
        "(--keep_last_n_checkpoints)",
        free=free,
        least=one,
        better=one * (demand.checkpoints_kept + 1),
    )


def _agreement(check: str, told: Sequence[Mapping[str, object]], *, found: str, remedy: str) -> Finding:
    """Refused where the ranks say different things; `found` is added where they do not."""
    differences = _differences(told)
    if differences:
        return Finding(check=check, found=differences, verdict="REFUSED", remedy=remedy)
    return Finding(check=check, found=f"the same on all ranks{found}")


def _differences(told: Sequence[Mapping[str, object]]) -> str:
    """`--seed is 1 on rank 0, 2 on ranks 1-3; ...`; empty if all say the same."""
    names = list(dict.fromkeys(name for one in told for name in one))
    lines = []
    for name in names:
        values: dict[str, list[int]] = {}
        for rank, one in enumerate(told):
            values.setdefault(str(one[name]) if name in one else "missing", []).append(rank)
        if len(values) > 1:
            lines.append(f"{name} is " + ", ".join(f"{v} on {name_ranks(r)}" for v, r in values.items()))
    more = f"; and {len(lines) - _MAX_DIFFERENCES} more" if len(lines) > _MAX_DIFFERENCES else ""
    return "; ".join(lines[:_MAX_DIFFERENCES]) + more


def by_host(ranks: Sequence[RankFacts]) -> dict[str, list[RankFacts]]:
    """The ranks of each host name."""
    hosts: dict[str, list[RankFacts]] = {}
    for facts in ranks:
        hosts.setdefault(facts.host, []).append(facts)
    return hosts


def _room(check: str, found: str, remedy: str, *, free: int, least: int, better: int) -> Finding:
    """Refused below `least`, a warning below `better`."""
    if free >= better:
        return Finding(check=check, found=found)
    return Finding(check=check, found=found, verdict="REFUSED" if free < least else "warning", remedy=remedy)


def _worst(findings: Sequence[Finding]) -> Finding:
    return max(findings, key=lambda finding: ("ok", "warning", "REFUSED").index(finding.verdict))


def name_ranks(numbers: Sequence[int]) -> str:
    """For people: `rank 0`, `ranks 0-2, 5`."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)
    return f"{'rank' if len(numbers) == 1 else 'ranks'} {text}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _gb(number: float) -> str:
    return f"{number / _GB:.1f} GB" if number >= _GB / 10 else f"{number / 1e6:.1f} MB"


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
