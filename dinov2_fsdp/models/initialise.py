"""Initial weights: one rule per parameter name, the same values however the model is sharded.

Every parameter is drawn whole, from a generator keyed on the seed and its name, and each rank keeps its shard. A
model built on the meta device is first filled with NaN, so that a parameter without a rule cannot pass.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dinov2_fsdp.optim.groups import clean_name
from dinov2_fsdp.rng import generator

Initialiser = Callable[[Tensor, torch.Generator], object]


def _normal(tensor: Tensor, rng: torch.Generator) -> object:
    # The published truncation is at ±2, a hundred standard deviations: none. A normal distribution's values are the
    # same in all versions of torch, a truncated one's changed between 2.11 and 2.14.
    return nn.init.normal_(tensor, std=0.02, generator=rng)


def _nearly_zero(tensor: Tensor, rng: torch.Generator) -> object:
    return nn.init.normal_(tensor, std=1e-6, generator=rng)


def _framework_default(tensor: Tensor, rng: torch.Generator) -> object:
    # What torch gives linear and convolution weights: uniform within 1/√fan_in.
    return nn.init.uniform_(tensor, -1 / math.sqrt(fan := tensor[0].numel()), 1 / math.sqrt(fan), generator=rng)


def _zeros(tensor: Tensor, rng: torch.Generator) -> object:
    return tensor.zero_()


def _ones(tensor: Tensor, rng: torch.Generator) -> object:
    return tensor.fill_(1.0)


def rules(layer_scale: float, patch_fan_in: int) -> list[tuple[str, Initialiser]]:
    """Return (pattern, initialiser) pairs; the first pattern found in a parameter's name decides."""

    def layer_scale_value(tensor: Tensor, rng: torch.Generator) -> object:
        return tensor.fill_(layer_scale)

    def patch_bias(tensor: Tensor, rng: torch.Generator) -> object:
        bound = 1 / math.sqrt(patch_fan_in)
        return nn.init.uniform_(tensor, -bound, bound, generator=rng)

    return [
        (r"(^|\.)(cls_token|register_tokens)$", _nearly_zero),
        (r"(^|\.)mask_token$", _zeros),
        (r"(^|\.)pos_embed$", _normal),
        (r"(^|\.)patch_embed\.proj\.weight$", _framework_default),
        (r"(^|\.)patch_embed\.proj\.bias$", patch_bias),
        (r"\.gamma$", layer_scale_value),
        (r"(^|\.)last_layer\.weight_g$", _ones),
        (r"(^|\.)last_layer\.weight_v$", _framework_default),
        (r"(^|\.)bias$", _zeros),
        (r"(^|\.)norm\d?\.weight$", _ones),
        (r"(^|\.)mlp\.\d+\.weight$", _normal),
        (r"\.(qkv|proj|fc1|fc2|w12|w3)\.weight$", _normal),
    ]


@torch.no_grad()
def initialise(model: nn.Module, seed: int, layer_scale: float) -> None:
    """Fill every parameter of a materialised, possibly sharded model.

    Raises:
        AssertionError: a parameter has no rule, or still holds a NaN.
    """
    patch = next((p for n, p in model.named_parameters() if n.endswith("patch_embed.proj.weight")), None)
    # Of the whole shape: to look at a row of a sharded parameter, all ranks would exchange it.
    table = rules(layer_scale, math.prod(patch.shape[1:]) if patch is not None else 1)
    for full_name, parameter in model.named_parameters():
        name = clean_name(full_name)  # the values must not depend on activation checkpointing
        parameter.fill_(float("nan"))
        if parameter.ndim == 1 and re.search(r"(^|\.)mlp\.\d+\.weight$", name):
            rule: Initialiser | None = _ones  # BatchNorm inside a head's MLP
        else:
            rule = next((rule for pattern, rule in table if re.search(pattern, name)), None)
        assert rule is not None, f"no rule initialises {name}"
        key = int(generator(seed, f"init {name}").integers(2**63))
        rng = torch.Generator().manual_seed(key)
        full = torch.empty(parameter.shape, dtype=torch.float32)
        rule(full, rng)
        fill(parameter, full)
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        assert not local.isnan().any(), f"{name} holds a NaN after initialisation"


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Copy a whole tensor that every rank holds into a parameter, sharded or not, without communication."""
    if isinstance(parameter, DTensor):
        full = full.to(parameter.device, parameter.dtype)
        parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None))
    else:
        parameter.copy_(full)
