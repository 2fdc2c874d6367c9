"""The optimizer of a run."""

from __future__ import annotations

from typing import Any

import torch

from dinov2_fsdp.errors import UserError, nearest
from dinov2_fsdp.optim.lars import LARS


def build_optimizer(
    groups: list[dict[str, Any]], name: str, betas: tuple[float, float], eps: float, momentum: float
) -> torch.optim.Optimizer:
    """Return the optimizer ``adamw`` (``betas``, ``eps``) or ``lars`` (``momentum``) over the parameter groups.

    ``groups`` come from :func:`parameter_groups`. Learning rate and weight decay are 0 until :func:`apply_step_values`
    sets them. Either optimizer reads two scalar float32 tensors from its attributes, for which a trainer that skips
    steps sets both: ``grad_scale``, by which gradients are divided, and ``found_inf``; at 1 a step changes
    nothing. It must be exactly 0 or 1: any other value makes AdamW step and miscount its steps.
    Raises UserError for another name.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)
    if name == "lars":
        return LARS(groups, momentum=momentum)
    valid = ("adamw", "lars")
    raise UserError(f"optimizer {name!r} is unknown: expected one of {', '.join(valid)}{nearest(name, valid)}")
