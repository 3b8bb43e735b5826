"""The benchmark: the same samples for every peer, figures by their definitions, no wrong loss counted."""

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from cad_mllm.bench import run as bench_run
from cad_mllm.bench.figures import Figures, figures_of
from cad_mllm.bench.peers import PEERS, read_variants, train_config
from cad_mllm.bench.rank import RankFigures
from cad_mllm.bench.run import _add_scaling, _chosen, _compared, _difference, _tables
from cad_mllm.bench.workloads import (
    WORKLOADS,
    MicroBatches,
    StepSamples,
    Workload,
    supervised_tokens,
    tiny,
    with_micro_batch,
)
from cad_mllm.data.collate import IGNORED
from cad_mllm.data.sequence import SequenceSpec
from cad_mllm.errors import ConfigError, ExitCode

STEPS, PACKS = 3, 4


def spec(workload: Workload) -> SequenceSpec:
    return SequenceSpec(
        image_tokens=16,
        image_size=8,
        image_mean=(0.5,) * 3,  # type: ignore[arg-type]
        image_std=(0.5,) * 3,  # type: ignore[arg-type]
        point_tokens=17,
        num_points=5,
        max_seq_length=workload.max_seq_length,
    )


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", WORKLOADS)
def test_every_peer_computes_the_samples_of_a_step(name: str, ranks: int) -> None:
    workload = tiny(WORKLOADS[name])
    samples = StepSamples(workload, spec(workload), packs=PACKS, steps=STEPS)
    for packed in (True, False):
        data = [
            MicroBatches(samples, workload, spec(workload), packed=packed, rank=rank, ranks=ranks)
            for rank in range(ranks)
        ]
        assert len({one.per_step for one in data}) == 1
        for step, packs in enumerate(samples.packs):
            mine = range(step * data[0].per_step, (step + 1) * data[0].per_step)
            batches = [one[number] for one in data for number in mine]
            wanted = Counter(str(s.number) for one in packs for s in one)
            assert set(wanted) == {i for batch in batches for i in batch.sample_ids}
            assert sum(batch.num_supervised for batch in batches) == supervised_tokens(packs)
            shape = (1, workload.pack_tokens) if packed else (workload.padded_rows, workload.max_seq_length)
            assert {tuple(batch.tokens_BT.shape) for batch in batches} == {shape}


def test_a_sample_has_the_same_content_packed_and_padded() -> None:
    workload = tiny(WORKLOADS["A"])
    samples = StepSamples(workload, spec(workload), packs=1, steps=1)
    packed, padded = (
        MicroBatches(samples, workload, spec(workload), packed=p, rank=0, ranks=1) for p in (True, False)
    )
    tokens = [
        sorted(
            label
            for batch in (data[n] for n in range(data.per_step))
            for label in batch.labels_BT.flatten().tolist()
            if label != IGNORED
        )
        for data in (packed, padded)
    ]
    assert tokens[0] == tokens[1]
    clouds = [sum(float(data[n].points_MPC.abs().sum()) for n in range(data.per_step)) for data in (packed,)]
    assert clouds[0] > 0


def test_packs_of_real_lengths_keep_the_promise_of_the_plan() -> None:
    workload = WORKLOADS["A"]
    full_size = replace(spec(workload), image_tokens=256, point_tokens=257)
    samples = StepSamples(workload, full_size, packs=4, steps=8)
    lengths = [sum(s.length for s in one) for step in samples.packs for one in step]
    assert sum(lengths) / len(lengths) >= 0.97 * workload.pack_tokens


def measured(**changes: object) -> RankFigures:
    values: dict[str, object] = {
        "losses": [2.0, 1.9, 1.8],
        "gradient_norms": [4.0, 3.0, 2.0],
        "seconds": [2.0, 4.0],
        "waited": [0.1, 0.2],
        "tokens": [800, 800],
        "positions": [1000, 1000],
        "supervised": [100, 100],
        "squares": [500_000, 500_000],
        "samples": [4, 4],
        "micro_tokens": [[400, 400], [400, 400]],
        "micro_squares": [[250_000, 250_000], [250_000, 250_000]],
        "peak_bytes": 3 * 10**9,
        "start": {"process": 4.0, "first step": 12.0},
        "sizes": {"layers": 10**9, "head": 10**8, "num_layers": 10, "attention_width": 64},
    }
    return RankFigures(**(values | changes))  # type: ignore[arg-type]


