"""The Vision Transformer backbone, named and initialised as the published DINOv2 models."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fsdp.models.block import LAYER_NORM_EPS, Block
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import DepthPlan

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
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(images.shape[0], rows * columns, -1)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class VisionTransformer(nn.Module):
    """ViT with class token, optional registers (arXiv 2309.16588) and a learnt, interpolated position embedding.

    Args:
        image_size: side of the square images that the position embedding's grid stands for, pixels.
        patch: side of a patch, pixels.
        dim, depth, heads: width, blocks, attention heads.
        ffn: ``mlp`` or ``swiglu``.
        layer_scale: initial LayerScale; 0 leaves LayerScale out.
        registers: number of register tokens.
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
    ) -> None:
        super().__init__()
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

    def position_embedding(self, rows: int, columns: int) -> Tensor:
        """Return the position embedding of a ``rows × columns`` grid: ``(1, 1 + rows·columns, dim)`` float32.

        Bicubic in fp32. As in the published models, the grid is stretched by a scale factor with an offset and
        without antialiasing where there are no registers, and to the exact size with antialiasing where there are.
        """
        embedding = self.pos_embed.float()
        if rows == columns == self.grid:
            return embedding
        matrix = interpolation_matrix(self.grid, rows, columns, self.num_register_tokens > 0, embedding.device)
        return torch.cat([embedding[:, :1], (matrix @ embedding[0, 1:]).unsqueeze(0)], dim=1)

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
        self, crops: Sequence[Tensor], masks: Sequence[Tensor | None], plan: DepthPlan | None = None
    ) -> tuple[Tensor, Layout]:
        """Return the last block's tokens before the final norm, packed ``(total_tokens, dim)``, and their layout.

        ``crops``: one tensor ``(images, 3, height, width)`` per crop size; ``masks``: one per crop size.
        """
        layout = self.layout([(crop.shape[0], crop.shape[2], crop.shape[3]) for crop in crops])
        groups = [self.embed(crop, mask).flatten(0, 1) for crop, mask in zip(crops, masks, strict=True)]
        tokens = torch.cat(groups) if len(groups) > 1 else groups[0]
        for index, block in enumerate(self.blocks):
            subsets = (plan.subset(2 * index), plan.subset(2 * index + 1)) if plan is not None else (None, None)
            tokens = block(tokens, layout, *subsets)
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


@functools.lru_cache(maxsize=64)
def interpolation_matrix(grid: int, rows: int, columns: int, exact_size: bool, device: torch.device) -> Tensor:
    """Return the linear map ``(rows·columns, grid²)`` that bicubic interpolation of a ``grid × grid`` map is.

    As a matrix product its backward pass is deterministic on every device.
    """
    # A matrix made while evaluating in inference mode stays in the cache, and training could not use it.
    with torch.inference_mode(False), torch.no_grad():
        basis = torch.eye(grid * grid).reshape(1, grid * grid, grid, grid)
        if exact_size:
            image = F.interpolate(basis, size=(rows, columns), mode="bicubic", antialias=True)
        else:
            factors = ((rows + INTERPOLATION_OFFSET) / grid, (columns + INTERPOLATION_OFFSET) / grid)
            image = F.interpolate(basis, scale_factor=factors, mode="bicubic", antialias=False)
        assert image.shape[-2:] == (rows, columns), f"{tuple(image.shape[-2:])} instead of {(rows, columns)}"
        return image.flatten(2)[0].T.contiguous().to(device)
