"""A run that continues a trained backbone: what is loaded, how long it waits, how fast it learns afterwards."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import randomise
from ranks import run_on_ranks
from tiny import tiny_batch, tiny_config, tiny_images, tiny_network
from torch import Tensor, nn
from training import differing, saved_tensors, this_world, tiny_run, train_alone

from dinov2_fsdp.checkpoint import module_tensors
from dinov2_fsdp.config import Config
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.factory import build_backbone
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.optim.build import build_optimizer
from dinov2_fsdp.optim.groups import apply_step_values, parameter_groups
from dinov2_fsdp.optim.schedules import Frozen, StepValues, build_schedules
from dinov2_fsdp.ssl.ema import Ema
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.ssl.step import SelfDistillation
from dinov2_fsdp.train import build_networks
from dinov2_fsdp.weights import export_backbone, load_backbone
from dinov2_fsdp.weights.backbone import LoadedBackbone
from dinov2_fsdp.weights.initial import start_from


def released(config: Config, image_size: int, seed: int = 5) -> LoadedBackbone:
    """A trained backbone of the config's architecture, with positions for another size."""
    model = build_backbone(config.model, image_size)
    randomise(model, seed)
    return LoadedBackbone(model.eval().requires_grad_(False), config.model, image_size, None, None, "somewhere")


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


def part(network: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in network.items() if name.startswith(prefix)}


# -- what is loaded ---------------------------------------------------------------------------------------------------


def test_student_and_teacher_get_the_backbone_and_keep_their_heads(tmp_path: Path) -> None:
    config = tiny_config(ibot_head__separate=True)
    trained = released(config, 16)
    export_backbone(trained, tmp_path / "trained.safetensors")
    networks = [tiny_network(config, seed) for seed in (0, 1)]
    before = [tensors(network) for network in networks]
    start_from(tmp_path / "trained.safetensors", config.model, *[network.backbone for network in networks])
    for network, old in zip(networks, before, strict=True):
        new = tensors(network)
        assert differing(part(new, "backbone."), tensors(trained.model)) == []
        for head in ("dino_head.", "ibot_head."):
            assert differing(part(new, head), part(old, head)) == []


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("image_size", [8, 36])
def test_positions_are_stretched_to_the_crops(image_size: int, registers: int, tmp_path: Path) -> None:
    config = tiny_config(model__registers=registers)
    trained = released(config, image_size)
    export_backbone(trained, tmp_path / "trained.safetensors")
    network = tiny_network(config)
    start_from(tmp_path / "trained.safetensors", config.model, network.backbone)
    # At the size of the global crops the released model would interpolate to just these positions.
    assert torch.equal(network.backbone(tiny_images(2)), trained.model(tiny_images(2)))


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "first"
    train_alone(tiny_run(run, train__duration="1it", optim__warmup="0it"))
    return run


def test_a_runs_teacher_can_be_continued(first_run: Path) -> None:
    config = tiny_config()
    network = tiny_network(config, seed=9)
    weights = start_from(first_run, config.model, network.backbone)
    assert differing(tensors(network.backbone), tensors(load_backbone(first_run).model)) == []
    assert "run weights, vits4 (width 24, 2 blocks, 3 heads)" in str(weights)


def test_a_damaged_checkpoint_is_not_continued(first_run: Path, tmp_path: Path) -> None:
    shutil.copytree(first_run, tmp_path / "copy")
    (folder,) = (tmp_path / "copy" / "checkpoints").iterdir()
    tensors_file = next(folder.glob("*.safetensors"))
    content = bytearray(tensors_file.read_bytes())
    content[-1] ^= 1
    tensors_file.write_bytes(content)
    network = tiny_network(tiny_config())
    for path in (folder, tmp_path / "copy"):
        with pytest.raises(UserError, match=f"{folder.name} is damaged: {tensors_file.name}"):
            start_from(path, tiny_config().model, network.backbone)


