"""The optimizer of a run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp.errors import UserError, nearest
from dinov2_fsdp.optim.clip import local_shard
from dinov2_fsdp.optim.lars import LARS


class UnfusedAdamW(torch.optim.AdamW):
    """AdamW that reads ``grad_scale`` and ``found_inf`` as the fused one does, for CPUs.

    The fused CPU kernel rounds the last elements of a tensor, which do not fill a vector, otherwise than the ones
    before: where a parameter is cut into shards would show in its bits.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        grad_scale, found_inf = self.grad_scale, self.found_inf
        if found_inf is not None and bool(found_inf):
            return None
        if grad_scale is not None:
            shards = [local_shard(p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
            torch._foreach_div_(shards, grad_scale)
        self.grad_scale = self.found_inf = None  # the parent refuses both
        try:
            return super().step(closure)
        finally:
            self.grad_scale, self.found_inf = grad_scale, found_inf


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
        on_cpu = all(parameter.device.type == "cpu" for group in groups for parameter in group["params"])
        adamw, kernel = (UnfusedAdamW, {"foreach": True}) if on_cpu else (torch.optim.AdamW, {"fused": True})
        return adamw(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, **kernel)
    if name == "lars":
        return LARS(groups, momentum=momentum)
    valid = ("adamw", "lars")
    raise UserError(f"optimizer {name!r} is unknown: expected one of {', '.join(valid)}{nearest(name, valid)}")
