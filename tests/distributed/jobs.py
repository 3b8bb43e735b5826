"""What the ranks of a test do."""

import copy
import hashlib
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import modeling_utils

from cad_mllm.bench.peers import PEERS, train_config
from cad_mllm.bench.workloads import WORKLOADS, tiny
from cad_mllm.config import RunConfig
from cad_mllm.errors import CadMllmError
from cad_mllm.model import build, presets
from cad_mllm.model import loss as unsharded
from cad_mllm.model.loss import IGNORED_LABEL, LinearCrossEntropy
from cad_mllm.settings import parse_train_args
from cad_mllm.train import engine, gathering, trainer
from cad_mllm.train.assemble import build_networks, resolve_zero
from cad_mllm.train.distributed import world
from cad_mllm.train.doctor import examine
from cad_mllm.train.peer_memory import map_peer_memory
from cad_mllm.train.run import prepare_run
from cad_mllm.train.spread_head import spread_head
from cad_mllm.train.stop import StopSignal
from cad_mllm.train.trainer import fit
from cad_mllm.train.watchdog import Watchdog


def train_all(runs: list[list[str]]) -> list[int]:
    """Train each run (a list of flags) in the same process group; the exit codes."""
    torch.set_num_threads(1)
    configs = [parse_train_args(flags) for flags in runs]
    codes = []
    with world(configs[0].run) as ranks:
        for config in configs:
            run = prepare_run(config, ranks)
            with StopSignal() as stop, Watchdog(600, config.run.output_dir, ranks.rank) as watchdog:
                codes.append(int(fit(run, stop, watchdog)))
            run.tracker.close()
    return codes


def train_with_nan(job: dict[str, Any]) -> list[int]:
    """`train_all`, but on rank `rank` the loss of the given global steps (counted from 0) is NaN.

    The answer is an exit code for each run, also of those that end with an error.
    """
    torch.set_num_threads(1)
    forward, step_of = trainer._forward, trainer._train_step
    current = 0

    def train_step(run: Any, stage: Any, step: Any, total: int, global_step: int, stop: Any) -> Any:
        nonlocal current
        current = global_step
        return step_of(run, stage, step, total, global_step, stop)

    def poisoned(run: Any, batch: Any, trainable: Any) -> Any:
        loss = forward(run, batch, trainable)
        is_hit = run.world.rank == job["rank"] and current in job["steps"] and torch.is_grad_enabled()
        return loss * torch.nan if is_hit else loss

    trainer._forward, trainer._train_step = poisoned, train_step
    configs = [parse_train_args(flags) for flags in job["runs"]]
    codes = []
    with world(configs[0].run) as ranks:
        for config in configs:
            run = prepare_run(config, ranks)
            try:
                with StopSignal() as stop, Watchdog(600, config.run.output_dir, ranks.rank) as watchdog:
                    codes.append(int(fit(run, stop, watchdog)))
            except CadMllmError as error:
                codes.append(int(error.exit_code))
            run.tracker.close()
    return codes


def train_and_fall_asleep(job: dict[str, Any]) -> None:
    """`train_all` of one run, but rank 1 sleeps in its fourth step."""
    torch.set_num_threads(1)
    forward = trainer._forward

    def sleepy(run: Any, batch: Any, trainable: Any) -> Any:
        if run.world.rank == 1 and (run.config.run.output_dir / "metrics.jsonl").read_text().count("\n") >= 3:
            falls_asleep()
        return forward(run, batch, trainable)

    trainer._forward = sleepy
    trainer.train(parse_train_args(job["flags"]))


def falls_asleep() -> None:
    time.sleep(600)


def train_and_stop_in_validation(job: dict[str, Any]) -> tuple[int, int]:
    """`train_all` of one run; rank 1 gets SIGTERM in its first validation. Exit code, validation batches."""
    torch.set_num_threads(1)
    forward = trainer._forward
    validated = 0

    def stopped(run: Any, batch: Any, trainable: Any) -> Any:
        nonlocal validated
        if not torch.is_grad_enabled():
            validated += 1
            if run.world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(run, batch, trainable)

    trainer._forward = stopped
    return int(trainer.train(parse_train_args(job["flags"]))), validated


