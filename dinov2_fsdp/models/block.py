"""The transformer block: attention and feed-forward, pre-norm, LayerScale, stochastic depth."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fsdp.models.attention import Attention
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import Subset, add_residual

LAYER_NORM_EPS = 1e-6


class LayerScale(nn.Module):
    """Learnt factor per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.gamma


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202), its hidden width two thirds of ``hidden``, rounded up to eights."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = swiglu_width(hidden)
        self.w12 = nn.Linear(dim, 2 * width)
        self.w3 = nn.Linear(width, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        gate, value = self.w12(tokens).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def swiglu_width(hidden: int) -> int:
    """Return SwiGLU's hidden width for an MLP of width ``hidden``, so that both have about as many parameters."""
    return (int(hidden * 2 / 3) + 7) // 8 * 8


class Block(nn.Module):
    """One pre-norm transformer block over packed sequences."""

    def __init__(self, dim: int, heads: int, mlp_hidden: int, ffn: str, layer_scale: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attn = Attention(dim, heads)
        self.ls1 = LayerScale(dim) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.mlp = {"mlp": Mlp, "swiglu": SwiGLU}[ffn](dim, mlp_hidden)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(
        self, tokens: Tensor, layout: Layout, attention_subset: Subset | None = None, ffn_subset: Subset | None = None
    ) -> Tensor:
        """Return ``(total_tokens, dim)``; each branch runs on its subset of the sequences, or on all."""
        tokens = add_residual(tokens, layout, self._attention_branch, attention_subset)
        return add_residual(tokens, layout, self._ffn_branch, ffn_subset)

    def _attention_branch(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.ls1(self.attn(self.norm1(tokens), layout))

    def _ffn_branch(self, tokens: Tensor, layout: Layout) -> Tensor:
        return self.ls2(self.mlp(self.norm2(tokens)))
