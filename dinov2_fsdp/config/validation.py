"""What cannot work is said here, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from dinov2_fsdp.config.complaints import ConfigError, shown
from dinov2_fsdp.config.knobs import ARCHITECTURES, Config, width_depth_heads
from dinov2_fsdp.config.schema import defaults
from dinov2_fsdp.duration import Duration
from dinov2_fsdp.errors import UserError, nearest

_CHOICES: dict[str, Iterable[str]] = {
    "model.arch": ARCHITECTURES,
    "model.ffn": ("mlp", "swiglu"),
    "crops.blur": ("paper", "released", "none"),
    "crops.implementation": ("fast", "reference"),
    "crops.colours": ("worker", "device"),
    "loss.centering": ("softmax", "sinkhorn", "none"),
    "optim.name": ("adamw", "lars"),
    "optim.lr_scaling": ("sqrt", "linear", "none"),
    "optim.clip_scope": ("part", "all"),
    "train.precision": ("bf16", "fp16", "fp32"),
    "parallel.reduce_precision": ("fp32", "bf16"),
    "parallel.heads_precision": ("bf16", "fp16", "fp32"),
    "parallel.device": ("auto", "cuda", "cpu"),
    "parallel.attention": ("auto", "math", "sdpa", "xformers", "varlen"),
    "parallel.activation_checkpointing": ("none", "selective", "full"),
}
_DURATIONS = (
    "train.duration", "loss.teacher_temperature_warmup", "init.freeze", "optim.warmup", "optim.freeze_prototypes",
    "checkpoint.every", "checkpoint.keep_every", "log.every", "eval.every",
)  # fmt: skip
_ABOVE_ZERO = (
    "data.prefetch", "crops.global_size", "crops.local_size", "model.patch", "model.mlp_ratio", "model.dim",
    "model.depth", "model.heads", "dino_head.prototypes", "dino_head.hidden", "dino_head.bottleneck",
    "dino_head.layers", "ibot_head.prototypes", "ibot_head.hidden", "ibot_head.bottleneck", "ibot_head.layers",
    "loss.student_temperature", "loss.teacher_temperature", "loss.teacher_temperature_start",
    "loss.sinkhorn_iterations", "optim.layer_decay", "optim.patch_embed_lr", "train.batch", "train.microbatch",
    "train.max_nonfinite", "parallel.replicate", "parallel.timeout", "checkpoint.keep", "eval.resize", "eval.size",
    "eval.batch", "eval.k", "eval.temperature", "eval.classes", "parallel.blocks_per_unit", "parallel.prefetch",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "seed", "data.workers", "data.max_bad_images", "crops.local_number", "model.registers", "model.layer_scale",
    "loss.dino", "loss.ibot", "loss.koleo", "optim.lr", "optim.min_lr", "optim.weight_decay", "optim.clip",
    "train.epoch", "init.backbone_lr", "parallel.threads", "eval.max_train", "eval.max_test", "eval.first_class",
    "eval.void",
)  # fmt: skip
_SHARES = (
    "crops.flip", "crops.jitter", "crops.gray", "crops.solarize", "crops.jitter_strength", "masks.probability",
    "teacher.momentum",
)  # fmt: skip
_SHARES_BELOW_ONE = ("model.drop_path", "loss.centre_momentum", "optim.momentum", "optim.betas")
_RANGES = ("crops.global_scale", "crops.local_scale", "masks.ratio")

_LARGEST_COUNT = 2**31 - 1
_LARGEST_SEED = 2**63 - 1
_LONGEST_TIMEOUT = 1e8
"""Seconds, three years: far beyond it, the clocks of the communication libraries overflow."""
_LONGEST_DURATION = 1e15


def validate(config: Config) -> None:
    """Check every value that can be checked without data, devices or other ranks.

    Raises:
        UserError: naming the key, its value and what would be valid.
    """
    _check_each_by_itself(config)
    _check_together(config)


def _check_each_by_itself(config: Config) -> None:
    for key in defaults():
        for value in _numbers(config, key):
            if isinstance(value, float):
                _require(config, key, math.isfinite(value), "a finite number")
            else:
                largest = _LARGEST_SEED if key == "seed" else _LARGEST_COUNT
                _require(config, key, value <= largest, f"at most {largest}")
        if isinstance(text := _get(config, key), str):
            usable = text != "" and "\0" not in text and _is_unicode(text)
            _require(config, key, usable, "text, neither empty nor with zero bytes")
    for key, valid in _CHOICES.items():
        if (value := _get(config, key)) is not None and value not in valid:
            hint = nearest(value[:80], valid)
            raise ConfigError(f"{key}={shown(value)} is unknown{hint}\nvalid: {', '.join(valid)}", key)
    for key in _DURATIONS:
        try:
            # Shortened, because the error repeats it; no duration is that long.
            parsed = Duration.parse(shown(_get(config, key)))
        except UserError as error:
            raise ConfigError(f"{key}: {error}", key) from None
        _require(config, key, parsed.value <= _LONGEST_DURATION, f"at most {_LONGEST_DURATION:g}")
    duration = Duration.parse(config.train.duration)
    _require(config, "train.duration", duration.value > 0 and duration.unit != "%", "e.g. 100ep, 125000it or 2Gimg")

    for keys, holds, valid in (
        (_ABOVE_ZERO, lambda value: value > 0, "above 0"),
        (_AT_LEAST_ZERO, lambda value: value >= 0, "of at least 0"),
        (_SHARES, lambda value: 0 <= value <= 1, "between 0 and 1"),
        (_SHARES_BELOW_ONE, lambda value: 0 <= value < 1, "of at least 0 and below 1"),
    ):
        for key in keys:
            several = isinstance(_get(config, key), tuple)
            noun = "numbers" if several else "a probability" if key in _SHARES else "a number"
            _require(config, key, all(map(holds, _numbers(config, key))), f"{noun} {valid}")
    for key in _RANGES:
        low, high = _get(config, key)
        _require(config, key, 0 < low <= high <= 1, "two shares, 0 < smallest ≤ largest ≤ 1")
    _require(config, "crops.jitter_strength", config.crops.jitter_strength[3] <= 0.5, "hue ≤ 0.5")
    _require(config, "eval.k", len(config.eval.k) > 0, "at least one number, e.g. [20]")
    _require(config, "parallel.timeout", config.parallel.timeout <= _LONGEST_TIMEOUT, f"at most {_LONGEST_TIMEOUT:g}")


def _check_together(c: Config) -> None:
    for key in ("crops.global_size", "crops.local_size", "eval.size"):
        _require_multiple(c, key, "model.patch")
    _require_multiple(c, "train.batch", "train.microbatch")
    valid = f"at least eval.size ({c.eval.size})"
    _require(c, "eval.resize", c.eval.resize >= c.eval.size, valid, "eval.size")
    dim, _, heads = width_depth_heads(c.model)
    _require(c, "model.mlp_ratio", int(dim * c.model.mlp_ratio) >= 8, f"at least {8 / dim:.3g}, a width of 8")
    if dim % heads:
        message = f"model.heads={heads} is impossible; valid: a divisor of model.dim ({dim})"
        raise ConfigError(message, "model.heads", "model.dim")
    if c.crops.colours == "device" and c.crops.implementation == "reference":
        raise ConfigError(
            "crops.colours=device takes the crops of crops.implementation=fast, not of reference; "
            "use crops.implementation=fast, or crops.colours=worker",
            "crops.colours",
            "crops.implementation",
        )
    if c.loss.koleo > 0 and c.train.microbatch < 2:
        raise ConfigError(
            f"train.microbatch={c.train.microbatch}: KoLeo needs at least two images to find a neighbour; "
            "use train.microbatch=2 or more, or loss.koleo=0",
            "train.microbatch",
            "loss.koleo",
        )
    if c.init.backbone is None and Duration.parse(c.init.freeze).value > 0:
        message = f"init.freeze={c.init.freeze} would keep random weights; give init.backbone too, or init.freeze=0it"
        raise ConfigError(message, "init.freeze", "init.backbone")
    if c.loss.dino == 0 and c.loss.ibot == 0:
        message = "loss.dino=0 and loss.ibot=0 leave nothing to learn; set one of them above 0"
        raise ConfigError(message, "loss.dino", "loss.ibot")
    temperatures = ["loss.teacher_temperature"]
    if Duration.parse(c.loss.teacher_temperature_warmup).value > 0:
        temperatures.append("loss.teacher_temperature_start")
    for key in temperatures:
        if c.loss.dino > 0 and _get(c, key) >= c.loss.student_temperature:
            raise ConfigError(
                f"{key}={_get(c, key)} is not below loss.student_temperature={c.loss.student_temperature}: "
                "the teacher must be sharper than the student",
                key,
                "loss.student_temperature",
            )
    if Duration.parse(c.eval.every).value > 0:
        _require(c, "eval.test", c.eval.test is not None, "a labelled data set, since eval.every is set", "eval.every")


def microbatches_per_rank(config: Config, world_size: int) -> int:
    """Return how many microbatches each of ``world_size`` ranks runs per step.

    Raises:
        UserError: the step's microbatches cannot be shared evenly.
    """
    total = config.train.batch // config.train.microbatch
    if total % world_size:
        small = [n for n in range(1, math.isqrt(total) + 1) if total % n == 0]
        even = sorted({*small, *(total // n for n in small)})
        raise UserError(
            f"train.batch={config.train.batch} is {total} microbatches of {config.train.microbatch}, which "
            f"{world_size} processes cannot share evenly\n"
            f"valid numbers of processes: {', '.join(map(str, even[-12:]))}; or change train.batch or train.microbatch"
        )
    return total // world_size


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _numbers(config: Config, key: str) -> list[float]:
    """Return the number that a key holds, or its numbers, or nothing where it holds text or a switch."""
    value = _get(config, key)
    values = value if isinstance(value, tuple) else (value,)
    return [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]


def _require(config: Config, key: str, condition: bool, valid: str, *others: str) -> None:
    """Refuse the value of ``key`` unless ``condition`` holds; ``others`` are keys that it does not agree with."""
    if not condition:
        value = _get(config, key)
        value = list(value) if isinstance(value, tuple) else value
        raise ConfigError(f"{key}={shown(value)} is impossible; valid: {valid}", key, *others)


def _require_multiple(config: Config, key: str, of: str) -> None:
    value, unit = _get(config, key), _get(config, of)
    low = max(unit, value // unit * unit)
    _require(config, key, value % unit == 0, f"a multiple of {unit}, e.g. {low} or {low + unit}", of)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