def test_figures_follow_their_definitions() -> None:
    slow = measured(seconds=[4.0, 4.0], micro_tokens=[[600, 400], [400, 400]], peak_bytes=5 * 10**9)
    figures = figures_of([measured(), slow], use_lora=True, recompute=True, device_name="NVIDIA H200")
    assert figures.tokens_per_second_per_gpu == pytest.approx(800 / 4.0)  # the slower rank ends the step
    assert figures.samples_per_second == pytest.approx(8 / 4.0)
    assert figures.peak_gb == 5.0
    assert figures.non_padding == 0.8
    assert figures.token_imbalance == pytest.approx((600 / 500 - 1) / 4)
    assert figures.square_imbalance == 0.0
    assert figures.loader_wait == pytest.approx(0.3 / 6.0)
    layers, head, attention = 2 * 1e9 * 1600, 2 * 1e8 * 200, 2 * 64 * 10 * 1e6
    model = 2 * (layers + head) + 3 * attention
    assert figures.mfu == pytest.approx(model / (4.0 * 2 * 989e12))
    assert figures.hfu == pytest.approx((model + layers + attention) / (4.0 * 2 * 989e12))


def test_full_fine_tuning_counts_the_gradients_of_the_weights() -> None:
    lora, full = (
        figures_of([measured()], use_lora=use_lora, recompute=False, device_name="NVIDIA L40")
        for use_lora in (True, False)
    )
    assert lora.mfu is not None and full.mfu is not None and lora.mfu == lora.hfu
    assert full.mfu / lora.mfu == pytest.approx(1.5, rel=1e-3)
    assert figures_of([measured()], use_lora=True, recompute=False, device_name="CPU").mfu is None


def test_no_figure_of_a_peer_that_computes_another_loss_counts() -> None:
    reference = figures_of([measured()], use_lora=True, recompute=False, device_name="CPU")
    near = replace(reference, losses=(2.0, 1.9, 1.80001), gradient_norms=(4.0, 3.003, 2.0))
    compared = _compared(near, reference, 1e-4)
    assert isinstance(compared, Figures) and compared.parity == pytest.approx(1e-5 / 1.8)
    assert compared.gradient_parity == pytest.approx(1e-3)
    for loss in (2.01, float("nan"), float("inf")):
        for step in range(3):
            losses = [*reference.losses]
            losses[step] = loss
            void = _compared(replace(reference, losses=tuple(losses)), reference, 1e-4)
            assert isinstance(void, str) and void.startswith("void")


def test_without_the_reference_the_parity_is_not_checked() -> None:
    alone = _compared(figures_of([measured()], use_lora=True, recompute=False, device_name="CPU"), None, 1e-4)
    assert isinstance(alone, Figures) and alone.parity is None
    assert _difference(alone.parity) == "not checked"


@pytest.mark.parametrize("name", [name for name, peer in PEERS.items() if peer.shipped])
def test_our_zero_peers_read_the_shipped_files(name: str, tmp_path: Path) -> None:
    config = train_config(
        PEERS[name], tiny(WORKLOADS["C"]), "tiny", folder=tmp_path, micro_batches=1, device="cpu"
    )
    assert config.run.deepspeed_config is not None
    shipped = Path(__file__).resolve().parents[2] / "configs" / "deepspeed" / str(PEERS[name].shipped)
    assert json.loads(config.run.deepspeed_config.read_text()) == json.loads(shipped.read_text())


def written(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "variants.json"
    path.write_text(json.dumps(content))
    return path


def test_a_variant_is_its_peer_with_other_settings(tmp_path: Path) -> None:
    entry = {
        "name": "deep",
        "peer": "zero3",
        "zero": {"overlap_comm": False},
        "compile": {"deepcompile": True},
    }
    variant = read_variants(written(tmp_path, [entry]))["deep"]
    config = train_config(
        variant, tiny(WORKLOADS["C"]), "tiny", folder=tmp_path, micro_batches=1, device="cpu"
    )
    assert config.run.deepspeed_config is not None
    content = json.loads(config.run.deepspeed_config.read_text())
    assert content["compile"] == {"deepcompile": True}
    assert content["zero_optimization"]["overlap_comm"] is False
    assert content["zero_optimization"]["stage3_prefetch_bucket_size"] == "auto"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([{"name": "x", "peer": "fsdp2"}], "is 'fsdp2'; one of"),
        ([{"name": "x", "peer": ["zero3"]}], "one of"),
        ([{"name": "zero3", "peer": "zero3"}], "is taken"),
        ([{"name": "x/y", "peer": "zero3"}], "a list of objects is needed"),
        ([{"name": "x", "peer": "zero3", "optimizer": {}}], "a list of objects is needed"),
        ("x", "a list of objects is needed"),
    ],
)
def test_a_variant_that_cannot_be_is_refused(content: object, expected: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=expected):
        read_variants(written(tmp_path, content))