@pytest.mark.parametrize(
    ("file", "asked", "overrides"),
    [
        ({"registers": 4}, {}, "model.registers=4"),
        ({}, {"registers": 4}, "model.registers=0"),
        ({"layer_scale": 0.0}, {}, "model.layer_scale=0"),
        ({}, {"layer_scale": 0.0}, "model.layer_scale=0.1"),
        ({"depth": 3}, {}, "model.arch=vits model.dim=24 model.depth=3 model.heads=3"),
        ({"heads": 4}, {}, "model.arch=vits model.dim=24 model.depth=2 model.heads=4"),
        ({"ffn": "swiglu", "patch": 8}, {}, "model.ffn=swiglu model.patch=8"),
        ({"mlp_ratio": 2.0}, {}, "model.mlp_ratio=2.0"),
    ],
    ids=str,
)
def test_another_model_is_refused_with_the_keys_that_fit_it(
    file: dict[str, Any], asked: dict[str, Any], overrides: str, tmp_path: Path
) -> None:
    held = tiny_config(**{f"model__{key}": value for key, value in file.items()})
    config = tiny_config(**{f"model__{key}": value for key, value in asked.items()})
    export_backbone(released(held, 16), tmp_path / "trained.safetensors")
    before = tensors(network := tiny_network(config))
    with pytest.raises(UserError) as caught:
        start_from(tmp_path / "trained.safetensors", config.model, network.backbone)
    assert str(tmp_path / "trained.safetensors") in str(caught.value)
    assert str(caught.value).endswith(f"to start from it, set {overrides}")
    assert differing(tensors(network), before) == []


def sharded_start(config: Config, file: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    student, teacher = build_networks(config, this_world())
    ema = Ema(student, teacher)
    initialise(student, config.seed, config.model.layer_scale)
    start_from(file, config.model, student.backbone)
    ema.copy()
    return whole(student), whole(teacher)


def whole(network: Network) -> dict[str, Tensor]:
    return {
        name: tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()
        for name, tensor in module_tensors(network, "network").items()
    }


@pytest.mark.distributed
def test_shards_are_filled_with_the_same_bits(tmp_path: Path) -> None:
    config = tiny_config(parallel__device="cpu", parallel__threads=1, parallel__activation_checkpointing="full")
    export_backbone(released(config, 36), tmp_path / "trained.safetensors")
    file = str(tmp_path / "trained.safetensors")
    plain = tiny_network(config)
    start_from(file, config.model, plain.backbone)
    for student, teacher in run_on_ranks(sharded_start, 2, config, file):
        assert differing(student, whole(plain)) == []
        assert differing(teacher, whole(plain)) == []


# -- how long it waits ------------------------------------------------------------------------------------------------


def schedules(**changes: Any) -> Any:
    arguments: dict[str, Any] = {
        "total_steps": 10,
        "warmup_steps": 0,
        "learning_rate": 1.0,
        "min_learning_rate": 1.0,
        "weight_decay": 0.1,
        "weight_decay_end": 0.1,
        "teacher_momentum": 0.9,
        "teacher_momentum_end": 1.0,
        "teacher_temperature_start": 0.05,
        "teacher_temperature": 0.05,
        "teacher_temperature_warmup_steps": 0,
        "freeze_prototypes_steps": 0,
    }
    return build_schedules(**{**arguments, **changes})


def test_the_backbone_is_frozen_and_then_learns_at_its_own_rate() -> None:
    values = schedules(freeze_backbone_steps=3, backbone_learning_rate=0.2)
    assert [values(step).backbone_factor for step in range(5)] == [0.0, 0.0, 0.0, 0.2, 0.2]
    assert {values(step).learning_rate for step in range(5)} == {1.0}


def test_without_the_keys_the_backbone_learns_like_the_rest() -> None:
    assert {schedules()(step).backbone_factor for step in range(10)} == {1.0}
    assert Frozen(0.3, 0)(0) == 0.3


def groups_of(network: Network) -> list[dict[str, Any]]:
    return parameter_groups(network.named_parameters(), len(network.backbone.blocks), 0.5, 0.2)


def test_the_factor_multiplies_the_backbones_rates_alone() -> None:
    network = tiny_network(tiny_config())
    optimizer = build_optimizer(groups_of(network), "adamw", (0.9, 0.999), 1e-8, 0.9)
    apply_step_values(optimizer, StepValues(2.0, 0.5, 0.1, 0.99, 0.07, backbone_factor=0.1))
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["names"]}
    assert rates["backbone.norm.weight"] == pytest.approx(0.2)
    assert rates["backbone.blocks.1.attn.qkv.weight"] == pytest.approx(0.1)
    assert rates["backbone.patch_embed.proj.weight"] == pytest.approx(2 * 0.1 * 0.5**3 * 0.2)
    assert rates["dino_head.mlp.0.weight"] == 2.0
    assert rates["dino_head.last_layer.weight_v"] == 0.5


