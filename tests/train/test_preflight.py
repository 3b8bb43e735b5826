"""Each check of the machines: quiet on healthy ones, and a verdict with a remedy on broken ones."""

from dataclasses import replace

import pytest

from cad_mllm.errors import PreflightError
from cad_mllm.train import checks, transport
from cad_mllm.train.checks import Check, Verdict
from cad_mllm.train.demand import Demand
from cad_mllm.train.machine import RankFacts
from cad_mllm.train.preflight import CHECKS, Checked
from tests.train.facts import GB, OUTPUT, demand, gpu, rank, ranks

OFFLOAD = demand(offload_optimizer=True, offload_param=True)
FULL = demand(trainable=8_200_000_000)


def pair(**changes: object) -> list[RankFacts]:
    """Two ranks, of which the second differs."""
    return [rank(0), rank(1, **changes)]


def test_healthy_machines_are_let_through_without_a_word() -> None:
    for machines in (ranks(1), ranks(4), ranks(1, gpu=None, driver=None, driver_cuda=None, torch_cuda=None)):
        findings = [check(machines, OFFLOAD) for check in CHECKS]
        checked = Checked(ranks=machines, findings=[f for f in findings if f is not None])
        assert checked.warnings == checked.refusals == []
        checked.require()


@pytest.mark.parametrize(
    ("check", "machines", "wanted", "verdict", "words"),
    [
        (checks.check_world, pair(gpu=gpu(0)), demand(), "REFUSED", ["ranks 0-1 have the same GPU"]),
        (
            checks.check_versions,
            [*ranks(3), rank(3, versions={**rank(0).versions, "torch": "2.13.0"})],
            demand(),
            "REFUSED",
            ["torch is 2.11.0 on ranks 0-2, 2.13.0 on rank 3", "same image"],
        ),
        (
            checks.check_versions,
            pair(versions={**rank(0).versions, "git_revision": "abc"}),
            demand(),
            "REFUSED",
            ["git_revision is missing on rank 0, abc on rank 1"],
        ),
        (
            checks.check_config,
            pair(config={"--seed": 42, "--batch_size": 4}),
            demand(),
            "REFUSED",
            ["--batch_size is 2 on rank 0, 4 on rank 1", "ConfigMap"],
        ),
        (
            checks.check_gpus,
            pair(gpu=gpu(1, model="NVIDIA L40S")),
            demand(),
            "warning",
            ["1 x NVIDIA L40, 1 x NVIDIA L40S", "slowest"],
        ),
        (
            checks.check_gpus,
            pair(gpu=gpu(1, free_bytes=30 * GB)),
            demand(),
            "warning",
            ["30.0 GB (rank 1)", "holds memory on the GPU of rank 1"],
        ),
        (
            checks.check_gpus,
            pair(gpu=gpu(1, free_bytes=8 * GB)),
            demand(),
            "REFUSED",
            ["weights and optimiser state alone take 9.1 GB", "ds_zero3_offload.json"],
        ),
        (
            checks.check_driver,
            pair(driver="535.54", driver_cuda=(12, 2)),
            demand(),
            "REFUSED",
            ["rank 1: driver 535.54 supports CUDA 12.2, torch needs 13.0"],
        ),
        (
            checks.check_driver,
            ranks(1, gpu=None),
            demand(),
            "REFUSED",
            ["torch finds no GPU", "nvidia-smi", "--device cpu"],
        ),
        (
            checks.check_driver,
            ranks(1, gpu=None, torch_cuda=None),
            demand(),
            "warning",
            ["torch is a build for the CPU", "--device cpu"],
        ),
        (
            checks.check_flash_attention,
            pair(flash_attention_fault="undefined symbol: _ZN3c10"),
            demand(flash_attention=True),
            "REFUSED",
            ["cannot be imported on rank 1 (undefined symbol", "sdpa"],
        ),
        (
            checks.check_ops,
            pair(missing_for_ops=("ninja", "the CUDA toolkit (nvcc)")),
            OFFLOAD,
            "REFUSED",
            ["rank 1 cannot compile them without ninja, the CUDA toolkit (nvcc)", "JSON without offload"],
        ),
        (
            checks.check_shared_memory,
            ranks(4, shm_bytes=64 * 2**20),
            demand(loader_bytes=20 * 10**6),
            "REFUSED",
            ["67.1 MB free on node-a; loader processes take up to 80.0 MB", "--shm-size"],
        ),
        (
            checks.check_shared_memory,
            ranks(4, shm_bytes=64 * 2**20),
            demand(loader_bytes=10**6),
            "warning",
            ["NCCL about 0.6 GB"],
        ),
        (
            checks.check_host_memory,
            ranks(4, memory_available_bytes=10 * GB),
            OFFLOAD,
            "REFUSED",
            ["10.0 GB available on node-a; offload takes 19.1 GB"],
        ),
        (
            checks.check_host_memory,
            [*ranks(3), rank(3, host="node-b", memory_available_bytes=6 * GB)],
            OFFLOAD,
            "warning",
            ["6.0 GB available on node-b; offload takes 4.8 GB, pinned up to 7.2 GB"],
        ),
        (
            checks.check_output,
            pair(output=replace(OUTPUT, fault="Read-only file system")),
            demand(),
            "REFUSED",
            ["fails on rank 1 (Read-only file system)", "--output_dir outputs/run"],
        ),
        (
            checks.check_output,
            pair(output=replace(OUTPUT, sees_main=False)),
            demand(),
            "REFUSED",
            ["1 of 2 ranks do not see what rank 0 writes there (rank 1)", "ReadWriteMany"],
        ),
        (
            checks.check_disk,
            ranks(1, output=replace(OUTPUT, free_bytes=GB)),
            demand(),
            "REFUSED",
            ["1.0 GB free; a checkpoint takes about 1.8 GB"],
        ),
        (
            checks.check_disk,
            ranks(1, output=replace(OUTPUT, free_bytes=4 * GB)),
            demand(),
            "warning",
            ["--keep_last_n_checkpoints"],
        ),
        (
            transport.check_transport,
            ranks(4, hosts=4),
            demand(),
            "warning",
            ["NCCL: sockets between 4 hosts", "-1x4", "ds_zero2_config.json"],
        ),
        (
            transport.check_transport,
            ranks(2, nccl={"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"}),
            demand(),
            "warning",
            ["NCCL: sockets on each host"],
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_remedy(
    check: Check, machines: list[RankFacts], wanted: Demand, verdict: Verdict, words: list[str]
) -> None:
    finding = check(machines, wanted)
    assert finding is not None and finding.verdict == verdict
    assert finding.remedy and "\n" not in finding.line
    for word in words:
        assert word in finding.line


@pytest.mark.parametrize(
    ("machines", "found"),
    [
        (ranks(4), "NCCL: P2P on each host"),
        (ranks(4, nccl={"NCCL_P2P_DISABLE": "1"}), "NCCL: shared memory on each host"),
        ([rank(0, gpu=gpu(0, reaches_peers=False)), rank(1)], "NCCL: shared memory on each host"),
        (ranks(4, hosts=2), "NCCL: P2P on each host, sockets between 2 hosts"),
        (ranks(4, hosts=2, rdma=True), "NCCL: P2P on each host, RDMA between 2 hosts"),
        (ranks(4, hosts=4, rdma=True, nccl={"NCCL_IB_DISABLE": "1"}), "NCCL: sockets between 4 hosts"),
        (ranks(2, gpu=None), "gloo over TCP"),
    ],
)
def test_the_way_of_the_tensors_follows_from_hosts_gpus_and_settings(
    machines: list[RankFacts], found: str
) -> None:
    under_zero2 = transport.check_transport(machines, demand(zero_stage=2))
    assert under_zero2 is not None and under_zero2.found == found
    assert under_zero2.verdict == "ok"  # a seventh slower over sockets: nothing to warn of


def test_hosts_and_their_ranks_are_named() -> None:
    assert (
        "4 ranks on 2 hosts (node-a: ranks 0-1, node-b: ranks 2-3)"
        in checks.check_world(ranks(4, hosts=2), demand()).found
    )


def test_a_slow_all_gather_is_a_warning_where_zero3_needs_it() -> None:
    slow = transport.judge_bandwidth(3e9, demand())
    assert slow.verdict == "warning" and "3.0 GB/s" in slow.found and "11.1 s" in slow.found
    assert transport.judge_bandwidth(20e9, demand()).verdict == "ok"
    assert transport.judge_bandwidth(3e9, demand(zero_stage=2)).verdict == "ok"
    assert transport.judge_bandwidth(3e9, demand(keeps_weights=True)).verdict == "ok"


def test_zero3_that_keeps_its_weights_may_use_sockets() -> None:
    machines = ranks(4, hosts=4)
    gathers, keeps = (
        transport.check_transport(machines, demand(keeps_weights=kept)) for kept in (False, True)
    )
    assert gathers is not None and "ds_zero3_resident.json" in gathers.remedy
    assert keeps is not None and (keeps.found, keeps.verdict) == ("NCCL: sockets between 4 hosts", "ok")


def test_a_refusal_names_every_refused_line_and_no_warning() -> None:
    machines = [rank(0), rank(1, config={"--seed": 1}, output=replace(OUTPUT, sees_main=False))]
    findings = [check(machines, demand()) for check in (checks.check_config, checks.check_output)]
    warning = transport.check_transport(ranks(2, hosts=2), demand())
    checked = Checked(ranks=machines, findings=[f for f in (*findings, warning) if f is not None])
    with pytest.raises(PreflightError) as refusal:
        checked.require()
    assert [line.partition(":")[0] for line in str(refusal.value).splitlines()] == [
        "configuration",
        "output folder",
    ]
    assert len(checked.warnings) == 1 and checked.warnings[0].startswith("WARNING: transport: NCCL: sockets")


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (demand(zero_stage=0), 2 * 8.3e9 + 12 * 125e6),
        (demand(zero_stage=2), 2 * 8.3e9 + 12 * 125e6 / 4),
        (demand(zero_stage=3), (2 * 8.3e9 + 12 * 125e6) / 4),
        (demand(keeps_weights=True), 2 * 8.3e9 + (2 * 8.3e9 + 12 * 125e6) / 4),
        (OFFLOAD, 0),
        (demand(zero_stage=0, weight_bytes=4), 4 * 8.3e9 + 8 * 125e6),
    ],
)
def test_the_least_gpu_memory_is_weights_and_state_as_zero_shares_them(
    wanted: Demand, expected: float
) -> None:
    assert wanted.gpu_bytes(4) == expected


def test_offload_takes_what_the_manifests_are_sized_for() -> None:
    """All weights of Qwen3-8B train: 22 bytes of each on the host, a quarter of them in each of four pods."""
    whole = Demand(**{**FULL.__dict__, "parameters": 8_190_000_000, "trainable": 8_190_000_000})
    offloaded = replace(whole, offload_optimizer=True, offload_param=True)
    assert offloaded.offload_bytes(4, 1) == 8_190_000_000 * 22 // 4
    assert offloaded.offload_bytes(4, 4) == 8_190_000_000 * 22
    assert replace(offloaded, offload_param=False).offload_bytes(1, 1) == 8_190_000_000 * 18
