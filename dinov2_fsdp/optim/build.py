"""The optimizer of a run."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp.errors import UserError, nearest
from dinov2_fsdp.native import Library, is_row_of_fp32, parallel_library
from dinov2_fsdp.optim.clip import local_shard
from dinov2_fsdp.optim.lars import LARS


class CpuAdamW(torch.optim.AdamW):
    """AdamW for CPUs that reads ``grad_scale`` and ``found_inf`` as the fused one does.

    torch's fused CPU kernel rounds the last elements of a tensor, which do not fill a vector, otherwise than the ones
    before: where a parameter is cut into shards would show in its bits. Compiled code (:mod:`dinov2_fsdp.native`)
    rounds all alike, and leaves gradients as they are; where it is missing, torch takes one operation after the other,
    and divides the gradients themselves by ``grad_scale``.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        grad_scale, found_inf = self.grad_scale, self.found_inf
        if found_inf is not None and bool(found_inf):
            return None
        with_grad = [(group, p, p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        shards, library = [local_shard(grad) for _, _, grad in with_grad], parallel_library()
        plain = not any(g["amsgrad"] or g["maximize"] or g["differentiable"] for g in self.param_groups)
        plain &= all(self._fits(p, shard) for (_, p, _), shard in zip(with_grad, shards, strict=True))
        if closure is None and plain and library:
            scale = 1.0 if grad_scale is None else float(grad_scale)
            for group, parameter, grad in with_grad:
                self._step_of(parameter, grad, group, scale, library)
            return None
        if grad_scale is not None:
            torch._foreach_div_(shards, grad_scale)
        self.grad_scale = self.found_inf = None  # the parent refuses both
        try:
            return super().step(closure)
        finally:
            self.grad_scale, self.found_inf = grad_scale, found_inf

    def _fits(self, parameter: Tensor, grad_shard: Tensor) -> bool:
        """Return whether compiled code takes these."""
        state = self.state.get(parameter, {})
        moments = [local_shard(state[name]) for name in ("exp_avg", "exp_avg_sq") if name in state]
        return all(
            is_row_of_fp32(tensor) and tensor.shape == grad_shard.shape
            for tensor in (grad_shard, local_shard(parameter), *moments)
        )

    def _step_of(self, parameter: Tensor, grad: Tensor, group: dict[str, Any], scale: float, library: Library) -> None:
        state = self.state[parameter]
        if not state:  # as the parent begins
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["step"] += 1
        steps, rate, (beta1, beta2) = float(state["step"]), float(group["lr"]), group["betas"]
        tensors = [local_shard(t) for t in (parameter, grad, state["exp_avg"], state["exp_avg_sq"])]
        kept, correction = 1 - rate * group["weight_decay"], math.sqrt(1 - beta2**steps)
        numbers = (scale, kept, 1 - beta1, beta2, 1 - beta2, rate / (1 - beta1**steps), correction, group["eps"])
        library.adamw(*(tensor.data_ptr() for tensor in tensors), tensors[0].numel(), *numbers)


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
        adamw, kernel = (CpuAdamW, {"foreach": True}) if on_cpu else (torch.optim.AdamW, {"fused": True})
        return adamw(groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, **kernel)
    if name == "lars":
        return LARS(groups, momentum=momentum)
    valid = ("adamw", "lars")
    raise UserError(f"optimizer {name!r} is unknown: expected one of {', '.join(valid)}{nearest(name, valid)}")
