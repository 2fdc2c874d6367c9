"""What a config adds up to: parameters, floating-point operations, bytes of its states. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from dinov2_fsdp.config import ARCHITECTURES, Config, HeadConfig, width_depth_heads

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


def ffn_widths(config: Config) -> tuple[int, int]:
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
    second_in, first_out = ffn_widths(config)
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


def tokens_of(config: Config, size: int) -> int:
    """Return the tokens of a crop of so many pixels on a side: class token, registers, patches."""
    return 1 + config.model.registers + (size // config.model.patch) ** 2


def forward_flops(config: Config, size: int, drop: float = 0.0) -> float:
    """Return the floating-point operations (two per multiply-add) of the backbone's products on one image."""
    model = config.model
    dim, depth, _ = width_depth_heads(model)
    second_in, first_out = ffn_widths(config)
    patches, tokens = (size // model.patch) ** 2, tokens_of(config, size)
    per_block = 2 * tokens * (4 * dim * dim + dim * first_out + second_in * dim) + 4 * tokens * tokens * dim
    return 2 * patches * 3 * model.patch**2 * dim + depth * per_block * (1 - drop)


def _head_flops(head: HeadConfig, dim: int) -> float:
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck, head.prototypes]
    return 2.0 * sum(a * b for a, b in pairwise(widths))


def masked_patches(config: Config) -> float:
    """Return how many patches of one image's global crops are masked, on average."""
    if config.loss.ibot == 0:
        return 0.0
    patches = (config.crops.global_size // config.model.patch) ** 2
    return 2 * config.masks.probability * sum(config.masks.ratio) / 2 * patches


def step_flops_per_image(config: Config) -> float:
    """Return the useful operations of one training step per image: teacher forward, student forward and backward.

    Stochastic depth counts as executed. A backward pass is two forward passes. The last block's feed-forward part sees
    only the tokens that a head reads, nor does its attention need other queries; where it has them all the same
    (:mod:`dinov2_fsdp.models.read_attention`), these do not count.
    """
    crops, dim = config.crops, width_depth_heads(config.model)[0]
    drop = config.model.drop_path
    masked = masked_patches(config)
    dino = _head_flops(config.dino_head, dim)
    ibot = _head_flops(config.ibot_head if config.ibot_head.separate else config.dino_head, dim)
    student = (
        2 * forward_flops(config, crops.global_size, drop)
        + crops.local_number * forward_flops(config, crops.local_size, drop)
        + (2 + crops.local_number) * dino
        + masked * ibot
    )
    teacher = 2 * forward_flops(config, crops.global_size) + 2 * dino + masked * ibot
    large, small = (tokens_of(config, size) for size in (crops.global_size, crops.local_size))
    per_token = 2 * dim * sum(ffn_widths(config))
    teacher -= per_token * (2 * large - (2 + masked))
    student -= per_token * ((1 - drop) * (2 * large + crops.local_number * small) - (2 + crops.local_number + masked))
    # A token's query, its scores and what these gather, and its projection.
    of_large, of_small = (4 * dim * (dim + length) for length in (large, small))
    in_large, in_small = of_large * (2 * large - (2 + masked)), of_small * crops.local_number * (small - 1)
    teacher -= in_large
    student -= (1 - drop) * (in_large + in_small)
    return teacher + 3 * student


def state_bytes(config: Config) -> dict[str, int]:
    """Return the bytes of everything that is sharded over ranks: weights, teacher, gradients, optimizer (fp32)."""
    total = count_parameters(config).total
    optimizer = {"adamw": "AdamW", "lars": "LARS"}[config.optim.name]
    return {name: total * BYTES_PER_WEIGHT[name] for name in ("student", "teacher", "gradients", optimizer)}
