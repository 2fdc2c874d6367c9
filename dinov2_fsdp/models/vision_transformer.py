"""The Vision Transformer backbone, named and initialised as the published DINOv2 models."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fsdp.models.block import LAYER_NORM_EPS, Block
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.products import linear
from dinov2_fsdp.models.stochastic_depth import DepthPlan

INTERPOLATIONS = ("offset", "exact", "antialias")
"""How a position embedding is stretched, bicubic always: by a scale factor with :data:`INTERPOLATION_OFFSET` (the
published models without registers), to the exact size, or to the exact size with antialiasing (those with)."""

INTERPOLATION_OFFSET = 0.1
"""Added to the grid by the published models without registers before it becomes a scale factor."""


class PatchEmbed(nn.Module):
    """Linear embedding of square patches; its weights are those of a convolution with stride = kernel."""

    def __init__(self, patch: int, dim: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: Tensor) -> Tensor:
        """Return ``(batch, patches, dim)`` for ``(batch, 3, height, width)``, patches row by row.

        Raises:
            ValueError: the patch does not divide height or width.
        """
        height, width = images.shape[-2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"image of {height}×{width} is not divisible into patches of {self.patch}")
        # One matrix product: several times faster than the convolution on a CPU and no slower on a GPU.
        rows, columns = height // self.patch, width // self.patch
        patches = images.unflatten(3, (columns, self.patch)).unflatten(2, (rows, self.patch))
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0] * rows * columns, -1)
        tokens = linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        return tokens.unflatten(0, (images.shape[0], rows * columns))


class VisionTransformer(nn.Module):
    """ViT with class token, optional registers (arXiv 2309.16588) and a learnt, interpolated position embedding.

    Args:
        image_size: side of the square images that the position embedding's grid stands for, pixels.
        patch: side of a patch, pixels.
        dim, depth, heads: width, blocks, attention heads.
        ffn: ``mlp`` or ``swiglu``.
        layer_scale: initial LayerScale; 0 leaves LayerScale out.
        registers: number of register tokens.
        interpolation: one of :data:`INTERPOLATIONS`; by default the published models' for this number of registers.
    """

    def __init__(
        self,
        image_size: int,
        patch: int,
        dim: int,
        depth: int,
        heads: int,
        ffn: str = "mlp",
        mlp_ratio: float = 4.0,
        layer_scale: float = 1e-5,
        registers: int = 0,
        interpolation: str | None = None,
    ) -> None:
        super().__init__()
        self.interpolation = interpolation or published_interpolation(registers)
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation '{interpolation}' is none of {', '.join(INTERPOLATIONS)}")
        self.patch_size, self.embed_dim, self.num_heads = patch, dim, heads
        self.num_register_tokens, self.layer_scale = registers, layer_scale
        self.grid = image_size // patch
        self.patch_embed = PatchEmbed(patch, dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.grid**2, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, registers, dim)) if registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, int(dim * mlp_ratio), ffn, layer_scale > 0) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the first patch: class token and registers."""
        return 1 + self.num_register_tokens

    def set_attention_backend(self, backend: str) -> None:
        """Choose how every block attends; see :mod:`dinov2_fsdp.models.attention`."""
        for block in self.blocks:
            block.attn.backend = backend  # type: ignore[union-attr]

    def layout(self, sizes: Sequence[tuple[int, int, int]]) -> Layout:
        """Return the packed layout of groups of (images, height, width)."""
        patch, prefix = self.patch_size, self.prefix_tokens
        return Layout(tuple((n, prefix + (h // patch) * (w // patch)) for n, h, w in sizes))

    def layout_of(self, crops: Sequence[Tensor]) -> Layout:
        """Return the packed layout of crops, one tensor ``(images, 3, height, width)`` per crop size."""
        return self.layout([(crop.shape[0], crop.shape[2], crop.shape[3]) for crop in crops])

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding of a ``rows × columns`` grid: ``(1, 1 + rows·columns, dim)`` float32."""
        return stretch_positions(self.pos_embed, rows, columns, self.interpolation)

    def embed(self, images: Tensor, masks: Tensor | None = None) -> Tensor:
        """Return the tokens ``(batch, prefix + patches, dim)`` that enter the first block.

        ``masks``: ``(batch, patches)`` bool; a masked patch is replaced by the mask token before its position is
        added. Registers carry no position.
        """
        batch, _, height, width = images.shape
        tokens = self.patch_embed(images)
        if masks is not None:
            # A select, so that the mask token takes part in every backward pass, masked patches or not: a parameter
            # without a gradient on one rank would make the ranks' collectives differ.
            tokens = torch.where(masks.unsqueeze(-1), self.mask_token.to(tokens.dtype), tokens)
        tokens = torch.cat([self.cls_token.to(tokens.dtype).expand(batch, -1, -1), tokens], dim=1)
        position = self.position_embedding(height // self.patch_size, width // self.patch_size)
        tokens = tokens + position.to(tokens.dtype)
        if self.register_tokens is not None:
            registers = self.register_tokens.to(tokens.dtype).expand(batch, -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        return tokens

    def forward_packed(
        self,
        crops: Sequence[Tensor],
        masks: Sequence[Tensor | None],
        plan: DepthPlan | None = None,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Layout]:
        """Return the last block's tokens before the final norm, packed ``(total_tokens, dim)``, and their layout.

        ``crops``: one tensor ``(images, 3, height, width)`` per crop size; ``masks``: one per crop size.
        ``rows``: ``(chosen,)`` int64, the packed tokens to return, ``(chosen, dim)``, without what only others need;
        the layout is still that of all.
        """
        layout = self.layout_of(crops)
        groups = [self.embed(crop, mask).flatten(0, 1) for crop, mask in zip(crops, masks, strict=True)]
        tokens = torch.cat(groups) if len(groups) > 1 else groups[0]
        for index, block in enumerate(self.blocks):
            subsets = (plan.subset(2 * index), plan.subset(2 * index + 1)) if plan is not None else (None, None)
            tokens = block(tokens, layout, *subsets, rows if index == len(self.blocks) - 1 else None)
        return tokens, layout

    def forward_features(self, images: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
        """Return the normalised tokens of ``(batch, 3, height, width)`` images under the published models' names.

        ``x_norm_clstoken`` (batch, dim), ``x_norm_regtokens`` (batch, registers, dim), ``x_norm_patchtokens``
        (batch, patches, dim), ``x_prenorm`` (batch, tokens, dim).
        """
        packed, layout = self.forward_packed([images], [masks])
        tokens = layout.split(packed)[0]
        normalised = self.norm(tokens)
        return {
            "x_norm_clstoken": normalised[:, 0],
            "x_norm_regtokens": normalised[:, 1 : self.prefix_tokens],
            "x_norm_patchtokens": normalised[:, self.prefix_tokens :],
            "x_prenorm": tokens,
        }

    def forward(self, images: Tensor) -> Tensor:
        """Return the normalised class token ``(batch, dim)``."""
        return self.forward_features(images)["x_norm_clstoken"]

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: str = "NCHW",
        return_prefix_tokens: bool = False,
        intermediates_only: bool = False,
        masks: Tensor | None = None,
    ) -> Any:
        """Return the final tokens and the patch tokens after some blocks, under timm's conventions.

        Args:
            indices: the last so many blocks, or these blocks (negative ones count from the end); by default all.
            norm: apply the final norm to the intermediates too.
            output_fmt: ``NCHW``: ``(batch, dim, rows, columns)``; ``NLC``: ``(batch, patches, dim)``.
            return_prefix_tokens: give pairs, with the class token and registers ``(batch, prefix, dim)`` beside.
            intermediates_only: leave out the final tokens, and the blocks above the last one asked for.

        Returns:
            ``(final, intermediates)``, or ``intermediates``: ``final`` (batch, tokens, dim), normalised;
            ``intermediates`` a list in the order of depth.

        Raises:
            ValueError: there is no such block, or the format is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt '{output_fmt}' is neither NCHW nor NLC")
        taken = self._block_indices(indices)
        picked, tokens, prefix = [], torch.empty(0), self.prefix_tokens
        for index, tokens in enumerate(self._block_outputs(images, masks)):
            if index in taken:
                kept = self.norm(tokens) if norm else tokens
                patches = kept[:, prefix:]
                if output_fmt == "NCHW":
                    grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                picked.append((patches, kept[:, :prefix]) if return_prefix_tokens else patches)
            if intermediates_only and index == max(taken):
                break
        return picked if intermediates_only else (self.norm(tokens), picked)

    def get_intermediate_layers(
        self,
        images: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_class_token: bool = False,
        norm: bool = True,
    ) -> tuple[Any, ...]:
        """Return the patch tokens after the last ``n`` blocks, or the blocks of ``n``, as the published models do.

        Each is ``(batch, patches, dim)``, or ``(batch, dim, rows, columns)`` with ``reshape``; with
        ``return_class_token`` a pair whose second part is the class token ``(batch, dim)``.

        Raises:
            ValueError: there is no such block.
        """
        pairs = self.forward_intermediates(
            images,
            n,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            return_prefix_tokens=True,
            intermediates_only=True,
        )
        return tuple((patches, prefix[:, 0]) if return_class_token else patches for patches, prefix in pairs)

    def _block_outputs(self, images: Tensor, masks: Tensor | None) -> Iterator[Tensor]:
        """Yield the tokens ``(batch, tokens, dim)`` after every block."""
        batch, _, height, width = images.shape
        layout = self.layout([(batch, height, width)])
        tokens = self.embed(images, masks).flatten(0, 1)
        for block in self.blocks:
            tokens = block(tokens, layout)
            yield tokens.unflatten(0, (batch, -1))

    def _block_indices(self, indices: int | Sequence[int] | None) -> set[int]:
        depth = len(self.blocks)
        if indices is None:
            return set(range(depth))
        asked = range(-indices, 0) if isinstance(indices, int) else indices
        if not asked or not all(-depth <= index < depth for index in asked):
            raise ValueError(
                f"blocks {indices} asked for; this backbone has {depth}, 0 to {depth - 1} or -{depth} to -1"
            )
        return {index % depth for index in asked}


def published_interpolation(registers: int) -> str:
    """Return how the published models with this number of registers stretch their position embedding."""
    return "antialias" if registers else "offset"


def stretch_positions(embedding: Tensor, rows: int, columns: int, interpolation: str) -> Tensor:
    """Return a position embedding ``(1, 1 + grid², dim)`` for ``rows × columns`` patches, in float32.

    The class token's is kept; the rest is interpolated, bicubic, as ``interpolation`` (:data:`INTERPOLATIONS`) says.
    """
    embedding, grid = embedding.float(), math.isqrt(embedding.shape[1] - 1)
    if rows == columns == grid:
        return embedding
    matrix = interpolation_matrix(grid, rows, columns, interpolation, embedding.device)
    return torch.cat([embedding[:, :1], (matrix @ embedding[0, 1:]).unsqueeze(0)], dim=1)


@functools.lru_cache(maxsize=64)
def interpolation_matrix(grid: int, rows: int, columns: int, interpolation: str, device: torch.device) -> Tensor:
    """Return the linear map ``(rows·columns, grid²)`` that bicubic interpolation of a ``grid × grid`` map is.

    As a matrix product its backward pass is deterministic on every device.
    """
    # A matrix made while evaluating in inference mode stays in the cache, and training could not use it.
    with torch.inference_mode(False), torch.no_grad():
        basis = torch.eye(grid * grid).reshape(1, grid * grid, grid, grid)
        if interpolation == "offset":
            factors = ((rows + INTERPOLATION_OFFSET) / grid, (columns + INTERPOLATION_OFFSET) / grid)
            image = F.interpolate(basis, scale_factor=factors, mode="bicubic")
        else:
            image = F.interpolate(basis, size=(rows, columns), mode="bicubic", antialias=interpolation == "antialias")
        assert image.shape[-2:] == (rows, columns), f"{tuple(image.shape[-2:])} instead of {(rows, columns)}"
        return image.flatten(2)[0].T.contiguous().to(device)
