"""The ways to compute a step that are compared: ours, the original design, and PyTorch's FSDP2."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard

from cad_mllm.bench.workloads import Workload
from cad_mllm.config import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from cad_mllm.errors import ConfigError
from cad_mllm.model.build import Built
from cad_mllm.train.assemble import build_engine, build_networks, resolve_zero
from cad_mllm.train.distributed import World
from cad_mllm.train.zero import JsonDict, read_deepspeed_json

EngineName = Literal["plain", "zero2", "zero3", "fsdp2"]


_NAME = re.compile(r"[\w.-]+")
_SHIPPED = Path(__file__).resolve().parents[2] / "configs" / "deepspeed"


@dataclass(frozen=True, kw_only=True)
class Peer:
    """One way to compute the step."""

    title: str
    engine: EngineName
    packed: bool
    """Packed rows, attention by sample, loss of supervised positions; else the original design."""
    shipped: str | None = None
    """The file of configs/deepspeed/ that a ZeRO peer is trained with; None: DeepSpeed's defaults."""
    zero: Mapping[str, object] = field(default_factory=dict)
    """Laid over the file's `zero_optimization`."""
    compile: Mapping[str, object] = field(default_factory=dict)
    """The file's `compile`, if any."""

    @property
    def is_zero(self) -> bool:
        """Whether DeepSpeed computes the step."""
        return self.engine in ("zero2", "zero3")


PEERS = {
    "original-zero3": Peer(title="original design, stock ZeRO-3", engine="zero3", packed=False),
    "original-zero2": Peer(title="original design, stock ZeRO-2", engine="zero2", packed=False),
    "zero3": Peer(title="ours, ZeRO-3", engine="zero3", packed=True, shipped="ds_zero3_config.json"),
    "zero3-resident": Peer(
        title="ours, ZeRO-3, frozen weights kept", engine="zero3", packed=True,
        shipped="ds_zero3_resident.json",
    ),
    "zero3-offload": Peer(
        title="ours, ZeRO-3 with offload", engine="zero3", packed=True, shipped="ds_zero3_offload.json"
    ),
    "zero2": Peer(title="ours, ZeRO-2", engine="zero2", packed=True, shipped="ds_zero2_config.json"),
    "fsdp2": Peer(title="ours, FSDP2 in place of ZeRO", engine="fsdp2", packed=True),
    "plain": Peer(title="ours, one GPU without ZeRO", engine="plain", packed=True),
}  # fmt: skip


def read_variants(path: Path) -> dict[str, Peer]:
    """Variations of the ZeRO peers, by their names, from a file.

    It holds a list of objects: `name` and `peer` (one of `PEERS` under ZeRO), and what is laid over the
    peer's DeepSpeed JSON: `zero` (keys of its zero_optimization), `compile` (its section of that name).

    Raises:
        ConfigError: the file cannot be read or says something else.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--variants {path}: not readable as JSON ({error})") from error
    variants: dict[str, Peer] = {}
    for entry in given if isinstance(given, list) else [given]:
        name, base, more = _variant(entry, path)
        if name in PEERS or name in variants:
            raise ConfigError(f"--variants {path}: the name {name} is taken; choose another")
        variants[name] = replace(PEERS[base], title=f"{PEERS[base].title} ({name})", **more)
    return variants


def _variant(entry: object, path: Path) -> tuple[str, str, dict[str, Any]]:
    """(name, peer, what differs). ConfigError: it says something else."""
    entry = dict(entry) if isinstance(entry, dict) else {}
    name, base = entry.pop("name", None), entry.pop("peer", None)
    sections = all(key in ("zero", "compile") and isinstance(entry[key], dict) for key in entry)
    if not (isinstance(name, str) and _NAME.fullmatch(name) and sections):
        raise ConfigError(
            f"--variants {path}: a list of objects is needed, with a name (letters, digits, . _ -), a peer, "
            f"and objects zero and compile as wanted"
        )
    if not (isinstance(base, str) and base in PEERS and PEERS[base].is_zero):
        zero = ", ".join(peer for peer in PEERS if PEERS[peer].is_zero)
        raise ConfigError(f"--variants {path}: the peer of {name} is {base!r}; one of {zero} is needed")
    return name, base, entry


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a peer computes steps with."""

    built: Built
    forward: Callable[..., Tensor]
    """Called like `MultimodalLM`: the summed loss of a micro-batch."""
    backward: Callable[[Tensor], None]
    step: Callable[[], float]
    """Clips and updates; the norm of the gradients before that."""


def train_config(
    peer: Peer, workload: Workload, model: str, *, folder: Path, micro_batches: int, device: str
) -> TrainConfig:
    """The flags of the run that the peer stands for."""
    on_gpu = device == "cuda"
    flash = on_gpu and peer.packed and _has_flash_attention()
    # Of texts alone no encoder sees anything: those that are there at once will do.
    encoders = "tiny" if model == "tiny" or workload.constant_length else "random"
    deepspeed_json = None
    if peer.is_zero:
        deepspeed_json = folder / f"{peer.engine}.json"
        deepspeed_json.write_text(json.dumps(_deepspeed_json(peer)))
    return TrainConfig(
        model=ModelConfig(
            llm_model_name=model,
            use_lora=workload.use_lora,
            attn_implementation="flash_attention_2" if flash else "sdpa",
            use_gradient_checkpointing=workload.recompute,
            dtype="bfloat16" if on_gpu else "float32",
            vision_model_name=encoders,
            point_encoder=encoders,
        ),
        data=DataConfig(max_seq_length=workload.max_seq_length),
        optim=OptimConfig(
            batch_size=workload.padded_rows,
            pack_tokens=workload.pack_tokens if peer.packed else 0,
            gradient_accumulation_steps=micro_batches,
        ),
        run=RunConfig(
            output_dir=folder,
            device="cuda" if on_gpu else "cpu",
            deepspeed=deepspeed_json is not None,
            deepspeed_config=deepspeed_json,
        ),
    )


