"""Loss scaling for fp16, without a host sync and the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dinov2_fsdp.optim.clip import local_shard


class LossScaler:
    """Dynamic loss scale (arXiv 1710.03740, section 3.2): halved after an overflow, doubled after 2000 good steps.

    Disabled, it multiplies by one.
    """

    def __init__(self, enabled: bool, device: torch.device, initial: float = 2.0**15, interval: int = 2000) -> None:
        self.enabled, self.interval = enabled, interval
        self.scale = torch.tensor(initial if enabled else 1.0, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int32, device=device)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return the loss that the backward pass starts from."""
        return loss * self.scale if self.enabled else loss

    @torch.no_grad()
    def unscale_(self, grads_by_part: Mapping[str, Sequence[Tensor]]) -> None:
        """Divide the gradients by the scale, in place."""
        if self.enabled:
            for grads in grads_by_part.values():
                torch._foreach_mul_([local_shard(grad) for grad in grads], 1 / self.scale)

    def update(self, skipped: Tensor) -> None:
        """Adapt the scale to the step that was or was not skipped; ``skipped`` is 0 or 1, the same on every rank."""
        if self.enabled:
            torch._amp_update_scale_(self.scale, self.good_steps, skipped, 2.0, 0.5, self.interval)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds, and fills on loading."""
        return {"scaler.scale": self.scale, "scaler.good_steps": self.good_steps}
