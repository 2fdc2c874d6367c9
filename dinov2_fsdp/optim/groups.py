"""Which parameter learns how fast: layer-wise learning rate decay, weight decay exemptions, frozen prototypes."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dinov2_fsdp.optim.schedules import StepValues

# Every parameter of a student matches exactly one rule.
_RULES: dict[str, re.Pattern[str]] = {
    "embedding": re.compile(r"backbone\.(cls_token|pos_embed|mask_token|register_tokens)"),
    "patch_embed": re.compile(r"backbone\.patch_embed\..+"),
    "block": re.compile(r"backbone\.blocks\.(?P<index>\d+)\..+"),
    "final_norm": re.compile(r"backbone\.norm\..+"),
    "head": re.compile(r"(dino_head|ibot_head)\.(?!last_layer\.).+"),
    "prototypes": re.compile(r"(dino_head|ibot_head)\.last_layer\..+"),
}
_NO_DECAY = re.compile(r"\.bias$|norm|gamma")
_WRAPPERS = re.compile(r"(^|(?<=\.))(_checkpoint_wrapped_module|_orig_mod|_fsdp_wrapped_module)\.")


def clean_name(name: str) -> str:
    """Return a parameter's name without what activation checkpointing and compilation put into it."""
    return _WRAPPERS.sub("", name)


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    depth: int,
    layer_decay: float,
    patch_embed_lr_mult: float,
) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups: as few as possible, in the order in which they first occur.

    Each holds ``params``, ``names``, ``lr_mult``, ``wd_mult`` (0 or 1), ``is_prototype`` and ``part`` (``backbone``,
    ``dino_head`` or ``ibot_head``). ``lr_mult`` is ``layer_decay ** (depth + 1 − layer)`` with layer 0 for the
    embeddings, i + 1 for block i, depth + 1 for the final norm and the heads; the patch embedding's also times
    ``patch_embed_lr_mult`` (BEiT, arXiv 2106.08254; DINOv2, arXiv 2304.07193). No weight decay on biases, norms and
    LayerScale. The modules of a head's MLP are numbered, not named, so there every 1-D parameter counts as a bias or
    norm; the prototypes' gains are 2-D and decay, as do the class, register, mask and position embeddings, in the
    published runs. Parameters that need no gradient are left out.
    Raises ValueError for a name that no rule knows, a block beyond ``depth``, or a parameter given twice.
    """
    groups: dict[tuple[str, float, float, bool], dict[str, Any]] = {}
    name_of: dict[int, str] = {}
    trainable = [(clean_name(name), parameter) for name, parameter in named_parameters if parameter.requires_grad]
    for name, parameter in trainable:
        if id(parameter) in name_of:
            raise ValueError(f"one parameter is given twice, as {name_of[id(parameter)]} and {name}")
        name_of[id(parameter)] = name
        rule, layer = _rule_and_layer(name, depth)
        part = name.split(".", 1)[0]
        lr_mult = layer_decay ** (depth + 1 - layer) * (patch_embed_lr_mult if rule == "patch_embed" else 1.0)
        in_head = rule in ("head", "prototypes")
        wd_mult = 0.0 if _NO_DECAY.search(name) or (in_head and parameter.ndim <= 1) else 1.0
        is_prototype = rule == "prototypes"
        group = groups.setdefault(
            (part, lr_mult, wd_mult, is_prototype),
            {
                "params": [],
                "names": [],
                "lr_mult": lr_mult,
                "wd_mult": wd_mult,
                "is_prototype": is_prototype,
                "part": part,
            },
        )
        group["params"].append(parameter)
        group["names"].append(name)
    grouped = [parameter for group in groups.values() for parameter in group["params"]]
    assert len(grouped) == len(trainable)
    assert sum(p.numel() for p in grouped) == sum(p.numel() for _, p in trainable)
    return list(groups.values())


def _rule_and_layer(name: str, depth: int) -> tuple[str, int]:
    """Return the one rule that ``name`` matches and its layer, 0 to depth + 1."""
    matches = [(rule, match) for rule, pattern in _RULES.items() if (match := pattern.fullmatch(name))]
    if len(matches) != 1:
        found = ", ".join(rule for rule, _ in matches) or "none"
        raise ValueError(f"parameter {name} must match exactly one rule of {', '.join(_RULES)}; it matches {found}")
    rule, match = matches[0]
    if rule in ("embedding", "patch_embed"):
        return rule, 0
    if rule == "block":
        index = int(match["index"])
        if index >= depth:
            raise ValueError(f"parameter {name} is in block {index} of a backbone with {depth} blocks")
        return rule, index + 1
    return rule, depth + 1


def apply_step_values(optimizer: torch.optim.Optimizer, values: StepValues) -> None:
    """Set every group's ``lr`` and ``weight_decay`` for the coming step."""
    for group in optimizer.param_groups:
        rate = values.prototype_learning_rate if group["is_prototype"] else values.learning_rate
        factor = values.backbone_factor if group["part"] == "backbone" else 1.0
        # Weight decay and momentum act through the rate: with a rate of 0 a parameter keeps its bits.
        group["lr"] = rate * group["lr_mult"] * factor
        group["weight_decay"] = values.weight_decay * group["wd_mult"]
