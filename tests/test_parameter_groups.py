from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dinov2_fsdp.config import from_dict
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.optim.build import build_optimizer
from dinov2_fsdp.optim.groups import apply_step_values, clean_name, parameter_groups
from dinov2_fsdp.optim.schedules import StepValues
from dinov2_fsdp.ssl.network import Network

DEPTH = 12
D, H, K = 4, 6, 5


def _backbone_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, D),
        "pos_embed": (1, 3, D),
        "register_tokens": (1, 4, D),
        "mask_token": (1, D),
        "patch_embed.proj.weight": (D, 3, 2, 2),
        "patch_embed.proj.bias": (D,),
    }
    for i in range(DEPTH):
        block = {
            "norm1.weight": (D,),
            "norm1.bias": (D,),
            "attn.qkv.weight": (3 * D, D),
            "attn.qkv.bias": (3 * D,),
            "attn.proj.weight": (D, D),
            "attn.proj.bias": (D,),
            "ls1.gamma": (D,),
            "norm2.weight": (D,),
            "norm2.bias": (D,),
            "mlp.fc1.weight": (H, D),
            "mlp.fc1.bias": (H,),
            "mlp.fc2.weight": (D, H),
            "mlp.fc2.bias": (D,),
            "ls2.gamma": (D,),
        }
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return shapes | {"norm.weight": (D,), "norm.bias": (D,)}


def _head_shapes() -> dict[str, tuple[int, ...]]:
    return {
        "mlp.0.weight": (H, D),
        "mlp.0.bias": (H,),
        "mlp.1.weight": (H,),  # BatchNorm
        "mlp.1.bias": (H,),
        "mlp.3.weight": (D, H),
        "mlp.3.bias": (D,),
        "norm.weight": (D,),
        "norm.bias": (D,),
        "last_layer.weight_g": (K, 1),
        "last_layer.weight_v": (K, D),
    }


def _student() -> list[tuple[str, nn.Parameter]]:
    shapes = {f"backbone.{name}": shape for name, shape in _backbone_shapes().items()}
    for head in ("dino_head", "ibot_head"):
        shapes |= {f"{head}.{name}": shape for name, shape in _head_shapes().items()}
    return [(name, nn.Parameter(torch.zeros(shape))) for name, shape in shapes.items()]


# 0.9 ** (13 − layer): the embeddings are layer 0, block i is layer i + 1.
MULTIPLIER_OF_BLOCK = {
    0: 0.282429536481,
    1: 0.31381059609,
    2: 0.3486784401,
    3: 0.387420489,
    4: 0.43046721,
    5: 0.4782969,
    6: 0.531441,
    7: 0.59049,
    8: 0.6561,
    9: 0.729,
    10: 0.81,
    11: 0.9,
}
MULTIPLIER_OF_EMBEDDINGS = 0.2541865828329
MULTIPLIER_OF_PATCH_EMBED = 0.05083731656658


def _expected_lr_mult(name: str) -> float:
    part, rest = name.split(".", 1)
    if part != "backbone" or rest in ("norm.weight", "norm.bias"):
        return 1.0
    if rest.startswith("patch_embed"):
        return MULTIPLIER_OF_PATCH_EMBED
    if rest in ("cls_token", "pos_embed", "register_tokens", "mask_token"):
        return MULTIPLIER_OF_EMBEDDINGS
    return MULTIPLIER_OF_BLOCK[int(rest.split(".")[1])]


def _by_name(groups: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: group for group in groups for name in group["names"]}


def test_the_learning_rate_of_every_parameter_decays_with_depth() -> None:
    groups = _by_name(parameter_groups(_student(), DEPTH, 0.9, 0.2))
    assert {n: pytest.approx(g["lr_mult"]) for n, g in groups.items()} == {
        n: _expected_lr_mult(n) for n, _ in _student()
    }


def test_the_table_is_that_of_a_whole_backbone_of_twelve_blocks() -> None:
    config = from_dict({"model": {"arch": "vits", "registers": 4}, "dino_head": {"prototypes": 8}})
    with torch.device("meta"):
        backbone = Network(config).backbone
    assert {name for name, _ in backbone.named_parameters()} == _backbone_shapes().keys()
    groups = _by_name(parameter_groups(((f"backbone.{n}", p) for n, p in backbone.named_parameters()), DEPTH, 0.9, 0.2))
    assert {name: pytest.approx(group["lr_mult"]) for name, group in groups.items()} == {
        f"backbone.{name}": _expected_lr_mult(f"backbone.{name}") for name in _backbone_shapes()
    }


