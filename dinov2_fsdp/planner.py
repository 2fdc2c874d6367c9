"""What a run will take, before it starts: parameters, floating-point operations, memory for its states. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from dinov2_fsdp.config import ARCHITECTURES, Config, HeadConfig, microbatches_per_rank, width_depth_heads
from dinov2_fsdp.duration import Duration
from dinov2_fsdp.optim.schedules import scaled_learning_rate

GIB = 2**30
BYTES_PER_WEIGHT = {"student": 4, "teacher": 4, "gradients": 4, "AdamW": 8, "LARS": 4}


@dataclass(frozen=True)
class Parameters:
    """Counts of one network's parameters."""

    backbone: int
    dino_head: int
    ibot_head: int

    @property
    def total(self) -> int:
        return self.backbone + self.dino_head + self.ibot_head


def _ffn_widths(config: Config) -> tuple[int, int]:
    """Return the widths (in of the second, out of the first) of the feed-forward part."""
    dim, _, _ = width_depth_heads(config.model)
    hidden = int(dim * config.model.mlp_ratio)
    if (config.model.ffn or ARCHITECTURES[config.model.arch]["ffn"]) == "mlp":
        return hidden, hidden
    width = (int(hidden * 2 / 3) + 7) // 8 * 8
    return width, 2 * width


def count_parameters(config: Config) -> Parameters:
    """Return the parameters of the student (and of the teacher, which has as many)."""
    model = config.model
    dim, depth, _ = width_depth_heads(model)
    second_in, first_out = _ffn_widths(config)
    attention = dim * 3 * dim + 3 * dim + dim * dim + dim
    ffn = dim * first_out + first_out + second_in * dim + dim
    norms_and_scales = 4 * dim + (2 * dim if model.layer_scale > 0 else 0)
    grid = config.crops.global_size // model.patch
    embeddings = 3 * model.patch**2 * dim + dim + dim * (1 + grid**2) + dim * (2 + model.registers)
    backbone = embeddings + depth * (attention + ffn + norms_and_scales) + 2 * dim
    separate = config.ibot_head.separate and config.loss.ibot > 0
    return Parameters(backbone, _head(config.dino_head, dim), _head(config.ibot_head, dim) if separate else 0)


def _head(head: HeadConfig, dim: int) -> int:
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
    linear = sum(a * b + b for a, b in pairwise(widths))
    norms = (head.layers - 1) * 2 * head.hidden * head.batch_norm + 2 * head.bottleneck * head.layer_norm
    return linear + norms + head.prototypes * (head.bottleneck + 1)


def forward_flops(config: Config, size: int, drop: float = 0.0) -> float:
    """Return the floating-point operations (two per multiply-add) of the backbone's products on one image."""
    model = config.model
    dim, depth, _ = width_depth_heads(model)
    second_in, first_out = _ffn_widths(config)
    patches = (size // model.patch) ** 2
    tokens = patches + 1 + model.registers
    per_block = 2 * tokens * (4 * dim * dim + dim * first_out + second_in * dim) + 4 * tokens * tokens * dim
    return 2 * patches * 3 * model.patch**2 * dim + depth * per_block * (1 - drop)


def _head_flops(head: HeadConfig, dim: int) -> float:
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return 2.0 * sum(a * b for a, b in pairwise(widths))


def step_flops_per_image(config: Config) -> float:
    """Return the useful operations of one training step per image: teacher forward, student forward and backward.

    Stochastic depth counts as executed. A backward pass is two forward passes.
    """
    crops, dim = config.crops, width_depth_heads(config.model)[0]
    drop = config.model.drop_path
    patches = (crops.global_size // config.model.patch) ** 2
    masked = 2 * config.masks.probability * sum(config.masks.ratio) / 2 * patches if config.loss.ibot > 0 else 0.0
    dino = _head_flops(config.dino_head, dim)
    ibot = _head_flops(config.ibot_head if config.ibot_head.separate else config.dino_head, dim)
    student = (
        2 * forward_flops(config, crops.global_size, drop)
        + crops.local_number * forward_flops(config, crops.local_size, drop)
        + (2 + crops.local_number) * dino
        + masked * ibot
    )
    teacher = 2 * forward_flops(config, crops.global_size) + 2 * dino + masked * ibot
    return teacher + 3 * student


def state_bytes(config: Config) -> dict[str, int]:
    """Return the bytes of everything that is sharded over ranks: weights, teacher, gradients, optimizer (fp32)."""
    total = count_parameters(config).total
    optimizer = {"adamw": "AdamW", "lars": "LARS"}[config.optim.name]
    return {name: total * BYTES_PER_WEIGHT[name] for name in ("student", "teacher", "gradients", optimizer)}


def plan(config: Config, processes: int, kind: str, images: int | None) -> str:
    """Return the plan of a run, for people.

    Args:
        processes: ranks. kind: ``cpu`` or ``cuda``. images: size of the data set, None where nobody has counted.
    """
    parameters = count_parameters(config)
    per_rank = microbatches_per_rank(config, processes)
    epoch = config.train.epoch or max(1, (images or 0) // config.train.batch)
    known = images is not None or config.train.epoch > 0
    duration, warming = Duration.parse(config.train.duration), Duration.parse(config.optim.warmup)
    total = duration.steps(config.train.batch, epoch, None)
    warmup = f"{warming.steps(config.train.batch, epoch, total):,} steps" if known else str(warming)
    rate = scaled_learning_rate(config.optim.lr, config.train.batch, config.optim.lr_scaling)  # type: ignore[arg-type]
    states = state_bytes(config)
    shards = max(1, processes // config.parallel.replicate)
    flops = step_flops_per_image(config)
    lines = {
        "run directory": config.output_dir,
        "data": config.data.train if images is None else f"{config.data.train}: {images:,} images",
        "backbone": f"{config.model.arch}/{config.model.patch}, {parameters.backbone / 1e6:.1f} M parameters",
        "heads": f"DINO {parameters.dino_head / 1e6:.1f} M, iBOT "
        + (f"{parameters.ibot_head / 1e6:.1f} M" if parameters.ibot_head else "shared"),
        "processes": f"{processes} on {kind}, {shards} shards × {config.parallel.replicate}",
        "step": f"{config.train.batch} images = {processes} processes × {per_rank} microbatches "
        f"× {config.train.microbatch}",
        "length": f"{total:,} steps = {total * config.train.batch:,} images"
        + (f" = {total * config.train.batch / images:,.1f} passes over the data" if images else "")
        + f"; `ep` counts {epoch:,} steps"
        if known
        else f"{duration}, in steps once the data is counted",
        "learning rate": f"{rate:.3g} after {warmup} of warm-up",
        "operations": f"{flops / 1e9:,.1f} GFLOP per image"
        + (f", {flops * config.train.batch * total / 1e15:,.3g} PFLOP in all" if known else ""),
        "states per process": ", ".join(f"{name} {size / shards / GIB:.2f} GiB" for name, size in states.items())
        + f"; {sum(states.values()) / shards / GIB:.2f} GiB, activations and logits not counted",
    }
    width = max(map(len, lines))
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines.items())
