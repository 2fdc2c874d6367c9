from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fsdp.models.head import ProjectionHead


def _head(**options: Any) -> ProjectionHead:
    torch.manual_seed(0)
    head = ProjectionHead(10, 30, hidden=16, bottleneck=6, **options)
    nn.init.uniform_(head.last_layer.weight_g, 0.5, 2.0)
    nn.init.normal_(head.last_layer.weight_v)
    return head.double()


def _reference_head(head: ProjectionHead, rows: Tensor, batch_norm: bool = False, layer_norm: bool = False) -> Tensor:
    """DINO, appendix C: MLP with GELU, bottleneck, L2 norm, weight-normalised linear layer."""
    p, linears = dict(head.named_parameters()), (0, 3, 6) if batch_norm else (0, 2, 4)
    for linear in linears:
        rows = rows @ p[f"mlp.{linear}.weight"].T + p[f"mlp.{linear}.bias"]
        if linear != linears[-1]:
            if batch_norm:
                variance, mean = torch.var_mean(rows, dim=0, unbiased=False)
                rows = (rows - mean) / (variance + 1e-5).sqrt()
                rows = rows * p[f"mlp.{linear + 1}.weight"] + p[f"mlp.{linear + 1}.bias"]
            rows = rows * 0.5 * (1 + torch.erf(rows / math.sqrt(2)))
    if layer_norm:
        variance, mean = torch.var_mean(rows, dim=1, unbiased=False, keepdim=True)
        rows = (rows - mean) / (variance + 1e-5).sqrt() * p["norm.weight"] + p["norm.bias"]
    rows = rows / rows.square().sum(dim=1, keepdim=True).sqrt()
    directions = p["last_layer.weight_v"]
    return rows @ (p["last_layer.weight_g"] * directions / directions.square().sum(dim=1, keepdim=True).sqrt()).T


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_head_equals_the_published_one(batch_norm: bool, layer_norm: bool) -> None:
    head, rows = _head(batch_norm=batch_norm, layer_norm=layer_norm), torch.randn(7, 10, dtype=torch.float64)
    # The L2 norm and the weight norm are taken in float32.
    expected = _reference_head(head, rows, batch_norm, layer_norm)
    torch.testing.assert_close(head(rows), expected, rtol=1e-5, atol=1e-5)


def test_batch_statistics_are_used_in_evaluation_too() -> None:
    head, rows = _head(batch_norm=True), torch.randn(7, 10, dtype=torch.float64)
    assert torch.equal(head.train()(rows), head.eval()(rows))
    assert not list(head.buffers())


def test_logits_are_cosines_when_the_gain_is_one() -> None:
    head = _head()
    nn.init.ones_(head.last_layer.weight_g)
    assert head(1000 * torch.randn(50, 10, dtype=torch.float64)).abs().max() <= 1 + 1e-6


def test_a_fixed_gain_does_not_learn() -> None:
    assert not _head(fixed_gain=True).last_layer.weight_g.requires_grad
    assert _head().last_layer.weight_g.requires_grad


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_head_takes_fewer_than_two_rows(batch_norm: bool, rows: int) -> None:
    head = _head(batch_norm=batch_norm)
    logits = head(torch.randn(rows, 10, dtype=torch.float64))
    logits.sum().backward()
    assert logits.shape == (rows, 30)
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in head.parameters())