def train_with_torn_files(job: dict[str, Any]) -> list[int]:
    """`train_all` of one run; after the set-up, rank 0 damages files."""
    torch.set_num_threads(1)
    config = parse_train_args(job["flags"])
    with world(config.run) as ranks:
        run = prepare_run(config, ranks)
        if ranks.is_main:
            for file in job["torn"]:
                Path(file).write_bytes(b"torn")
        ranks.barrier()
        with StopSignal() as stop, Watchdog(600, config.run.output_dir, ranks.rank) as watchdog:
            code = fit(run, stop, watchdog)
        run.tracker.close()
    return [int(code)]


def refused_in_own_folders(flags: list[str]) -> str:
    """Start a run whose output folder is another one on each rank; what it is refused with."""
    config = parse_train_args(flags)
    own = Path(f"{config.run.output_dir}-{os.environ['RANK']}")
    config = replace(config, run=replace(config.run, output_dir=own))
    try:
        with world(config.run) as ranks:
            prepare_run(config, ranks)
    except CadMllmError as error:
        return f"{int(error.exit_code)} {error}"
    return ""


def train_with_and_without_rehearsal(pairs: list[list[list[str]]]) -> list[int]:
    """Pairs of runs in one process group; the second of each computes the largest batch first."""
    torch.set_num_threads(1)
    configs = [[parse_train_args(flags) for flags in pair] for pair in pairs]
    codes = []
    with world(configs[0][0].run) as ranks:
        for straight, rehearsed in configs:
            for config in (straight, rehearsed):
                run = prepare_run(config, ranks)
                if config is rehearsed:
                    trainer.rehearse(run)
                with StopSignal() as stop, Watchdog(600, config.run.output_dir, ranks.rank) as watchdog:
                    codes.append(int(fit(run, stop, watchdog)))
                run.tracker.close()
    return codes


def report_examined(job: dict[str, Any]) -> int:
    """`cad-mllm doctor` on every rank; the last one has another seed if `job` says so.

    The ranks' parent was started by an earlier test: a test's own environment reaches them through `job`.
    """
    os.environ.update(job.get("environment", {}))
    flags = list(job["flags"])
    if job["other_seed"] and os.environ["RANK"] != "0":
        flags += ["--seed", "43"]
    return int(examine(parse_train_args(flags), Path(job["json"])))


def all_gathers_of_steps(flags: list[str]) -> list[list[int]]:
    """`train_all` of one run under ZeRO-3; for each step its all-gathers, and the elements that they gave."""
    from deepspeed.comm import comm

    torch.set_num_threads(1)
    config, step_of = parse_train_args(flags), trainer._train_step
    counts: list[list[int]] = []

    def train_step(*given: Any) -> Any:
        counts.append([0, 0])
        return step_of(*given)

    receive = gathering.receive

    def counted_together(parameters: Any) -> Any:
        counts[-1][0] += 1
        counts[-1][1] += sum(p.ds_numel for p in parameters)
        return receive(parameters)

    engine.receive = gathering.receive = counted_together  # type: ignore[attr-defined]
    with world(config.run) as ranks:
        run = prepare_run(config, ranks)
        gather = comm.cdb.all_gather_into_tensor

        def counted(*, output_tensor: Any, **more: Any) -> Any:
            counts[-1][0] += 1
            counts[-1][1] += output_tensor.numel()
            return gather(output_tensor=output_tensor, **more)

        comm.cdb.all_gather_into_tensor, trainer._train_step = counted, train_step
        with StopSignal() as stop, Watchdog(600, config.run.output_dir, ranks.rank) as watchdog:
            fit(run, stop, watchdog)
        run.tracker.close()
    return counts


