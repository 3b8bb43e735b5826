"""`cad-mllm doctor` on two ranks: one answer, on every rank."""

import json
from pathlib import Path

import pytest
import torch

from tests.distributed.ranks import run_ranks
from tests.distributed.runs import flags

JOBS = Path(__file__).with_name("jobs.py")

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize(
    "other_seed",
    [pytest.param(False, marks=pytest.mark.slow), True],  # every training on two ranks is let through as well
    ids=["healthy", "other configuration"],
)
def test_two_ranks_come_to_one_verdict(other_seed: bool, data: Path, tmp_path: Path) -> None:
    report, output_dir = tmp_path / "doctor.json", tmp_path / "out"
    job = {
        "flags": flags(data, output_dir, ranks=2, zero="zero3_offload"),
        "other_seed": other_seed,
        "json": str(report),
    }
    assert run_ranks(JOBS, "report_examined", job, world_size=2) == [5 if other_seed else 0] * 2
    told = json.loads(report.read_text())
    findings = {finding["check"]: finding for finding in told["findings"]}
    assert [facts["rank"] for facts in told["ranks"]] == [0, 1]
    assert findings["world"]["found"].startswith("2 ranks on 1 host (")
    assert findings["transport"]["found"] == "gloo over TCP"
    assert findings["host memory"]["verdict"] == findings["DeepSpeed ops"]["verdict"] == "ok"
    if other_seed:
        assert findings["configuration"]["verdict"] == "REFUSED"
        assert findings["configuration"]["found"] == "--seed is 7 on rank 0, 43 on rank 1"
    assert not output_dir.exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("over_sockets", [False, True], ids=["as it is", "over sockets"])
def test_on_two_gpus_the_transport_is_measured_and_the_largest_batch_computed(
    over_sockets: bool, data: Path, tmp_path: Path
) -> None:
    variables = ("NCCL_P2P_DISABLE", "NCCL_SHM_DISABLE", "NCCL_IB_DISABLE") if over_sockets else ()
    words = flags(data, tmp_path / "out", ranks=2, zero="zero3_config", device="cuda", dtype="bfloat16")
    job = {
        "flags": words,
        "other_seed": False,
        "json": str(tmp_path / "doctor.json"),
        "environment": dict.fromkeys(variables, "1"),
    }
    assert run_ranks(JOBS, "report_examined", job, world_size=2, accelerator="cuda") == [0, 0]
    told = json.loads((tmp_path / "doctor.json").read_text())
    findings = {finding["check"]: finding for finding in told["findings"]}
    assert len({facts["gpu"]["uuid"] for facts in told["ranks"]}) == 2
    assert findings["transport"]["verdict"] == ("warning" if over_sockets else "ok")
    assert ("sockets" in findings["transport"]["found"]) == over_sockets
    assert "GB/s into each rank" in findings["all-gather"]["found"]
    assert findings["largest batch"]["verdict"] == "ok"
