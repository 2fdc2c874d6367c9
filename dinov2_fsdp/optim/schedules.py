"""What the optimizer and the teacher are told at each step: learning rates, weight decay, momentum, temperature.

Everything is a pure function of the step ``t``, the number of steps done before it: the first step has t = 0, the last
t = total − 1. The convention is that of the published DINOv2 runs: a warm-up of n steps is n evenly spaced values that
include both its ends; a cosine over n steps is sampled at 0/n … (n−1)/n, so that the last step is one sample short of
``end``; from t = total on the value is ``end``.

The ramps are fvcore's. Its ``CompositeParamScheduler`` is not used: it finds the segment from a fraction of the run
with a tolerance of 1e-6, which is most of a step in a run of 625,000 and moves the end of a warm-up.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fvcore.common.param_scheduler import CosineParamScheduler, LinearParamScheduler

from dinov2_fsdp.errors import UserError, nearest

LearningRateRule = Literal["sqrt", "linear", "none"]


@dataclass(frozen=True)
class Constant:
    """``value`` at every step."""

    value: float

    def __call__(self, step: int) -> float:
        return self.value


@dataclass(frozen=True)
class Linear:
    """``steps`` evenly spaced values from ``start`` to ``end``, both included, then ``end``."""

    start: float
    end: float
    steps: int

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        return float(LinearParamScheduler(self.start, self.end)(step / max(1, self.steps - 1)))


@dataclass(frozen=True)
class Frozen:
    """0 for ``steps`` steps, then ``value``."""

    value: float
    steps: int

    def __call__(self, step: int) -> float:
        return self.value if step >= self.steps else 0.0


@dataclass(frozen=True)
class Cosine:
    """Zero for ``freeze`` steps, ``warmup`` linear steps to ``start``, half a cosine towards ``end``, then ``end``.

    Over the n = total − freeze − warmup steps of the cosine the value is
    end + (start − end)/2 · (1 + cos(πi/n)), i = 0 … n − 1 (SGDR, arXiv 1608.03983, eq. 5).
    Raises UserError if freeze and warm-up do not fit into ``total``.
    """

    start: float
    end: float
    total: int
    warmup: int = 0
    warmup_start: float = 0.0
    freeze: int = 0

    def __post_init__(self) -> None:
        if self.freeze + self.warmup > self.total:
            before = f"{self.warmup} warm-up" + (f" and {self.freeze} frozen" if self.freeze else "")
            keys = "optim.warmup, init.freeze" if self.freeze else "optim.warmup"
            raise UserError(
                f"{before} steps do not fit into a run of {self.total} steps; "
                f"shorten them ({keys}), or give them as a part of the run, "
                "such as optim.warmup=5%"
            )

    def __call__(self, step: int) -> float:
        if step >= self.total:
            return self.end
        if step < self.freeze:
            return 0.0
        step -= self.freeze
        if step < self.warmup:
            return Linear(self.warmup_start, self.start, self.warmup)(step)
        where = (step - self.warmup) / (self.total - self.freeze - self.warmup)
        return float(CosineParamScheduler(self.start, self.end)(where))


@dataclass(frozen=True)
class StepValues:
    """The scheduled values of one step; rates and weight decay are before the parameter groups' multipliers."""

    learning_rate: float
    prototype_learning_rate: float
    """``learning_rate``, or 0 while the prototypes are frozen."""
    weight_decay: float
    teacher_momentum: float
    teacher_temperature: float
    backbone_factor: float = 1.0
    """Further factor on the backbone's learning rate; 0 while it is frozen."""


@dataclass(frozen=True)
class Schedules:
    """All schedules of a run; calling it with a step gives that step's :class:`StepValues`."""

    learning_rate: Cosine
    weight_decay: Cosine
    teacher_momentum: Cosine
    teacher_temperature: Linear
    freeze_prototypes_steps: int
    backbone_factor: Frozen

    def __call__(self, step: int) -> StepValues:
        learning_rate = self.learning_rate(step)
        return StepValues(
            learning_rate=learning_rate,
            # The frozen steps are cut out of the schedule, not put before it: afterwards both rates are the same.
            prototype_learning_rate=0.0 if step < self.freeze_prototypes_steps else learning_rate,
            weight_decay=self.weight_decay(step),
            teacher_momentum=self.teacher_momentum(step),
            teacher_temperature=self.teacher_temperature(step),
            backbone_factor=self.backbone_factor(step),
        )


def build_schedules(
    *,
    total_steps: int,
    warmup_steps: int,
    learning_rate: float,
    min_learning_rate: float,
    weight_decay: float,
    weight_decay_end: float,
    teacher_momentum: float,
    teacher_momentum_end: float,
    teacher_temperature_start: float,
    teacher_temperature: float,
    teacher_temperature_warmup_steps: int,
    freeze_prototypes_steps: int,
    freeze_backbone_steps: int = 0,
    backbone_learning_rate: float = 1.0,
) -> Schedules:
    """Return the schedules of a run (DINOv2, arXiv 2304.07193, appendix B).

    Lengths are in steps; ``learning_rate`` is the peak, already scaled to the batch (:func:`scaled_learning_rate`). The
    temperature's warm-up and the frozen steps may be longer than the run. Raises UserError if the warm-up is.
    A run that continues a trained backbone keeps it as it is for ``freeze_backbone_steps`` while the heads learn to
    read it, then trains it with ``backbone_learning_rate`` times the others' rate.
    """
    return Schedules(
        learning_rate=Cosine(learning_rate, min_learning_rate, total_steps, warmup=warmup_steps),
        weight_decay=Cosine(weight_decay, weight_decay_end, total_steps),
        teacher_momentum=Cosine(teacher_momentum, teacher_momentum_end, total_steps),
        teacher_temperature=Linear(teacher_temperature_start, teacher_temperature, teacher_temperature_warmup_steps),
        freeze_prototypes_steps=freeze_prototypes_steps,
        backbone_factor=Frozen(backbone_learning_rate, freeze_backbone_steps),
    )


def scaled_learning_rate(base: float, global_batch: int, rule: LearningRateRule) -> float:
    """Return the peak learning rate: base·√(batch/1024) (DINOv2), base·batch/256 (DINO), or ``base`` unchanged."""
    if rule == "sqrt":
        return base * math.sqrt(global_batch / 1024)
    if rule == "linear":
        return base * global_batch / 256
    if rule == "none":
        return base
    valid = ("sqrt", "linear", "none")
    raise UserError(
        f"learning rate scaling {rule!r} is unknown: expected one of {', '.join(valid)}{nearest(rule, valid)}"
    )