def build(peer: Peer, config: TrainConfig, world: World, reached: Callable[[str], None]) -> Setup:
    """Networks and engine of a peer; `reached` is told what there is as it comes."""
    zero = resolve_zero(config, world)
    built = build_networks(config, zero, world, fused=peer.packed)
    reached("networks")
    if not peer.packed:
        built = _original(built)
    if peer.engine == "fsdp2":
        return _fsdp2(built, config, world)
    engine = build_engine(config, built, zero, world, log_dir=config.run.output_dir)
    rates = {flat.group: _RATE for flat in engine.flats}
    rates |= {group["name"]: _RATE for group in engine.optimizer.param_groups}
    engine.module.train()
    return Setup(
        built=built,
        forward=engine.module,
        backward=engine.backward,
        step=lambda: engine.step(rates),
    )


_RATE = 1e-5


def _has_flash_attention() -> bool:
    from transformers.utils import is_flash_attn_2_available

    return bool(is_flash_attn_2_available())


def _deepspeed_json(peer: Peer) -> JsonDict:
    """What a training with the peer's shipped file reads, or DeepSpeed's defaults for the original design."""
    if peer.shipped is not None:
        content = read_deepspeed_json(_SHIPPED / peer.shipped)
    else:
        content = {
            "bf16": {"enabled": "auto"},
            "zero_optimization": {"stage": 2 if peer.engine == "zero2" else 3},
            "steps_per_print": 10**6,
        }
    zero = content["zero_optimization"]
    assert isinstance(zero, dict)
    content["zero_optimization"] = {**zero, **peer.zero}
    return content | ({"compile": dict(peer.compile)} if peer.compile else {})


class _OriginalLM(nn.Module):
    """The loss of the original design: all logits of all positions, through the LM's own head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.lm = model.lm
        self.point_projector = model.point_projector
        self.image_projector = model.image_projector
        self._embed = type(model).embed

    def forward(
        self,
        tokens_BT: Tensor,
        attention_mask_BT: Tensor,
        labels_BT: Tensor,
        loss_rows: Tensor,
        *features: Any,
        **options: Any,
    ) -> Tensor:
        embeds_BTD = self._embed(self, tokens_BT, *features, trainable=options["trainable"])
        logits_BTV = self.lm(
            inputs_embeds=embeds_BTD, attention_mask=attention_mask_BT, use_cache=False
        ).logits
        return nn.functional.cross_entropy(
            logits_BTV[:, :-1].flatten(0, 1).float(), labels_BT[:, 1:].flatten(), reduction="sum"
        )


def _original(built: Built) -> Built:
    """The same networks with the original loss, and without the layers' names, by which ours are gathered."""
    for module in built.model.modules():
        if getattr(module, "_no_split_modules", None):
            module._no_split_modules = []  # type: ignore[assignment]
    return replace(built, model=_OriginalLM(built.model))  # type: ignore[arg-type]


def _fsdp2(built: Built, config: TrainConfig, world: World) -> Setup:
    """`fully_shard` on every decoder layer and on the rest; AdamW with fp32 masters, as ZeRO has them."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(world.device.type, (world.size,))
    stacks: list[Any] = [getattr(part, "layers", None) for part in built.model.modules()]
    for layer in next(stack for stack in stacks if isinstance(stack, nn.ModuleList)):
        fully_shard(layer, mesh=mesh)
    model: Any = fully_shard(built.model, mesh=mesh)
    model.train()
    trainable: list[Any] = [p for p in model.parameters() if p.requires_grad]
    shards = [p.detach().to_local() for p in trainable]
    masters = [shard.to(torch.float32, copy=True) for shard in shards]
    optimizer = torch.optim.AdamW(masters, lr=_RATE, fused=True)

    def backward(loss: Tensor) -> None:
        (loss * world.size).backward()  # it averages over the ranks, the loss is a sum

    @torch.no_grad()
    def step() -> float:
        pairs = zip(masters, trainable, strict=True)
        given = [(master, p.grad.to_local()) for master, p in pairs if p.grad is not None]
        gradients = [torch.empty_like(master) for master, _ in given]
        torch._foreach_copy_(gradients, [gradient for _, gradient in given])
        for (master, _), gradient in zip(given, gradients, strict=True):
            master.grad = gradient
        norm = torch.stack(torch._foreach_norm(gradients)).square().sum()
        dist.all_reduce(norm)
        norm.sqrt_()
        torch._foreach_mul_(gradients, (config.optim.max_grad_norm / (norm + 1e-6)).clamp(max=1))
        optimizer.step()
        torch._foreach_copy_(shards, masters)
        optimizer.zero_grad()
        model.zero_grad()
        return float(norm)

    return Setup(built=built, forward=model, backward=backward, step=step)
