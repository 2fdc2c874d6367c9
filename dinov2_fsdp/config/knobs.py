"""Every knob of a run: typed, and documented where it is declared.

Units: durations are text with a unit (``10ep``, ``1250it``, ``2Mimg``, ``5%``), sizes are pixels, temperatures and
momenta plain numbers. The defaults are those that trained the published models (DINOv2, arXiv 2304.07193, and its
ImageNet-1k recipe).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vits": {"dim": 384, "depth": 12, "heads": 6, "ffn": "mlp"},
    "vitb": {"dim": 768, "depth": 12, "heads": 12, "ffn": "mlp"},
    "vitl": {"dim": 1024, "depth": 24, "heads": 16, "ffn": "mlp"},
    "vitg": {"dim": 1536, "depth": 40, "heads": 24, "ffn": "swiglu"},
}
"""Published backbones (DINOv2, table 17 of the appendix); ``model.dim`` and its neighbours override them."""


@dataclass
class DataConfig:
    train: str = "scenes:"
    """Images to learn from: folder:PATH, tar:PATTERN, imagenet:ROOT[:SPLIT], imagenet22k:ROOT or scenes:KEY=VALUE,…"""
    workers: int = 8
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: int = 4
    """Microbatches that each loader process prepares ahead."""
    cache: str | None = None
    """Folder for listings; by default the user's cache folder."""
    allow_change: bool = False
    """Resume though data.train lists other images than when the run was saved."""
    max_bad_images: int = 100
    """Unreadable images that a run replaces and names before it stops."""


@dataclass
class CropConfig:
    global_size: int = 224
    """Side of the two global crops, pixels; a multiple of the patch."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_size: int = 98
    """Side of the local crops, pixels; a multiple of the patch."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    local_number: int = 8
    """Local crops per image."""
    blur: str = "paper"
    """paper: blur p 1/.1/.5 (global 1, global 2, local); released: the published code's 0/.9/.5; none: no blur, for
    images of a few dozen pixels."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Largest change of brightness, contrast, saturation, hue."""
    gray: float = 0.2
    """Probability of grayscale."""
    solarize: float = 0.2
    """Probability of solarisation of the second global crop."""
    implementation: str = "fast"
    """fast: OpenCV and torch, JPEG files decoded no larger than needed; reference: Pillow, equal to torchvision's
    transforms bit for bit and several times slower. Both draw the same; pixels differ by rounding."""
    colours: str = "worker"
    """worker: loader processes apply jitter, grayscale, blur and solarisation; device: the device that trains does, for
    a whole microbatch at once and with reference's values, which needs implementation=fast."""


@dataclass
class MaskConfig:
    probability: float = 0.5
    """Share of the global crops that are masked for the student."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of a masked crop's patches that is hidden."""


@dataclass
class ModelConfig:
    arch: str = "vitl"
    """vits, vitb, vitl or vitg."""
    patch: int = 14
    """Side of a patch, pixels."""
    registers: int = 0
    """Register tokens (arXiv 2309.16588), 0 or more; the published models have 0 or 4."""
    drop_path: float = 0.3
    """Share of sequences that skip each residual branch (stochastic depth), uniform over depth."""
    layer_scale: float = 1e-5
    """Initial LayerScale; 0 leaves LayerScale out."""
    dim: int | None = None
    """Width; by default the architecture's."""
    depth: int | None = None
    """Blocks; by default the architecture's."""
    heads: int | None = None
    """Attention heads; by default the architecture's."""
    ffn: str | None = None
    """mlp or swiglu; by default the architecture's."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward part, in widths (SwiGLU takes two thirds of it)."""