def test_a_file_of_variants_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not readable as JSON"):
        read_variants(tmp_path / "none.json")


def test_a_micro_batch_of_other_tokens_has_as_many_padded_rows() -> None:
    small = with_micro_batch(WORKLOADS["C"], 4096)
    assert (small.pack_tokens, small.padded_rows) == (4096, 2)
    for tokens in (1024, 3000):
        with pytest.raises(ConfigError, match="a multiple of 2048"):
            with_micro_batch(WORKLOADS["C"], tokens)


def test_the_reference_comes_first_and_one_process_alone() -> None:
    assert _chosen(["zero3", "plain", "original-zero3"], [1, 2], "cpu") == [
        ("original-zero3", 2), ("zero3", 2), ("original-zero3", 1), ("zero3", 1), ("plain", 1),
    ]  # fmt: skip
    assert {name for name, _ in _chosen([], [2], "cpu")} == set(PEERS)


@pytest.mark.parametrize(
    ("peers", "ranks", "expected"),
    [(["zero4"], [2], "there is no such peer"), (["zero3"], [2, 3], "cannot be shared evenly")],
)
def test_a_peer_or_a_number_of_ranks_that_cannot_be_is_refused(
    peers: list[str], ranks: list[int], expected: str
) -> None:
    with pytest.raises(ConfigError, match=expected):
        _chosen(peers, ranks, "cpu")


def test_a_large_model_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="use --model tiny"):
        bench_run.bench("C", model="qwen3-8b-random", ranks=[], peers=[], steps=1, minutes=1.0, out=tmp_path)


def time_tiny(out: Path, *, peers: list[str], minutes: float) -> dict[str, dict[str, object]]:
    code = bench_run.bench("A", model="tiny", ranks=[], peers=peers, steps=1, minutes=minutes, out=out)
    assert code == ExitCode.DONE
    return dict(json.loads((out / "bench-A.json").read_text())["peers"])


@pytest.mark.distributed
def test_without_time_nothing_is_run_and_that_is_said(tmp_path: Path) -> None:
    peers = time_tiny(tmp_path, peers=["zero3"], minutes=0.0)
    assert "time was up" in str(peers["zero3-2"]["failed"])


def test_scaling_is_counted_in_samples_of_one_gpu_without_zero() -> None:
    peers: dict[str, Any] = {
        "zero3-4": {"samples_per_second": 35.0},
        "fsdp2-4": {"failed": "no"},
        "plain-1": {"samples_per_second": 10.0},
    }
    _add_scaling(peers)
    assert [peer["scaling"] for peer in peers.values()] == [3.5, None, 1.0]
    del peers["plain-1"]
    _add_scaling(peers)
    assert [peer["scaling"] for peer in peers.values()] == [None, None]


def test_a_table_is_no_wider_than_the_terminal_and_no_peer_is_left_out() -> None:
    committed = Path(__file__).with_name("results") / "bench-C-4xH200-earlier.json"
    results = json.loads(committed.read_text())
    _add_scaling(results["peers"])
    results["peers"] = {f"{name}-{n}": peer for n in range(4) for name, peer in results["peers"].items()}
    results["peers"]["late"] = {"title": "late", "ranks": 4, "failed": "the time was up"}
    for width in (40, 80, 200):
        console = Console(width=width, file=io.StringIO(), record=True)
        for table in _tables(results, width):
            console.print(table)
        lines = console.export_text().splitlines()
        assert max(map(len, lines)) <= width
        headings = [word for line in lines if "peer-ranks" in line for word in line.split()[3:-1:2]]
        assert headings == [name for name in results["peers"] if name != "late"]
        assert "late: the time was up" in " ".join(lines)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_all_peers_compute_the_same_loss_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    peers = time_tiny(tmp_path, peers=[], minutes=12.0)
    assert len(peers) == len(PEERS)
    assert all("failed" not in peer for peer in peers.values()), peers
    assert all(float(peer["parity"]) < 1e-4 for peer in peers.values())  # type: ignore[arg-type]
    assert all(float(peer["gradient_parity"]) < 1e-4 for peer in peers.values())  # type: ignore[arg-type]
    assert (tmp_path / "bench-A.png").stat().st_size > 0
    assert float(peers["zero3-2"]["non_padding"]) > 0.95  # type: ignore[arg-type]
