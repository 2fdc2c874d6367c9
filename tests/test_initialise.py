from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import tiny_backbone, tiny_config
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode

from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.ssl.network import Network


def _initialised(seed: int = 0, **overrides: Any) -> Network:
    config = tiny_config(
        ibot_head__separate=True,
        dino_head__batch_norm=True,
        dino_head__layer_norm=True,
        model__registers=4,
        **overrides,
    )
    with torch.device("meta"):
        network = Network(config)
    network.to_empty(device="cpu")
    initialise(network, seed, config.model.layer_scale)
    return network


def _within(bound: float) -> Callable[[Tensor], bool]:
    # The deviation of a uniform distribution is bound/√3.
    return lambda t: bool(t.abs().max() <= bound) and abs(t.std().item() * math.sqrt(3) / bound - 1) < 0.3


def _normal(t: Tensor) -> bool:
    return abs(t.std().item() / 0.02 - 1) < 0.25 and bool(t.abs().max() < 0.12)


def _constant(value: float) -> Callable[[Tensor], bool]:
    return lambda t: bool((t == value).all())


def _tiny_normal(t: Tensor) -> bool:
    return abs(t.std().item() / 1e-6 - 1) < 0.5 and bool(t.abs().max() < 6e-6)


RULES = {
    "backbone.cls_token": _tiny_normal,
    "backbone.register_tokens": _tiny_normal,
    "backbone.mask_token": _constant(0.0),
    "backbone.pos_embed": _normal,
    "backbone.patch_embed.proj.weight": _within(1 / math.sqrt(48)),
    "backbone.patch_embed.proj.bias": _within(1 / math.sqrt(48)),
    "backbone.blocks.0.norm1.weight": _constant(1.0),
    "backbone.blocks.0.norm1.bias": _constant(0.0),
    "backbone.blocks.0.attn.qkv.weight": _normal,
    "backbone.blocks.0.attn.qkv.bias": _constant(0.0),
    "backbone.blocks.0.attn.proj.weight": _normal,
    "backbone.blocks.1.mlp.fc1.weight": _normal,
    "backbone.blocks.1.mlp.fc2.weight": _normal,
    "backbone.blocks.1.mlp.fc2.bias": _constant(0.0),
    "backbone.blocks.0.ls1.gamma": _constant(0.1),
    "backbone.norm.weight": _constant(1.0),
    "dino_head.mlp.0.weight": _normal,
    "dino_head.mlp.0.bias": _constant(0.0),
    "dino_head.mlp.1.weight": _constant(1.0),  # BatchNorm
    "dino_head.mlp.1.bias": _constant(0.0),
    "dino_head.norm.weight": _constant(1.0),
    "dino_head.last_layer.weight_g": _constant(1.0),
    "dino_head.last_layer.weight_v": _within(1 / math.sqrt(12)),
    "ibot_head.mlp.2.weight": _normal,
}


@pytest.mark.parametrize("name", RULES)
def test_a_parameter_starts_as_the_method_says(name: str) -> None:
    assert RULES[name](dict(_initialised().named_parameters())[name].detach())


def test_swiglu_starts_as_the_other_layers() -> None:
    parameters = dict(_initialised(model__ffn="swiglu").named_parameters())
    assert _normal(parameters["backbone.blocks.0.mlp.w12.weight"].detach())
    assert _normal(parameters["backbone.blocks.0.mlp.w3.weight"].detach())


def test_initial_weights_are_a_function_of_the_seed() -> None:
    first, again, other = (_initialised(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["backbone.pos_embed"], other["backbone.pos_embed"])


def test_no_two_parameters_start_with_the_same_draws() -> None:
    weights = _initialised().state_dict()
    assert not torch.equal(weights["backbone.blocks.0.attn.qkv.weight"], weights["backbone.blocks.1.attn.qkv.weight"])
    assert not torch.equal(weights["dino_head.last_layer.weight_v"], weights["ibot_head.last_layer.weight_v"])


def test_activation_checkpointing_does_not_change_initial_weights() -> None:
    config = tiny_config()
    plain, wrapped = Network(config), Network(config)
    wrapped.backbone.blocks[0] = checkpoint_wrapper(wrapped.backbone.blocks[0])
    for network in (plain, wrapped):
        initialise(network, 0, 0.1)
    for ours, theirs in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_parameter_without_a_rule_is_an_error() -> None:
    model = tiny_backbone()
    model.extra = nn.Parameter(torch.zeros(3))
    with pytest.raises(AssertionError, match="no rule initialises extra"):
        initialise(model, 0, 0.1)


def _sharded_weights() -> dict[str, Tensor]:
    config = tiny_config()
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with torch.device("meta"):
        network = Network(config)
    fully_shard(network.backbone.blocks[0], mesh=mesh)
    fully_shard(network, mesh=mesh)
    network.to_empty(device="cpu")
    with CommDebugMode() as exchanged:
        initialise(network, 3, 0.1)
    assert exchanged.get_total_counts() == 0
    return {name: value.full_tensor() for name, value in network.state_dict().items()}


@pytest.mark.distributed
def test_a_sharded_model_starts_with_the_weights_of_a_plain_one_without_communication() -> None:
    plain = Network(tiny_config())
    initialise(plain, 3, 0.1)
    for sharded in run_on_ranks(_sharded_weights, 2):
        assert sharded.keys() == plain.state_dict().keys()
        assert all(torch.equal(sharded[name], value) for name, value in plain.state_dict().items())