@dataclass
class HeadConfig:
    prototypes: int = 65536
    """Outputs of the head."""
    hidden: int = 2048
    """Width of the head's MLP."""
    bottleneck: int = 256
    """Width of the L2-normalised layer before the prototypes."""
    layers: int = 3
    """Linear layers of the MLP."""
    batch_norm: bool = False
    """BatchNorm between the MLP's layers; its statistics are those of one microbatch."""
    layer_norm: bool = False
    """LayerNorm before the L2 normalisation."""
    fixed_gain: bool = False
    """Keep the prototypes' gain at 1 instead of learning it (DINO's norm_last_layer)."""


@dataclass
class IbotHeadConfig(HeadConfig):
    separate: bool = False
    """A head of its own for patches; otherwise patches use DINO's head and the other keys here mean nothing."""


@dataclass
class LossConfig:
    dino: float = 1.0
    """Weight of the loss between class tokens."""
    ibot: float = 1.0
    """Weight of the loss between masked patches; 0 turns masks off."""
    koleo: float = 0.1
    """Weight of the Kozachenko–Leonenko regulariser; 0 turns it off."""
    koleo_global: bool = False
    """Search nearest neighbours over all ranks' microbatches instead of within one."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's softmax after the warm-up."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's softmax at the first step."""
    teacher_temperature_warmup: str = "30ep"
    """Linear warm-up of the teacher's temperature."""
    centering: str = "softmax"
    """softmax: EMA centre; sinkhorn: Sinkhorn–Knopp; none: plain softmax (collapses: an ablation)."""
    centre_momentum: float = 0.9
    """Momentum of the EMA centre."""
    sinkhorn_iterations: int = 3
    """Sinkhorn–Knopp iterations."""


@dataclass
class OptimConfig:
    name: str = "adamw"
    """adamw or lars."""
    lr: float = 4e-3
    """Base learning rate, before it is scaled by the batch."""
    lr_scaling: str = "sqrt"
    """sqrt: × √(batch/1024); linear: × batch/256; none."""
    min_lr: float = 1e-6
    """Learning rate at the last step."""
    warmup: str = "10ep"
    """Linear warm-up of the learning rate."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """Weight decay at the first and the last step (cosine)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    momentum: float = 0.9
    """LARS's momentum."""
    clip: float = 3.0
    """Largest gradient norm; 0 turns clipping off."""
    clip_scope: str = "part"
    """part: backbone and heads are clipped each by its own norm, as published; all: by the norm of all."""
    layer_decay: float = 0.9
    """Factor on the learning rate from each block to the one below."""
    patch_embed_lr: float = 0.2
    """Further factor on the patch embedding's learning rate."""
    freeze_prototypes: str = "1ep"
    """How long the prototypes keep their initial values."""


@dataclass
class InitConfig:
    backbone: str | None = None
    """Weights that student and teacher start from instead of random ones: a file, folder or run that weights can be
    read from. Heads start anew."""
    freeze: str = "0it"
    """How long such a backbone keeps its weights while the heads warm up."""
    backbone_lr: float = 1.0
    """Factor on the backbone's learning rate afterwards."""


@dataclass
class TeacherConfig:
    momentum: tuple[float, float] = (0.992, 1.0)
    """EMA momentum at the first and the last step (cosine)."""


@dataclass
class TrainConfig:
    duration: str = "100ep"
    """Length of the run."""
    epoch: int = 0
    """Steps that `ep` counts as one epoch; 0: one pass over the data. The published recipes use 1250."""
    batch: int = 2048
    """Images per step, over all ranks and microbatches."""
    microbatch: int = 64
    """Images that go through the model at once. Ranks share a step's microbatches, so the result does not depend on
    their number; KoLeo, stochastic depth and BatchNorm see one microbatch."""
    precision: str = "bf16"
    """bf16, fp16 (with a gradient scaler) or fp32; weights and optimizer are kept in fp32."""
    max_nonfinite: int = 10
    """Steps in a row with a non-finite gradient that are skipped before the run stops."""
    deterministic: bool = False
    """Only kernels that give the same bits every time."""


