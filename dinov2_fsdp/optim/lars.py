"""LARS: momentum SGD whose update is scaled, layer by layer, to the size of the weights (arXiv 1708.03888)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp.optim.clip import local_shard, square_sums


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling, in the form that SimCLR, BYOL and DINO use.

    For a parameter w with gradient g, momentum m, trust coefficient η and weight decay λ::

        u = g + λ w
        u = u · η ‖w‖ / ‖u‖        (left out where either norm is 0)
        v = m v + u
        w = w − lr v

    1-D parameters (biases, norms, LayerScale) get neither weight decay nor scaling. Norms are of the whole parameter,
    however it is sharded, and cost one all-reduce a step.

    As with ``AdamW(fused=True)``, two attributes hold for the next step if set: ``grad_scale``, a scalar tensor by
    which gradients are divided, and ``found_inf``, a scalar tensor that, if not 0, leaves parameters and momentum as
    they are. Both stay on the device; there is no host sync.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(
        self,
        params: Any,
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        self.trust_coefficient = trust_coefficient
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and its momentum, which exists from the start so that a checkpoint of step 0 has it too."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter, requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients in ``.grad`` and return what ``closure`` does, if given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        active = [
            (group, parameters)
            for group in self.param_groups
            if (parameters := [p for p in group["params"] if p.grad is not None])
        ]
        updates = [self._decayed_gradients(group, parameters) for group, parameters in active]
        self._adapt(active, updates)
        keep = None if self.found_inf is None else self.found_inf == 0
        for (group, parameters), update in zip(active, updates, strict=True):
            buffers = [local_shard(self.state[p]["momentum_buffer"]) for p in parameters]
            weights = [local_shard(p) for p in parameters]
            torch._foreach_add_(update, buffers, alpha=group["momentum"])
            _assign(buffers, update, keep)
            _assign(weights, list(torch._foreach_add(weights, buffers, alpha=-group["lr"])), keep)
        return loss

    def _decayed_gradients(self, group: dict[str, Any], parameters: list[Tensor]) -> list[Tensor]:
        """Return new local shards of g/grad_scale + λ w, λ only for parameters of two or more dimensions."""
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            update = local_shard(parameter.grad).to(parameter.dtype, copy=True)
            if self.grad_scale is not None:
                update.div_(self.grad_scale)
            if parameter.ndim > 1:
                update.add_(local_shard(parameter), alpha=group["weight_decay"])
            updates.append(update)
        return updates

    def _adapt(self, active: list[tuple[dict[str, Any], list[Tensor]]], updates: list[list[Tensor]]) -> None:
        """Scale the updates of parameters of two or more dimensions by η ‖w‖ / ‖u‖, in place."""
        adapted = [
            (parameter, update)
            for (_, parameters), group_updates in zip(active, updates, strict=True)
            for parameter, update in zip(parameters, group_updates, strict=True)
            if parameter.ndim > 1
        ]
        if not adapted:
            return
        parameters = [parameter for parameter, _ in adapted]
        shards = [update for _, update in adapted]
        norms = square_sums([local_shard(p) for p in parameters] + shards, parameters + parameters).sqrt()
        weight_norm, update_norm = norms.chunk(2)
        ratio = self.trust_coefficient * weight_norm / update_norm
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), ratio, 1.0)
        torch._foreach_mul_(shards, list(ratio.to(shards[0].dtype).unbind()))


def _assign(old: list[Tensor], new: list[Tensor], keep: Tensor | None) -> None:
    """Copy ``new`` into ``old``, or leave ``old`` as it is, bit for bit, where the scalar ``keep`` is false."""
    if keep is not None:
        new = [torch.where(keep, n, o) for n, o in zip(new, old, strict=True)]
    torch._foreach_copy_(old, new)