def kept_whole(job: dict[str, Any]) -> list[Any]:
    """A run under ZeRO-3 starts that keeps what it gathers, so many bytes at a time.

    The answer: the most bytes that one call gave, those of the largest parameter, and whether every parameter
    is what the ranks' shards are.
    """
    from deepspeed import comm

    torch.set_num_threads(1)
    gathering._PORTION_BYTES = job["portion"]
    config, gather, given = parse_train_args(job["flags"]), comm.all_gather_into_tensor, []

    def seen(output: Any, *rest: Any, **more: Any) -> Any:
        given.append(output.numel() * output.element_size())
        return gather(output, *rest, **more)

    comm.all_gather_into_tensor = seen
    with world(config.run) as ranks:
        run = prepare_run(config, ranks)
        run.tracker.close()
        comm.all_gather_into_tensor = gather
        whole, largest = True, 0
        for p in run.engine.module.parameters():
            parts = [torch.empty_like(p.ds_tensor) for _ in range(ranks.size)]
            torch.distributed.all_gather(parts, p.ds_tensor.detach().contiguous())
            whole &= torch.equal(torch.cat(parts)[: p.ds_numel].view(p.ds_shape), p.data)
            largest = max(largest, p.ds_numel * p.element_size())
    return [max(given), largest, whole]


def fetched_backward(flags: list[str]) -> list[str]:
    """`train_all` of one run under ZeRO-3; the kinds of modules whose weights a backward pass asks for."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    torch.set_num_threads(1)
    config, fetch = parse_train_args(flags), PartitionedParameterCoordinator.fetch_sub_module
    kinds: set[str] = set()

    def seen(self: Any, module: Any, forward: bool) -> None:
        if not forward:
            kinds.add(type(module).__name__)
        fetch(self, module, forward)

    PartitionedParameterCoordinator.fetch_sub_module = seen
    with world(config.run) as ranks:
        run = prepare_run(config, ranks)
        with StopSignal() as stop, Watchdog(600, config.run.output_dir, ranks.rank) as watchdog:
            fit(run, stop, watchdog)
        run.tracker.close()
    return sorted(kinds)


def gathered_in_another_order(flags: list[str]) -> list[str]:
    """`train_all` of one run under ZeRO-3; by what parameters that are kept were gathered with others.

    Rank 0 asks for the kept ones last and rank 1 first: DeepSpeed asks for sets, whose order is up to chance.
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    torch.set_num_threads(1)
    private = "_PartitionedParameterCoordinator__"
    config = parse_train_args(flags)
    gather = getattr(PartitionedParameterCoordinator, f"{private}all_gather_params_")
    by: list[str] = []
    with world(config.run) as ranks:

        def ordered(self: Any, params: Any, forward: bool, quantize: bool = False) -> None:
            missing = [p for p in params if p.ds_status is type(p.ds_status).NOT_AVAILABLE]
            missing.sort(key=lambda p: p.ds_persist == (ranks.rank == 0))
            gather(self, missing, forward, quantize)
            if len({p.ds_persist for p in missing}) == 2:
                by.append(type(getattr(self, f"{private}inflight_param_registry")[missing[0]]).__name__)

        setattr(PartitionedParameterCoordinator, f"{private}all_gather_params_", ordered)
        run = prepare_run(config, ranks)
        with StopSignal() as stop, Watchdog(600, config.run.output_dir, ranks.rank) as watchdog:
            fit(run, stop, watchdog)
        run.tracker.close()
    return by


def train_with_tied_head(runs: list[list[str]]) -> list[int]:
    """`train_all`, but the LM has its embeddings for a head, as the smaller ones of Qwen3 do."""
    untied = presets.lm_config

    def tied(name: str) -> Any:
        config = untied(name)
        config.tie_word_embeddings = True
        return config

    presets.lm_config = tied
    return train_all(runs)


