"""Sharding changes nothing: neither what a network computes, nor what a run learns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import tiny_batch, tiny_config, tiny_network
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from training import differing, metrics, saved_tensors, this_world, tiny_run, train_alone, train_on_ranks

from dinov2_fsdp.checkpoint import module_tensors
from dinov2_fsdp.config import Config, ParallelConfig
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.optim.groups import clean_name
from dinov2_fsdp.parallel import sharding
from dinov2_fsdp.parallel.place import Place
from dinov2_fsdp.parallel.sharding import build_mesh
from dinov2_fsdp.parallel.world import World, end_world, start_world
from dinov2_fsdp.ssl.ema import Ema
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.ssl.step import SelfDistillation
from dinov2_fsdp.train import build_networks


@pytest.fixture
def world() -> Iterator[World]:
    yield start_world(ParallelConfig(device="cpu", threads=1), Place())
    end_world()


def sharded_networks(config: Config, world: World) -> tuple[Network, Network, Ema]:
    """Student and teacher as a run starts with them."""
    student, teacher = build_networks(config, world)
    ema = Ema(student, teacher)
    initialise(student, config.seed, config.model.layer_scale)
    ema.copy()
    student.train()
    teacher.eval()
    return student, teacher, ema


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_tensors(network: Network) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in module_tensors(network, "").items()}


def unwrapped_root(*args: Any, **kwargs: Any) -> None:
    """parallelise(), but the teacher's root is left to FSDP's default."""
    original = sharding.fully_shard

    def forgetful(module: torch.nn.Module, **options: Any) -> Any:
        if isinstance(module, Network):
            options["reshard_after_forward"] = None
        return original(module, **options)

    sharding.fully_shard = forgetful  # type: ignore[assignment]
    try:
        sharding.parallelise(*args, **kwargs)
    finally:
        sharding.fully_shard = original


def teacher_after_an_update(forget: bool) -> list[str]:
    """Return the outputs in which a sharded teacher, after an EMA update, differs from a plain one with its weights."""
    config, batch = tiny_config(), tiny_batch(tiny_config())
    if forget:
        import dinov2_fsdp.train as train_module

        train_module.parallelise = unwrapped_root  # type: ignore[assignment]
    student, teacher, ema = sharded_networks(config, this_world())
    inputs = ([batch.normalised_globals()], None, batch.masked_patches)
    with torch.no_grad():
        teacher(*inputs)
        for parameter in ema.student:
            parameter.add_(0.1)
        ema.update(0.5, torch.zeros(()))
        found = teacher(*inputs)
        plain = tiny_network(config)
        # The shards, which the update moved; a network that is still gathered would name its old copy.
        for parameter, shards in zip(plain.parameters(), ema.teacher, strict=True):
            parameter.copy_(whole(shards))
        expected = plain(*inputs)
    assert not torch.equal(expected["cls"], tiny_network(config)(*inputs)["cls"])
    return [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.distributed
def test_the_teacher_computes_with_the_weights_of_the_latest_update() -> None:
    assert run_on_ranks(teacher_after_an_update, 2, False) == [[], []]


@pytest.mark.distributed
def test_a_root_that_keeps_its_gathered_weights_would_be_noticed() -> None:
    """The test above is able to fail."""
    for differences in run_on_ranks(teacher_after_an_update, 2, True):
        assert "cls" in differences


def one_step(config: Config, student: Network, teacher: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the targets, loss and outputs of one microbatch, and the student's gradients."""
    method = SelfDistillation(config, student, teacher, torch.device("cpu"))
    batch = tiny_batch(config)
    target = next(method.targets([batch], 0.05))
    loss, meters = method.loss(batch, target)
    loss.backward()
    with torch.no_grad():
        outputs = teacher([batch.normalised_globals()], batch.masks, batch.masked_patches)
    gradients = {clean_name(name): whole(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return {"dino target": target.dino, "ibot target": target.ibot, "loss": loss.detach(), **meters, **outputs}, gradients


@pytest.mark.parametrize("separate", [False, True])
def test_one_sharded_process_computes_what_a_plain_network_does(world: World, separate: bool) -> None:
    config = tiny_config(model__drop_path=0.3, ibot_head__separate=separate)
    student, teacher, _ = sharded_networks(config, world)
    assert isinstance(student, FSDPModule)
    plain_student, plain_teacher = tiny_network(config), tiny_network(config)
    found, gradients = one_step(config, student, teacher)
    expected, plain_gradients = one_step(config, plain_student, plain_teacher)
    assert differing(found, expected) == []
    assert differing(gradients, plain_gradients) == []
    assert gradients.keys() == dict(plain_student.named_parameters()).keys()


@pytest.mark.parametrize("masked", [True, False])
def test_every_parameter_has_a_gradient_with_and_without_masked_patches(world: World, masked: bool) -> None:
    config = tiny_config(ibot_head__separate=True, model__registers=4)
    student, teacher, _ = sharded_networks(config, world)
    method = SelfDistillation(config, student, teacher, world.device)
    batch = tiny_batch(config, masked=masked)
    assert bool(len(batch.masked_patches)) == masked
    loss, _ = method.loss(batch, next(method.targets([batch], 0.05)))
    loss.backward()
    assert [name for name, parameter in student.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_activations_changes_no_gradient(world: World, mode: str) -> None:
    results = []
    for activation_checkpointing in ("none", mode):
        config = tiny_config(model__drop_path=0.3, parallel__activation_checkpointing=activation_checkpointing)
        student, teacher, _ = sharded_networks(config, world)
        results.append((whole_tensors(student), *one_step(config, student, teacher)))
    (weights, found, gradients), (weights_, found_, gradients_) = results
    assert differing(weights, weights_) == []
    assert differing(found, found_) == []
    assert differing(gradients, gradients_) == []


def test_recomputing_activations_recomputes_them(world: World) -> None:
    calls = {}
    for mode in ("none", "selective", "full"):
        config = tiny_config(parallel__activation_checkpointing=mode)
        student, teacher, _ = sharded_networks(config, world)
        seen: list[int] = []
        for index, block in enumerate(student.backbone.blocks):
            block.mlp.fc1.register_forward_hook(lambda *_, index=index: seen.append(index))  # type: ignore[union-attr]
        one_step(config, student, teacher)
        calls[mode] = [seen.count(index) for index in range(len(student.backbone.blocks))]
    assert calls == {"none": [1, 1], "selective": [2, 1], "full": [2, 2]}


def features_and_weights(config: Config) -> tuple[list[str], dict[str, Tensor]]:
    """Return where a sharded teacher's features differ from a plain one's, and all initial weights."""
    student, teacher, _ = sharded_networks(config, this_world())
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        found, expected = teacher.features(images), tiny_network(config).features(images)
    return differing(found, expected), {**whole_tensors(student)}


@pytest.mark.distributed
def test_two_ranks_start_from_the_weights_of_one_and_give_its_features() -> None:
    config = tiny_config(model__registers=4)
    alone = {f".{name}": tensor.detach() for name, tensor in tiny_network(config).named_parameters()}
    for differences, weights in run_on_ranks(features_and_weights, 2, config):
        assert differences == []
        assert differing(weights, alone) == []


@pytest.mark.distributed
@pytest.mark.parametrize("centering", ["softmax", "sinkhorn"])
def test_two_ranks_learn_what_one_rank_learns_with_two_microbatches(tmp_path: Path, centering: str) -> None:
    alone = tiny_run(
        tmp_path / "alone", loss__centering=centering, model__drop_path=0.3, dino_head__batch_norm=True
    )
    together = dataclasses.replace(alone, output_dir=str(tmp_path / "together"))
    train_alone(alone)
    train_on_ranks(together, 2)
    expected, found = saved_tensors(tmp_path / "alone"), saved_tensors(tmp_path / "together")
    assert differing(expected, found) == []
    assert ("centering.dino.centre" in found) == (centering == "softmax")
    for line, line_ in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "together"), strict=True):
        assert line == pytest.approx(line_, rel=1e-6)


@pytest.mark.distributed
def test_replicas_of_shards_learn_what_shards_alone_learn(tmp_path: Path) -> None:
    alone, replicated = tiny_run(tmp_path / "alone"), tiny_run(tmp_path / "replicated", parallel__replicate=2)
    train_alone(alone)
    train_on_ranks(replicated, 2)
    assert differing(saved_tensors(tmp_path / "alone"), saved_tensors(tmp_path / "replicated")) == []


def test_a_run_learns(tmp_path: Path) -> None:
    """Bit-for-bit comparisons of runs would also hold if nothing moved."""
    train_alone(tiny_run(tmp_path, train__duration="2it", optim__freeze_prototypes="0it", optim__warmup="0it"))
    final = saved_tensors(tmp_path)
    start = tiny_network(tiny_run(tmp_path))
    for name, parameter in start.named_parameters():
        assert not torch.equal(final[f"student.{name}"], parameter) or "mask_token" in name, name
    assert not torch.equal(final["teacher.backbone.norm.bias"], start.backbone.norm.bias)


def test_replicas_that_do_not_divide_the_ranks_are_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"parallel.replicate=2 does not divide 1 processes; valid: \[1\]"):
        build_mesh(ParallelConfig(device="cpu", replicate=2), world)
