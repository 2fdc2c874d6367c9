"""Attention within each sequence of a packed batch, behind one small function with four backends."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.plain_attention import attend_plainly

BACKENDS = ("math", "sdpa", "xformers", "varlen")

MATH_LONGEST = 512
"""Sequences up to this length are cheaper as plain matrix products on a CPU; longer ones would need much memory."""


def resolve_backend(name: str, device: torch.device, precision: str = "bf16") -> str:
    """Return the backend that ``name`` (one of :data:`BACKENDS` or ``auto``) means on ``device``.

    ``precision`` is that of the backbone: torch's variable-length attention knows no fp32.

    Raises:
        UserError: the backend needs CUDA, or is not installed.
    """
    if device.type != "cuda":
        if name in ("xformers", "varlen"):
            raise UserError(f"parallel.attention={name} runs on CUDA only; use auto, math or sdpa on {device.type}")
        return "math" if name == "auto" else name
    if name == "auto":
        if importlib.util.find_spec("xformers") is not None:
            return "xformers"
        return "varlen" if _has_varlen() and precision != "fp32" else "sdpa"
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise UserError("parallel.attention=xformers: xformers is not installed; pip install xformers, or use auto")
    if name == "varlen" and not _has_varlen():
        raise UserError(f"parallel.attention=varlen: torch {torch.__version__} has no varlen_attn; use auto or sdpa")
    if name == "varlen" and precision == "fp32":
        raise UserError("parallel.attention=varlen cannot compute in fp32; use train.precision=bf16, or sdpa")
    return name


def attend(qkv: Tensor, layout: Layout, backend: str) -> Tensor:
    """Return softmax(q·kᵀ/√d)·v, each sequence attending to itself alone: ``(tokens, heads, head_dim)``.

    ``qkv`` has shape ``(tokens, 3, heads, head_dim)`` and is packed as ``layout`` says.
    """
    if backend == "xformers":
        return _attend_xformers(qkv, layout)
    if backend == "varlen":
        return _attend_varlen(qkv, layout)
    plain = _plain(layout, backend)
    if all(plain):
        return attend_plainly(qkv, layout)
    # Split, not sliced: autograd pads the gradients of slices with zeros and adds them up.
    rows = qkv.split([sequences * length for sequences, length in layout.groups])
    outputs = [
        attend_plainly(some, Layout((group,))) if short else _attend_sdpa(some, group[0])
        for some, group, short in zip(rows, layout.groups, plain, strict=True)
    ]
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


def _plain(layout: Layout, backend: str) -> list[bool]:
    return [backend == "math" and length <= MATH_LONGEST for _, length in layout.groups]


def _attend_sdpa(qkv: Tensor, sequences: int) -> Tensor:
    query, key, value = qkv.unflatten(0, (sequences, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(0, 1)


def _attend_xformers(qkv: Tensor, layout: Layout) -> Tensor:
    from xformers.ops import memory_efficient_attention

    query, key, value = qkv.unsqueeze(0).unbind(2)  # (1, tokens, heads, head_dim)
    return memory_efficient_attention(query, key, value, attn_bias=_block_diagonal(layout, qkv.device)).squeeze(0)


@functools.lru_cache(maxsize=64)
def _block_diagonal(layout: Layout, device: torch.device) -> Any:
    from xformers.ops.fmha.attn_bias import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(layout.lengths, device=device)


def _attend_varlen(qkv: Tensor, layout: Layout) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = qkv.unbind(1)
    ends, longest = _sequence_ends(layout, qkv.device)
    return cast(Tensor, varlen_attn(query, key, value, ends, ends, longest, longest))


@functools.lru_cache(maxsize=64)
def _sequence_ends(layout: Layout, device: torch.device) -> tuple[Tensor, int]:
    lengths = torch.tensor([0, *layout.lengths], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32).to(device), max(layout.lengths)


def _has_varlen() -> bool:
    try:
        return importlib.util.find_spec("torch.nn.attention.varlen") is not None
    except ModuleNotFoundError:
        return False


class Attention(nn.Module):
    """Multi-head self-attention (arXiv 2010.11929, appendix A) over packed sequences."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.backend = "sdpa"

    def attend(self, qkv: Tensor, layout: Layout) -> Tensor:
        """Return ``(total_tokens, dim)``, before the projection, for the packed output of ``qkv``."""
        return attend(qkv.unflatten(-1, (3, self.heads, -1)), layout, self.backend).flatten(1)

    def in_parts(self, layout: Layout) -> bool:
        """Return whether attention is plain matrix products, of a few sequences at a time if wanted."""
        return all(_plain(layout, self.backend))

    def attention_map(self, tokens: Tensor) -> Tensor:
        """Return the softmax weights ``(sequences, heads, length, length)`` for ``(sequences, length, dim)``."""
        query, key, _ = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(dim=-1)