@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_frozen_backbone_keeps_its_bits_while_the_heads_learn(name: str) -> None:
    config = tiny_config()
    student, teacher = tiny_network(config), tiny_network(config)
    teacher.requires_grad_(False)
    method, ema = SelfDistillation(config, student, teacher, torch.device("cpu")), Ema(student, teacher)
    optimizer = build_optimizer(groups_of(student), name, (0.9, 0.999), 1e-8, 0.9)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), None
    values = schedules(learning_rate=1e-2, min_learning_rate=1e-2, freeze_backbone_steps=2, backbone_learning_rate=0.1)
    states = [tensors(student)]
    for step in range(3):
        apply_step_values(optimizer, values(step))
        batch = tiny_batch(config, step)
        loss, _ = method.loss(batch, next(method.targets([batch], 0.05)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update(0.9, torch.zeros(()))
        method.commit(torch.zeros(()))
        states.append(tensors(student))
        if step < 2:
            assert differing(part(tensors(teacher), "backbone."), part(states[0], "backbone.")) == []
    first, *frozen, thawed = states
    for state in frozen:
        assert differing(part(state, "backbone."), part(first, "backbone.")) == []
        assert "mlp.0.weight" in differing(part(state, "dino_head."), part(first, "dino_head."))
    assert "blocks.0.attn.qkv.weight" in differing(part(thawed, "backbone."), part(first, "backbone."))


# -- a whole run ------------------------------------------------------------------------------------------------------


def continued(run: Path, file: Path, **overrides: Any) -> Config:
    """A run of four steps that starts from a file and keeps the backbone for two of them."""
    settings: dict[str, Any] = {
        "init__backbone": str(file),
        "init__freeze": "50%",
        "init__backbone_lr": 0.5,
        "checkpoint__every": "1it",
        "optim__warmup": "0it",
        "optim__freeze_prototypes": "0it",
    }
    return tiny_run(run, **{**settings, **overrides})


@pytest.fixture(scope="module")
def trained_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "trained.safetensors"
    export_backbone(released(tiny_config(), 16), path)
    return path


@pytest.fixture(scope="module")
def second_run(trained_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "second"
    train_alone(continued(run, trained_file))
    return run


def test_a_run_keeps_the_backbone_it_was_given_while_its_heads_learn(second_run: Path, trained_file: Path) -> None:
    given = tensors(load_backbone(trained_file).model)
    first, frozen, thawed = (saved_tensors(second_run, step) for step in (1, 2, 3))
    for state in (first, frozen):
        for network in ("student", "teacher"):
            assert differing(part(state, f"{network}.backbone."), given) == []
    assert "mlp.0.weight" in differing(part(first, "student.dino_head."), part(frozen, "student.dino_head."))
    for network in ("student", "teacher"):
        assert "blocks.0.attn.qkv.weight" in differing(part(thawed, f"{network}.backbone."), given)


def test_a_backbones_own_rate_slows_it_alone(second_run: Path, trained_file: Path, tmp_path: Path) -> None:
    train_alone(continued(tmp_path / "slow", trained_file, init__backbone_lr=0.005))
    given = tensors(load_backbone(trained_file).model)["blocks.0.attn.qkv.weight"]
    # The first step of Adam is as long as its rate, whatever the gradient.
    fast, slow = (saved_tensors(run, 3) for run in (second_run, tmp_path / "slow"))
    steps = [(state["student.backbone.blocks.0.attn.qkv.weight"] - given).norm() for state in (fast, slow)]
    assert float(steps[0] / steps[1]) == pytest.approx(100, rel=0.05)
    assert differing(part(fast, "student.dino_head."), part(slow, "student.dino_head.")) == []


@pytest.mark.slow
def test_a_run_that_resumes_does_not_start_from_the_backbone_again(
    second_run: Path, trained_file: Path, tmp_path: Path
) -> None:
    moved = shutil.copy(trained_file, tmp_path / "trained.safetensors")
    train_alone(config := continued(tmp_path / "run", moved))
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{step:08d}")
    moved.unlink()
    train_alone(config)
    assert differing(saved_tensors(tmp_path / "run", 4), saved_tensors(second_run, 4)) == []
