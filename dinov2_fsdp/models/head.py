"""The projection head: MLP, bottleneck, L2 normalisation, weight-normalised prototypes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fsdp.models.products import Linear, linear


class BatchNorm(nn.BatchNorm1d):
    """Batch normalisation with the statistics of the rows at hand, in training and evaluation alike.

    It keeps no running statistics, so a head has no state that ranks could disagree on. Fewer than two rows have
    no variance: they pass with the affine part alone.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, track_running_stats=False)

    def forward(self, rows: Tensor) -> Tensor:
        if rows.shape[0] < 2:
            return rows * self.weight + self.bias
        return super().forward(rows)


class Prototypes(nn.Module):
    """Linear layer without bias whose rows are ``gain · direction / ‖direction‖`` (weight norm, 1602.07868)."""

    def __init__(self, dim: int, prototypes: int, fixed_gain: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.empty(prototypes, 1), requires_grad=not fixed_gain)
        self.weight_v = nn.Parameter(torch.empty(prototypes, dim))

    def forward(self, rows: Tensor) -> Tensor:
        direction = self.weight_v.float()
        weight = direction * (self.weight_g.float() / direction.norm(dim=1, keepdim=True))
        return linear(rows, weight.to(rows.dtype))


class ProjectionHead(nn.Module):
    """DINO's head (arXiv 2104.14294, appendix C), with the variants that its successors use.

    Args:
        dim: width of the backbone.
        prototypes: outputs. hidden, bottleneck, layers: shape of the MLP.
        batch_norm: BatchNorm after every hidden linear layer.
        layer_norm: LayerNorm between the bottleneck and the L2 normalisation.
        fixed_gain: keep the prototypes' gain at its initial 1.
    """

    def __init__(
        self,
        dim: int,
        prototypes: int,
        hidden: int = 2048,
        bottleneck: int = 256,
        layers: int = 3,
        batch_norm: bool = False,
        layer_norm: bool = False,
        fixed_gain: bool = False,
    ) -> None:
        super().__init__()
        widths = [dim, *[hidden] * (layers - 1), bottleneck]
        modules: list[nn.Module] = []
        for index in range(layers):
            modules.append(Linear(widths[index], widths[index + 1]))
            if index < layers - 1:
                if batch_norm:
                    modules.append(BatchNorm(hidden))
                modules.append(nn.GELU())
        self.mlp = nn.Sequential(*modules)
        self.norm = nn.LayerNorm(bottleneck) if layer_norm else nn.Identity()
        self.last_layer = Prototypes(bottleneck, prototypes, fixed_gain)

    def forward(self, rows: Tensor) -> Tensor:
        """Return the logits ``(rows, prototypes)`` of features ``(rows, dim)``."""
        bottleneck = self.norm(self.mlp(rows))
        return self.last_layer(F.normalize(bottleneck.float(), dim=-1).to(bottleneck.dtype))
