"""The transformer block: attention and feed-forward, pre-norm, LayerScale, stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_fsdp.models import frugal_attention
from dinov2_fsdp.models.attention import Attention
from dinov2_fsdp.models.branches import Chosen
from dinov2_fsdp.models.frugal import feed_forward, feed_forward_onto, norm_linear, scaled_linear
from dinov2_fsdp.models.frugal_attention import attention_branch, attention_onto
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.read_attention import attention_read
from dinov2_fsdp.models.stochastic_depth import Subset, add_residual, add_residual_to

LAYER_NORM_EPS = 1e-6


class LayerScale(nn.Module):
    """Learnt factor per channel on a residual branch (arXiv 2103.17239)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))


class Mlp(nn.Module):
    """Two linear layers around a GELU."""

    activation = "gelu"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The layers before and after the activation."""
        return self.fc1, self.fc2


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv 2002.05202), its hidden width two thirds of ``hidden``, rounded up to eights."""

    activation = "swiglu"

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        width = swiglu_width(hidden)
        self.w12 = nn.Linear(dim, 2 * width)
        self.w3 = nn.Linear(width, dim)

    @property
    def linears(self) -> tuple[nn.Linear, nn.Linear]:
        """The layers before and after the activation."""
        return self.w12, self.w3


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
        self.mlp = SwiGLU(dim, mlp_hidden) if ffn == "swiglu" else Mlp(dim, mlp_hidden)
        self.ls2 = LayerScale(dim) if layer_scale else nn.Identity()

    def forward(
        self,
        tokens: Tensor,
        layout: Layout,
        attention_subset: Subset | None = None,
        ffn_subset: Subset | None = None,
        rows: Tensor | None = None,
    ) -> Tensor:
        """Return ``(total_tokens, dim)``; each branch runs on its subset of the sequences, or on all.

        ``rows``: ``(chosen,)`` int64, the tokens to return, ``(chosen, dim)``; the feed-forward branch sees no other,
        nor, where compiled code allows it, do the attention's queries.
        """
        chosen = None if rows is None else self._attention_read(tokens, layout, attention_subset, rows)
        if chosen is None:
            tokens = add_residual(tokens, layout, self._attention_branch, attention_subset, self._attention_onto)
        if rows is None:
            return add_residual(tokens, layout, self._ffn_branch, ffn_subset, self._ffn_onto)
        chosen = tokens.index_select(0, rows) if chosen is None else chosen
        return add_residual_to(chosen, rows, layout, self._ffn_branch, ffn_subset)

    def _attention_here(self, tokens: Tensor, layout: Layout) -> bool:
        around = [*self.norm1.parameters(), *self.ls1.parameters()]
        return self.attn.in_parts(layout) and frugal_attention.applies(tokens, self.attn.qkv, self.attn.proj, around)

    def _attention_onto(self, tokens: Tensor, subset: Subset) -> Tensor | None:
        if not self._attention_here(tokens, subset.layout):
            return None
        chosen = Chosen(subset.rows, subset.scale, second=False)
        layers = (self.attn.heads, self.norm1, self.attn.qkv, self.attn.proj)
        return attention_onto(tokens, chosen, subset.layout, *layers, gamma(self.ls1))

    def _attention_read(self, tokens: Tensor, layout: Layout, subset: Subset | None, rows: Tensor) -> Tensor | None:
        if not self._attention_here(tokens, layout):
            return None
        layers = (self.attn.heads, self.norm1, self.attn.qkv, self.attn.proj)
        return attention_read(tokens, rows, layout, subset, *layers, gamma(self.ls1))

    def _ffn_onto(self, tokens: Tensor, subset: Subset) -> Tensor | None:
        first, second = self.mlp.linears
        chosen = Chosen(subset.rows, subset.scale, second=True)
        return feed_forward_onto(tokens, chosen, self.norm2, first, self.mlp.activation, second, gamma(self.ls2))

    def _attention_branch(self, tokens: Tensor, layout: Layout, onto: bool) -> Tensor:
        scale = gamma(self.ls1)
        if self._attention_here(tokens, layout):
            return attention_branch(
                tokens, layout, self.attn.heads, self.norm1, self.attn.qkv, self.attn.proj, scale, onto
            )
        qkv = norm_linear(tokens, self.norm1, self.attn.qkv)
        out = scaled_linear(self.attn.attend(qkv, layout), self.attn.proj, scale)
        return tokens + out if onto else out

    def _ffn_branch(self, tokens: Tensor, layout: Layout, onto: bool) -> Tensor:
        first, second = self.mlp.linears
        return feed_forward(tokens, self.norm2, first, self.mlp.activation, second, gamma(self.ls2), onto)


def gamma(scale: nn.Module) -> Tensor | None:
    """Return the factors of a LayerScale, None for the identity in its place."""
    return scale.gamma if isinstance(scale, LayerScale) else None