def spread_cross_entropy(seed: int) -> dict[str, list[float]]:
    """Loss and gradient of this rank's positions, by the ranks together and by this one alone."""
    positions, hidden, vocabulary = (7, 30), 12, 40
    generator = torch.Generator().manual_seed(seed)
    whole = LinearCrossEntropy(torch.nn.Linear(hidden, vocabulary, bias=False).double())
    whole.weight.data = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    whole.weight.requires_grad_(False)
    given = [
        (
            torch.randn(n, hidden, generator=generator, dtype=torch.float64),
            torch.randint(0, vocabulary, (n,), generator=generator),
        )
        for n in positions
    ]
    unsharded.LOGITS_AT_ONCE = 5 * vocabulary  # several rounds; the last ones of one rank alone
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    x, targets = given[rank]
    targets = torch.where(torch.arange(len(targets)) % 3 == 0, IGNORED_LABEL, targets)
    spread = copy.deepcopy(whole)
    weight: Any = spread.weight
    weight.ds_tensor, weight.ds_shape = weight.data.chunk(2)[rank].flatten(), weight.shape
    weight.ds_process_group, weight.ds_secondary_tensor = torch.distributed.group.WORLD, None
    weight.ds_numel, weight.ds_tensor.ds_numel = weight.data.numel(), weight.ds_tensor.numel()
    weight.ds_persist, weight.data = False, torch.empty(0, dtype=torch.float64)
    spread_head(spread, torch.distributed.group.WORLD)  # type: ignore[arg-type]
    found = {}
    for name, module in (("spread", spread), ("whole", whole)):
        mine = x.clone().requires_grad_()
        loss = module(mine, targets)
        (3 * loss).backward()
        with torch.no_grad():
            alone = module(mine, targets)
        assert mine.grad is not None
        found[name] = [float(loss), float(alone), *mine.grad.flatten().tolist()]
    torch.distributed.destroy_process_group()
    return found


def read_from_peers(seed: int) -> dict[str, bool]:
    """On GPUs: whether what a rank reads of the others is what was shared out, while the GPU is busy."""
    config = RunConfig(output_dir=Path(), device="cuda", deepspeed=True)
    with world(config) as ranks:
        device, group = ranks.device, torch.distributed.group.WORLD
        generator = torch.Generator().manual_seed(seed)
        shapes = [(64, 1024), (512, 256), (40, 16)]
        whole = [torch.randn(shape, generator=generator).bfloat16().to(device) for shape in shapes]
        shared: list[Any] = [torch.nn.Parameter(torch.empty(0), requires_grad=False) for _ in shapes]
        for p, w in zip(shared, whole, strict=True):
            p.ds_tensor = w.flatten().chunk(ranks.size)[ranks.rank].clone()
            p.ds_shape, p.ds_process_group = w.shape, group
        *weights, table = shared
        os.environ["NCCL_P2P_DISABLE"] = "1"
        forbidden = map_peer_memory([weights, [table]], ranks) is None
        del os.environ["NCCL_P2P_DISABLE"]
        memory = map_peer_memory([weights, [table]], ranks)
        if memory is None:
            return {"mapped": False}
        work, same = torch.randn(4096, 4096, device=device), []
        for _ in range(20):
            receipt, read = memory.receive(weights)
            work = work @ work / 64
            receipt.wait()
            same.append(torch.stack([(r == w).all() for r, w in zip(read, whole, strict=False)]).all())
            del read
        numbers = torch.tensor([[0, 39, 20], [19, 1, 21]], device=device)
        rows = bool((memory.look_up(table, numbers) == whole[-1][numbers]).all())
        ranks.barrier()
        return {"mapped": True, "weights": all(map(bool, same)), "rows": rows, "forbidden": forbidden}


def digest_of_random_weights(job: dict[str, str]) -> str:
    """Of all that a peer of the bench begins with, at the shape of the tiny LM, in bf16."""
    presets._QWEN3_8B_SIZES = presets._TINY_SIZES
    modeling_utils.prevent_arange_dtype_change = nullcontext  # as with transformers 5.17
    config = train_config(
        PEERS[job["peer"]], tiny(WORKLOADS["C"]), presets.QWEN3_8B_RANDOM,
        folder=Path(job["folder"]), micro_batches=1, device="cpu",
    )  # fmt: skip
    config = replace(config, model=replace(config.model, dtype="bfloat16"))
    sha = hashlib.sha256()
    with world(replace(config.run, deepspeed=True)) as ranks:
        model = build_networks(config, resolve_zero(config, ranks), ranks, fused=True).model
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            with build._whole(tensor):
                sha.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
                sha.update(tensor.detach().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
