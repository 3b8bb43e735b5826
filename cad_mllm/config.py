"""What a run is told: frozen dataclasses, one namespace of flag names, YAML below the flags.

The names of the fields are the names of the flags and of the YAML keys. Sections exist for the code
(each owner gets its own section); the user sees one flat list.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

DType = Literal["bfloat16", "float32"]
AttnImplementation = Literal["sdpa", "eager", "flash_attention_2"]
TargetFormat = Literal["command", "json"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which networks are built, and how."""

    llm_model_name: str = "Qwen/Qwen3-8B"
    """Causal LM: folder, hub name, or a preset with random weights (`tiny`, `small`, `qwen3-8b-random`)."""
    use_lora: bool = True
    """Train LoRA adapters on all linear layers of the LM; off (`--no_use_lora`): train all its weights."""
    lora_r: int = 32
    """LoRA rank."""
    lora_alpha: int = 64
    """LoRA alpha."""
    vision_model_name: str | None = None
    """DINOv2: folder, hub name, `tiny`, `small`, `random`. Unset: that of the preset, or dinov2-large."""
    point_encoder: str | None = None
    """Michelangelo checkpoint (.safetensors, .ckpt), `tiny`, `small`, `random`. Unset: that of the preset."""
    train_encoders: bool = False
    """Train each encoder together with its projector: from scratch, or away from its pretrained weights."""
    attn_implementation: AttnImplementation = "sdpa"
    """Attention kernel of the LM."""
    use_gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a quarter to a third slower."""
    gpu_memory_gb: float = 0.0
    """With gradient checkpointing: recompute only what does not fit so much memory, or the GPU's (0: all)."""
    dtype: DType = "bfloat16"
    """Precision of weights and activations (optimiser state and master weights are fp32)."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the samples come from and what a sample is."""

    train_data_path: str | None = None
    """Sharded data set (folder or URL), or folder with json/ txt/ pcd/ img/, short for the --omnicad_*."""
    val_data_path: str | None = None
    """The same for validation. Unset: the val split of a sharded data set, else no validation loss."""
    omnicad_txt_path: Path | None = None
    """Folder of caption files (txt/0000.json ...)."""
    omnicad_json_root: Path | None = None
    """Folder of CAD JSON files (json/0000/*.json)."""
    omnicad_img_root: Path | None = None
    """Folder of rendered views."""
    omnicad_pc_root: Path | None = None
    """Folder of point clouds."""
    create_dummy_data: bool = False
    """Write procedural models in the Omni-CAD layout under the output folder, and train on them."""
    num_dummy_samples: int = 100
    """How many."""
    max_seq_length: int = 2048
    """Longest sequence: modalities, prompt, target. What does not fit is dropped and counted, never cut."""
    target_format: TargetFormat = "command"
    """Target text: compact commands, or the minified Omni-CAD JSON of the original reproduction."""
    quantization_bits: Literal[8, 10] = 8
    """Levels of a coordinate in the command text: 2^8 (the paper's) or 2^10."""
    augment_prefix: float = 0.0
    """Probability that a training sample asks for the first few features of its program alone."""
    augment_removal: float = 0.0
    """Probability that it asks for the program without one feature on which no other depends."""
    caption_dropout: float = 0.0
    """Probability that a training sample with points or an image is given without its caption."""
    encoder_features: Path | None = None
    """Folder for features of frozen encoders: computed once, then read in place of pictures and clouds."""
    max_skipped_fraction: float = 0.05
    """More unusable samples than this share end the run (exit 3)."""
    num_workers: int = 2
    """Processes per rank that check the data and prepare batches."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How the weights move."""

    batch_size: int = 2
    """Samples per micro-batch and rank, padded; this flag takes the place of a file's `pack_tokens`."""
    pack_tokens: int = 0
    """Pack samples into micro-batches of so many tokens (0: pad them); 4 x --max_seq_length packs well."""
    gradient_accumulation_steps: int = 4
    """Micro-batches per rank and optimiser step."""
    warmup_steps: int = 100
    """Linear warm-up at the start of each stage (at most half of the stage)."""
    lr_scheduler_type: Literal["cosine", "linear"] = "cosine"
    """Decay to zero after the warm-up, per stage."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Clip the gradient norm of the groups that train to this (0: no clipping)."""
    projector_lr_multiplier: float = 5.0
    """Learning rate of the projectors relative to the stage's."""

    @property
    def rows(self) -> int:
        """Of a micro-batch: a sample each, or one packed with samples."""
        return 1 if self.pack_tokens else self.batch_size


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """The three stages: text; text + points; text + points + image."""

    enable_curriculum: bool = True
    """Off: one stage only, with stage 3's modalities, learning rate and epochs."""
    start_from_stage: Literal[1, 2, 3] = 1
    """Skip the stages before this one."""
    stage1_epochs: int = 3
    """Passes over the data in stage 1 (0 skips the stage)."""
    stage2_epochs: int = 3
    """Passes in stage 2."""
    stage3_epochs: int = 5
    """Passes in stage 3."""
    stage1_lr: float = 2e-5
    """Peak learning rate of stage 1."""
    stage2_lr: float = 2e-5
    """Peak learning rate of stage 2."""
    stage3_lr: float = 1e-5
    """Peak learning rate of stage 3."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where the run happens, what it leaves and whom it tells."""

    output_dir: Path = Path("outputs_curriculum")
    """Checkpoints, logs, metrics and skipped samples."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: CUDA if there is any."""
    seed: int = 42
    """Order of the data, modality draws, initial weights of adapters and projectors, dropout."""
    logging_steps: int = 10
    """A line and a metrics record every so many optimiser steps."""
    save_steps: int = 500
    """A checkpoint, and the validation loss, every so many optimiser steps and at the end of each stage."""
    keep_last_n_checkpoints: int = 3
    """Older step checkpoints are removed (0 keeps all); the best one (best.json) and stage ends stay."""
    resume_from_ckpt: str | None = None
    """A checkpoint folder, or `auto`: the newest complete one in the output folder, if there is any."""
    max_restarts_without_progress: int = 5
    """With `--resume_from_ckpt auto`: more restarts than this from one and the same step end it (exit 5)."""
    hang_timeout_minutes: float = 30.0
    """A step or a collective that takes longer is a hang: stacks are written, the run ends (exit 171)."""
    deepspeed: bool = False
    """Train under DeepSpeed; needs --deepspeed_config."""
    deepspeed_config: Path | None = None
    """DeepSpeed JSON; `auto` values are resolved from the flags."""
    local_rank: int = -1
    """Set by the launcher."""
    use_wandb: bool = False
    """Log to Weights & Biases from rank 0 (WANDB_MODE=offline needs no key)."""
    wandb_project: str = "CAD-MLLM-Curriculum"
    """W&B project."""
    wandb_run_name: str | None = None
    """W&B run name."""
    wandb_entity: str | None = None
    """W&B user or team."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything one training run is told."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    run: RunConfig = field(default_factory=RunConfig)