def test_biases_norms_and_layer_scale_do_not_decay_and_all_else_does() -> None:
    groups = _by_name(parameter_groups(_student(), DEPTH, 0.9, 0.2))
    decays = {name for name, group in groups.items() if group["wd_mult"] == 1.0}
    assert all(group["wd_mult"] in (0.0, 1.0) for group in groups.values())
    in_backbone = {"cls_token", "pos_embed", "register_tokens", "mask_token", "patch_embed.proj.weight"}
    for i in range(DEPTH):
        in_backbone |= {f"blocks.{i}.{n}.weight" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    in_head = {"mlp.0.weight", "mlp.3.weight", "last_layer.weight_g", "last_layer.weight_v"}
    expected = {f"backbone.{n}" for n in in_backbone}
    expected |= {f"{head}.{n}" for head in ("dino_head", "ibot_head") for n in in_head}
    assert decays == expected


def test_only_the_last_layers_are_prototypes_and_parts_are_named() -> None:
    groups = _by_name(parameter_groups(_student(), DEPTH, 0.9, 0.2))
    assert {n for n, g in groups.items() if g["is_prototype"]} == {
        f"{head}.last_layer.{weight}" for head in ("dino_head", "ibot_head") for weight in ("weight_g", "weight_v")
    }
    assert all(group["part"] == name.split(".")[0] for name, group in groups.items())


def test_every_parameter_is_in_exactly_one_group_under_its_own_name() -> None:
    student = _student()
    groups = parameter_groups(student, DEPTH, 0.9, 0.2)
    pairs = [pair for g in groups for pair in zip(g["names"], g["params"], strict=True)]
    assert len(pairs) == len(student)
    assert {name: id(p) for name, p in pairs} == {name: id(p) for name, p in student}


def test_groups_are_fused_and_come_in_the_order_of_the_model() -> None:
    groups = parameter_groups(_student(), DEPTH, 0.9, 0.2)
    keys = [(g["part"], g["lr_mult"], g["wd_mult"], g["is_prototype"]) for g in groups]
    # Backbone: embeddings, patch weight, patch bias, 2 per block, final norm. Per head: decay, no decay, prototypes.
    assert len(set(keys)) == len(keys) == 1 + 2 + 2 * DEPTH + 1 + 2 * 3
    first_names = [g["names"][0] for g in groups]
    order = [name for name, _ in _student()]
    assert first_names == sorted(first_names, key=order.index)
    # Without layer-wise decay: decay, no decay, and the patch embedding's two.
    assert len([g for g in parameter_groups(_student(), DEPTH, 1.0, 0.2) if g["part"] == "backbone"]) == 4


def test_names_lose_what_checkpointing_and_compilation_add() -> None:
    wrapped = "_orig_mod.backbone.blocks.3._orig_mod._checkpoint_wrapped_module.attn.qkv.weight"
    assert clean_name(wrapped) == "backbone.blocks.3.attn.qkv.weight"
    (group,) = parameter_groups([(wrapped, nn.Parameter(torch.zeros(2, 2)))], DEPTH, 0.9, 0.2)
    assert group["names"] == ["backbone.blocks.3.attn.qkv.weight"]
    assert group["lr_mult"] == pytest.approx(MULTIPLIER_OF_BLOCK[3])


@pytest.mark.parametrize(
    "name", ["backbone.head.weight", "probe.weight", "backbone.blocks.x.attn.qkv.weight", "cls_token"]
)
def test_a_parameter_that_no_rule_knows_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        parameter_groups([(name, nn.Parameter(torch.zeros(1)))], DEPTH, 0.9, 0.2)


def test_a_block_beyond_the_depth_is_named() -> None:
    with pytest.raises(ValueError, match="block 12 of a backbone with 12 blocks"):
        parameter_groups([("backbone.blocks.12.ls1.gamma", nn.Parameter(torch.zeros(1)))], DEPTH, 0.9, 0.2)


def test_a_parameter_given_twice_is_named() -> None:
    shared = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"given twice, as dino_head.mlp.0.weight and ibot_head.mlp.0.weight"):
        parameter_groups([("dino_head.mlp.0.weight", shared), ("ibot_head.mlp.0.weight", shared)], DEPTH, 0.9, 0.2)


def test_a_parameter_without_gradient_is_left_out() -> None:
    gain = nn.Parameter(torch.ones(K, 1), requires_grad=False)
    assert parameter_groups([("dino_head.last_layer.weight_g", gain)], DEPTH, 0.9, 0.2) == []


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_each_group_gets_its_own_rate_and_decay(name: str) -> None:
    groups = parameter_groups(_student(), DEPTH, 0.9, 0.2)
    optimizer = build_optimizer(groups, name, betas=(0.9, 0.999), eps=1e-8, momentum=0.9)
    assert all(group["lr"] == 0.0 for group in optimizer.param_groups)
    apply_step_values(optimizer, StepValues(2.0, 0.5, 0.1, 0.99, 0.07))
    by_name = _by_name(optimizer.param_groups)
    assert by_name["backbone.blocks.11.attn.qkv.weight"]["lr"] == pytest.approx(1.8)
    assert by_name["backbone.blocks.11.attn.qkv.weight"]["weight_decay"] == 0.1
    assert by_name["backbone.blocks.11.attn.qkv.bias"]["weight_decay"] == 0.0
    assert by_name["backbone.patch_embed.proj.weight"]["lr"] == pytest.approx(2 * MULTIPLIER_OF_PATCH_EMBED)
    assert by_name["dino_head.mlp.0.weight"]["lr"] == 2.0
    assert by_name["dino_head.last_layer.weight_v"]["lr"] == 0.5


def test_an_unknown_optimizer_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        build_optimizer([], "adam", betas=(0.9, 0.999), eps=1e-8, momentum=0.9)
