"""What the loader hands to the step: the crops and masks of one microbatch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp.data.device_colours import ColourPlan

IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Microbatch:
    """One microbatch of ``B`` images. Crops are crop-major: row ``c·B + i`` is crop ``c`` of image ``i``.

    Attributes:
        step, index: the step, and the microbatch's number within it, counted over all ranks.
        global_crops: ``(2·B, 3, S, S)`` uint8. local_crops: ``(n·B, 3, s, s)`` uint8.
        masks: ``(2·B, patches)`` bool, hidden from the student.
        masked_patches: ``(masked,)`` int64, positions of the hidden patches in the flattened masks.
        mask_weights: ``(masked,)`` float32, one over the masked patches of the patch's crop.
        samples: ``(B,)`` int64, the images' indices in the data set.
        bad: (name, reason) of every unreadable image that was replaced.
        global_colours, local_colours: what :meth:`coloured` has still to do; None with finished crops.
    """

    step: int
    index: int
    global_crops: Tensor
    local_crops: Tensor
    masks: Tensor
    masked_patches: Tensor
    mask_weights: Tensor
    samples: Tensor
    bad: tuple[tuple[str, str], ...] = ()
    global_colours: ColourPlan | None = None
    local_colours: ColourPlan | None = None

    @property
    def images(self) -> int:
        return self.global_crops.shape[0] // 2

    def to(self, device: torch.device) -> Microbatch:
        """Return the microbatch on ``device``; copies from pinned memory do not wait."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Microbatch:
        """Return the microbatch in pinned memory; torch's loader calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def coloured(self) -> Microbatch:
        """Return the microbatch with finished crops, coloured where they lie: this one must not be used any more."""
        if self.global_colours is None or self.local_colours is None:
            return self
        self.global_colours.apply_(self.global_crops)
        self.local_colours.apply_(self.local_crops)
        return replace(self, global_colours=None, local_colours=None)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Microbatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: function(v) for name, v in values.items() if isinstance(v, Tensor)}
        changed |= {name: v.map(function) for name, v in values.items() if isinstance(v, ColourPlan)}
        return replace(self, **changed)

    def normalised_globals(self) -> Tensor:
        return normalise(self.global_crops)

    def normalised_locals(self) -> Tensor:
        return normalise(self.local_crops)


def normalise(images: Tensor) -> Tensor:
    """Return uint8 images ``(…, 3, height, width)`` as float32 with ImageNet's mean and deviation taken out."""
    mean, factor = _statistics(images.device)
    return (images.float() - mean) * factor


@functools.lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    mean = torch.tensor(IMAGE_MEAN, device=device)[:, None, None] * 255
    factor = 1 / (torch.tensor(IMAGE_STD, device=device)[:, None, None] * 255)
    return mean, factor
