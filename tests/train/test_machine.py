"""Facts of this machine, and of machines in files."""

import json
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cad_mllm.model.build import build_model
from cad_mllm.model.multimodal import parameter_groups
from cad_mllm.model.presets import QWEN3_8B_RANDOM, TINY
from cad_mllm.model.sizes import parameter_counts
from cad_mllm.train.distributed import World
from cad_mllm.train.machine import RankFacts, gather_facts, host_memory, smallest_gpu
from cad_mllm.train.provenance import provenance
from cad_mllm.train.zero import missing_for_ops
from tests.model.conftest import CPU, tiny_config
from tests.train.facts import ranks

ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"), control=None)


def facts_with(output_dir: Path) -> RankFacts:
    (facts,) = gather_facts(
        ALONE, config={"--seed": 1}, output_dir=output_dir, flash_attention=True, deepspeed_ops=()
    )
    return facts


def test_a_rank_tells_of_its_machine_in_plain_values(tmp_path: Path) -> None:
    facts = facts_with(tmp_path)
    assert pickle.loads(pickle.dumps(facts)) == facts
    json.dumps(asdict(facts))
    assert facts.versions["torch"] == torch.__version__
    assert 0 < facts.memory_available_bytes <= facts.memory_bytes
    assert facts.output.fault is None and facts.output.sees_main and facts.output.free_bytes > 0
    assert "flash_attn" in str(facts.flash_attention_fault)
    assert facts.gpu is None
    assert list(tmp_path.iterdir()) == []


def test_an_output_folder_that_takes_no_file_is_a_fault(tmp_path: Path) -> None:
    facts = facts_with(tmp_path / "gone")
    assert facts.output.fault == "No such file or directory" and not facts.output.sees_main


def test_memory_is_the_containers_where_that_is_less(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    proc.mkdir()
    (proc / "meminfo").write_text(
        "MemTotal: 1000 kB\nMemFree: 5 kB\nMemAvailable: 800 kB\nHugePages_Total: 0\n"
    )
    assert host_memory(proc=proc, cgroup=cgroup) == (800 * 1024, 1000 * 1024)
    cgroup.mkdir()
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("300000\n")
    (cgroup / "memory.stat").write_text("anon 200000\nfile 1\ninactive_file 100000\n")
    assert host_memory(proc=proc, cgroup=cgroup) == (800 * 1024, 1000 * 1024)
    (cgroup / "memory.max").write_text("500000\n")
    assert host_memory(proc=proc, cgroup=cgroup) == (300_000, 500_000)
    (cgroup / "memory.max").unlink()
    (cgroup / "memory").mkdir()
    (cgroup / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert host_memory(proc=proc, cgroup=cgroup) == (800 * 1024, 1000 * 1024)
    (cgroup / "memory" / "memory.limit_in_bytes").write_text("400000\n")
    (cgroup / "memory" / "memory.usage_in_bytes").write_text("100000\n")
    assert host_memory(proc=proc, cgroup=cgroup) == (300_000, 400_000)


def test_the_smallest_gpu_counts_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    others = [48 * 10**9, 24 * 10**9]
    monkeypatch.setattr(World, "gather", lambda self, value: [value, *others])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9)
    )
    assert smallest_gpu(replace(ALONE, device=torch.device("cuda", 0))) == 24 * 10**9
    assert smallest_gpu(ALONE) is None


def test_what_compiling_an_op_lacks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    missing = ("a C++ compiler (g++)", "ninja", "Python's headers (Python.h)")
    assert missing_for_ops(["cpu_adam"]) == missing
    assert missing_for_ops([]) == ()
    monkeypatch.setattr("deepspeed.git_version_info.installed_ops", {"cpu_adam": True})
    monkeypatch.setattr("deepspeed.git_version_info.accelerator_name", "cpu")
    assert missing_for_ops(["cpu_adam"]) == ()
    assert missing_for_ops(["cpu_adam", "deepspeed_shm_comm"]) == missing


@pytest.mark.parametrize("use_lora", [True, False])
def test_parameters_are_counted_without_building_them(use_lora: bool) -> None:
    config = tiny_config(llm_model_name=TINY, use_lora=use_lora, lora_r=8)
    built = build_model(config, seed=0, device=CPU)
    trainable = sum(p.numel() for group in parameter_groups(built.model).values() for _, p in group)
    counts = parameter_counts(config)
    # Qwen3 norms queries and keys; no other architecture that we know does.
    assert counts.total == pytest.approx(sum(p.numel() for p in built.model.parameters()), rel=1e-3)
    assert counts.trainable == pytest.approx(trainable, rel=1e-3)


def test_qwen3_8b_has_as_many_parameters_as_its_name_says() -> None:
    lora = parameter_counts(tiny_config(llm_model_name=QWEN3_8B_RANDOM, use_lora=True, lora_r=32))
    full = parameter_counts(tiny_config(llm_model_name=QWEN3_8B_RANDOM, use_lora=False))
    assert full.total == full.trainable == pytest.approx(8.19e9, rel=0.01)
    assert lora.trainable == pytest.approx(87.3e6 + 41e6, rel=0.01)


def test_provenance_tells_code_image_data_and_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAD_MLLM_IMAGE", "cad-mllm@sha256:12")
    monkeypatch.setenv("CAD_MLLM_OVERLAY", "zero3")
    told = provenance(ranks(4, hosts=2), deepspeed_config={"a": 1}, dataset="fingerprint")
    assert (told["image"], told["overlay"]) == ("cad-mllm@sha256:12", "zero3")
    assert told["versions"] == {"python": "3.12.3", "torch": "2.11.0", "deepspeed": "0.19.8"}
    assert told["world_size"] == 4
    assert told["hardware"] == {
        "gpus": {"NVIDIA L40": 4},
        "driver": "580.65.06",
        "cuda": "13.0",
        "hosts": {
            "node-a": {"cpu": "32 x CPU", "memory_gb": 256.0},
            "node-b": {"cpu": "32 x CPU", "memory_gb": 256.0},
        },
    }
    assert (told["deepspeed_config"], told["dataset"]) == ({"a": 1}, "fingerprint")
    json.dumps(told)
