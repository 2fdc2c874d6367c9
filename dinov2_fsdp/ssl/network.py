"""Backbone and heads in one module: what the student and the teacher both are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dinov2_fsdp.config import Config
from dinov2_fsdp.models.factory import build_backbone, build_head
from dinov2_fsdp.models.stochastic_depth import DepthPlan


class Network(nn.Module):
    """Backbone, DINO head and, when patches have their own, iBOT head.

    Everything that a loss reads is an output of :meth:`forward`: sharded gradients reach only what hangs on a
    module's outputs.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.backbone = build_backbone(config.model, config.crops.global_size)
        self.dino_head = build_head(config.dino_head, self.backbone.embed_dim)
        separate = config.ibot_head.separate and config.loss.ibot > 0
        self.ibot_head = build_head(config.ibot_head, self.backbone.embed_dim) if separate else None

    def forward(
        self, crops: Sequence[Tensor], masks: Tensor | None, masked_patches: Tensor, plan: DepthPlan | None = None
    ) -> dict[str, Tensor]:
        """Return class-token features and logits of all crops, and logits of the chosen patches.

        Args:
            crops: one tensor ``(images, 3, height, width)`` per crop size, global crops first.
            masks: ``(global crops, patches)`` bool, the patches hidden from the network; None hides none.
            masked_patches: ``(chosen,)`` int64, positions in the flattened ``(global crops · patches)``.
            plan: stochastic depth of this pass.

        Returns:
            ``cls`` (crops, dim), normalised; ``dino`` (crops, prototypes); ``ibot`` (chosen, prototypes).
        """
        hidden = [masks, *[None] * (len(crops) - 1)]
        layout = self.backbone.layout_of(crops)
        _, length = layout.groups[0]
        prefix = self.backbone.prefix_tokens
        patches = length - prefix
        crop = torch.div(masked_patches, patches, rounding_mode="floor")
        patch_rows = crop * length + prefix + masked_patches % patches
        class_rows = layout.first_rows(masked_patches.device)
        # Only the rows that a head reads pass through the last feed-forward branch and the final norm: each acts row by
        # row. Nor need the last attention others' queries.
        chosen_rows = torch.cat([class_rows, patch_rows])
        rows = self.backbone.norm(self.backbone.forward_packed(crops, hidden, plan, chosen_rows)[0])
        counts = [len(class_rows), len(patch_rows)]
        # A sharded module must not return views; nothing here is changed in place, so the parts need not be tracked.
        cls, chosen = torch.unsafe_split_with_sizes(rows, counts)
        if self.ibot_head is None:
            dino, ibot = torch.unsafe_split_with_sizes(self.dino_head(rows), counts)
        else:
            dino, ibot = self.dino_head(cls), self.ibot_head(chosen)
        return {"cls": cls, "dino": dino, "ibot": ibot}

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Return the backbone's normalised tokens; see ``VisionTransformer.forward_features``."""
        return self.backbone.forward_features(images)