@dataclass
class ParallelConfig:
    device: str = "auto"
    """auto, cuda or cpu."""
    attention: str = "auto"
    """math or sdpa: once per crop size; xformers or varlen: one call for all crops (CUDA only); auto: math on a CPU,
    xformers on CUDA, else varlen, else sdpa."""
    replicate: int = 1
    """Copies of the sharded model (HSDP): ranks are a replicate × shard mesh."""
    blocks_per_unit: int = 1
    """Blocks whose weights are gathered and freed together: more of them mean fewer, larger messages."""
    reshard_after_forward: bool | None = None
    """Free a unit's gathered weights between forward and backward. By default all do but a single rank on a CPU, which
    would only copy once more what it has."""
    prefetch: int = 1
    """Units whose weights are gathered ahead of their use; 1 is what the sharding does by itself."""
    reduce_precision: str = "fp32"
    """fp32 or bf16: what gradients are summed over ranks in."""
    heads_precision: str | None = None
    """Precision of the heads; by default train.precision. fp32 is slower and exact."""
    activation_checkpointing: str = "none"
    """none; selective: recompute every second block; full: recompute every block."""
    compile: bool = False
    """torch.compile each block."""
    threads: int = 0
    """CPU threads per rank; 0: the machine's cores divided by the ranks on it."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before the job ends."""


@dataclass
class CheckpointConfig:
    every: str = "1ep"
    """Time between checkpoints; 0it saves only at the end."""
    keep: int = 3
    """Newest checkpoints that stay on disk."""
    keep_every: str = "0it"
    """Checkpoints at multiples of this stay for ever."""
    asynchronous: bool = True
    """Write in the background while training goes on; False waits for each save."""


@dataclass
class LogConfig:
    every: str = "10it"
    """Time between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


@dataclass
class EvalConfig:
    every: str = "0it"
    """Time between evaluations during the run; 0it: none."""
    tasks: tuple[str, ...] = ("knn",)
    """Evaluations to run."""
    train: str | None = None
    """Labelled images that make up the memory bank; by default data.train."""
    test: str | None = None
    """Labelled images to classify."""
    resize: int = 256
    """Shorter side before the central crop, pixels."""
    size: int = 224
    """Central crop, pixels; a multiple of the patch."""
    batch: int = 64
    """Images per rank that go through the backbone at once."""
    max_train: int = 0
    """Use only this many images of the memory bank; 0: all."""
    max_test: int = 0
    """Use only this many images of the test set; 0: all."""
    k: tuple[int, ...] = (1, 10, 20, 100, 200)
    """Neighbours that vote."""
    temperature: float = 0.07
    """Temperature of the votes."""
    classes: int = 150
    """Classes of segmentation's annotations (those of scenes are known)."""
    first_class: int = 1
    """Annotation value of the first class."""
    void: tuple[int, ...] = (0,)
    """Annotation values that do not count."""


@dataclass
class Config:
    output_dir: str = "runs/default"
    """Run directory: holds everything of the run and nothing else."""
    seed: int = 0
    """Seed of weights, stream, crops, masks and stochastic depth."""
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dino_head: HeadConfig = field(default_factory=HeadConfig)
    ibot_head: IbotHeadConfig = field(default_factory=IbotHeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    init: InitConfig = field(default_factory=InitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


def width_depth_heads(model: ModelConfig) -> tuple[int, int, int]:
    """Return the backbone's (dim, depth, heads) with overrides applied."""
    base = ARCHITECTURES[model.arch]
    return model.dim or base["dim"], model.depth or base["depth"], model.heads or base["heads"]


def frees_gathered(parallel: ParallelConfig, shards: int, kind: str) -> bool:
    """Return whether a unit's gathered weights are freed between forward and backward.

    ``shards``: ranks that share it; ``kind``: of their devices, cpu or cuda.
    """
    chosen = parallel.reshard_after_forward
    return shards > 1 or kind != "cpu" if chosen is None else chosen
