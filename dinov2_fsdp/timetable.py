"""When things are due in a run, and which values its schedules take: durations and schedules in steps."""

from __future__ import annotations

from dataclasses import dataclass

from dinov2_fsdp.config import Config
from dinov2_fsdp.duration import Duration
from dinov2_fsdp.optim.schedules import Schedules, build_schedules, scaled_learning_rate


@dataclass(frozen=True)
class Lengths:
    """A run's durations in steps."""

    total: int
    epoch: int
    log: int
    checkpoint: int
    keep: int
    evaluation: int


def lengths(config: Config, images: int) -> Lengths:
    """Return a config's durations in steps, for a data set of ``images``."""
    epoch = config.train.epoch or max(1, images // config.train.batch)
    total = Duration.parse(config.train.duration).steps(config.train.batch, epoch, None)

    def steps(text: str) -> int:
        return Duration.parse(text).steps(config.train.batch, epoch, total)

    return Lengths(
        total,
        epoch,
        max(1, steps(config.log.every)),
        steps(config.checkpoint.every),
        steps(config.checkpoint.keep_every),
        steps(config.eval.every),
    )


def schedules(config: Config, length: Lengths) -> Schedules:
    """Return the schedules of a run."""

    def steps(text: str) -> int:
        return Duration.parse(text).steps(config.train.batch, length.epoch, length.total)

    return build_schedules(
        total_steps=length.total,
        warmup_steps=steps(config.optim.warmup),
        learning_rate=scaled_learning_rate(config.optim.lr, config.train.batch, config.optim.lr_scaling),  # type: ignore[arg-type]
        min_learning_rate=config.optim.min_lr,
        weight_decay=config.optim.weight_decay[0],
        weight_decay_end=config.optim.weight_decay[1],
        teacher_momentum=config.teacher.momentum[0],
        teacher_momentum_end=config.teacher.momentum[1],
        teacher_temperature_start=config.loss.teacher_temperature_start,
        teacher_temperature=config.loss.teacher_temperature,
        teacher_temperature_warmup_steps=steps(config.loss.teacher_temperature_warmup),
        freeze_backbone_steps=steps(config.init.freeze),
        backbone_learning_rate=config.init.backbone_lr,
        freeze_prototypes_steps=steps(config.optim.freeze_prototypes),
    )
