"""What tests see of operations: their names, their shapes, their gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_fsdp.models import fused

TOLERANCES = {
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2e-2, "atol": 2e-2},
}


class Called(TorchDispatchMode):
    """Writes down which operations run: their names, and the shapes of the tensors that each is given."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[list[tuple[int, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        self.shapes.append([tuple(arg.shape) for arg in args if isinstance(arg, Tensor)])
        return func(*args, **(kwargs or {}))


def gradients(function: Callable[[Tensor], Tensor], rows: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the output of a function of ``rows`` and the gradients of a random sum of it."""
    rows = rows.clone().requires_grad_()
    out = function(rows)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [rows, *parameters])]


def dtype_of(how: int) -> torch.dtype:
    """Return the type of tensors that compiled branches multiply so."""
    return torch.float32 if how == fused.BY_FP32 else torch.bfloat16
