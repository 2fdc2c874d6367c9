"""Sharding changes nothing: neither what a network computes, nor what a run learns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import tiny_batch, tiny_config, tiny_network
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from training import differing, metrics, saved_tensors, this_world, tiny_run, train_alone, train_as_rank

from dinov2_fsdp.checkpoint import module_tensors
from dinov2_fsdp.config import Config, ParallelConfig
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models import frugal
from dinov2_fsdp.models.attention import resolve_backend
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.optim.groups import clean_name
from dinov2_fsdp.parallel import sharding
from dinov2_fsdp.parallel.place import Place
from dinov2_fsdp.parallel.sharding import build_mesh, build_networks, split_along
from dinov2_fsdp.parallel.world import World, end_world, start_world
from dinov2_fsdp.ssl.ema import Ema
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.ssl.step import SelfDistillation


@pytest.fixture
def world() -> Iterator[World]:
    threads = torch.get_num_threads()
    yield start_world(ParallelConfig(device="cpu", threads=1), Place())
    end_world()
    torch.set_num_threads(threads)


def sharded_networks(config: Config, world: World) -> tuple[Network, Network, Ema]:
    """Student and teacher as a run starts with them."""
    student, teacher = build_networks(config, world)
    ema = Ema(student, teacher)
    initialise(student, config.seed, config.model.layer_scale)
    ema.copy()
    student.train()
    teacher.eval()
    return student, teacher, ema


def plain_network(config: Config) -> Network:
    """The same network, never sharded."""
    network = tiny_network(config)
    network.backbone.set_attention_backend(resolve_backend(config.parallel.attention, torch.device("cpu")))
    return network


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights(network: Network) -> dict[str, Tensor]:
    return {name: whole(tensor) for name, tensor in module_tensors(network, "network").items()}


def one_step(config: Config, student: Network, teacher: Network) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the targets, losses and outputs of one microbatch, and the student's gradients."""
    method = SelfDistillation(config, student, teacher, torch.device("cpu"))
    batch = tiny_batch(config)
    target = next(method.targets([batch], 0.05))
    loss, meters = method.loss(batch, target)
    loss.backward()
    with torch.no_grad():
        outputs = teacher([batch.normalised_globals()], batch.masks, batch.masked_patches)
    gradients = {clean_name(name): whole(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return {
        "dino target": target.dino,
        "ibot target": target.ibot,
        "loss": loss.detach(),
        **meters,
        **outputs,
    }, gradients


# ---------------------------------------------------------------------------------------------------------------------
# One process.


@pytest.mark.parametrize("separate", [False, True])
def test_one_sharded_process_computes_what_a_plain_network_does(world: World, separate: bool) -> None:
    config = tiny_config(model__drop_path=0.3, ibot_head__separate=separate)
    student, teacher, _ = sharded_networks(config, world)
    assert isinstance(student, FSDPModule)
    plain_student, plain_teacher = plain_network(config), plain_network(config)
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


def test_the_teacher_asks_for_no_gradient_and_a_fixed_gain_stays(world: World) -> None:
    student, teacher = build_networks(tiny_config(dino_head__fixed_gain=True), world)
    assert [name for name, parameter in teacher.named_parameters() if parameter.requires_grad] == []
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == ["dino_head.last_layer.weight_g"]


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_recomputing_activations_changes_neither_start_nor_gradient(world: World, mode: str) -> None:
    results = []
    for activation_checkpointing in ("none", mode):
        config = tiny_config(model__drop_path=0.3, parallel__activation_checkpointing=activation_checkpointing)
        student, teacher, _ = sharded_networks(config, world)
        results.append((weights(student), *one_step(config, student, teacher)))
    for kept, recomputed in zip(*results, strict=True):
        assert differing(kept, recomputed) == []


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 0.15)])
def test_a_step_a_few_rows_at_a_time_differs_by_rounding(
    world: World, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(model__drop_path=0.3, parallel__activation_checkpointing="full", train__precision=precision)
    results = []
    for rows in (512, 8):
        monkeypatch.setattr(frugal, "CACHED_ROWS", rows)
        student, teacher, _ = sharded_networks(config, world)
        found, gradients = one_step(config, student, teacher)
        results.append({**found, **gradients})
    whole_batch, few_rows = results
    assert whole_batch.keys() == few_rows.keys()
    assert differing(whole_batch, few_rows) != [], "the same, to the last bit: were they taken a few at a time?"
    for name, expected in whole_batch.items():
        error = (few_rows[name].double() - expected.double()).norm()
        assert error <= tolerance * expected.double().norm() + 1e-8, name


def test_recomputing_activations_recomputes_every_second_or_every_block(world: World) -> None:
    calls = {}
    for mode in ("none", "selective", "full"):
        config = tiny_config(parallel__activation_checkpointing=mode)
        student, teacher, _ = sharded_networks(config, world)
        seen: list[int] = []
        for index, block in enumerate(student.backbone.blocks):
            inner = getattr(block, "_checkpoint_wrapped_module", block)
            inner.register_forward_pre_hook(lambda *_, to=seen, index=index: to.append(index))
        one_step(config, student, teacher)
        calls[mode] = [seen.count(index) for index in range(len(student.backbone.blocks))]
    assert calls == {"none": [1, 1], "selective": [2, 1], "full": [2, 2]}


def blocks_of_four(world: World, **overrides: Any) -> tuple[Network, list[Any]]:
    """A sharded student of four blocks, and what FSDP knows of each."""
    student, _, _ = sharded_networks(tiny_config(model__depth=4, **overrides), world)
    return student, [block._get_fsdp_state() for block in student.backbone.blocks]


@pytest.mark.parametrize(("size", "units"), [(1, 4), (2, 2), (3, 2), (9, 1)])
def test_as_many_blocks_as_asked_for_are_gathered_together(world: World, size: int, units: int) -> None:
    student, states = blocks_of_four(world, parallel__blocks_per_unit=size)
    assert len({id(state) for state in states}) == units
    assert all(state is not student._get_fsdp_state() for state in states), "none is left to the root"  # type: ignore


@pytest.mark.parametrize(("asked", "freed"), [(True, True), (False, False), (None, False)])
def test_weights_are_freed_after_the_forward_pass_or_kept(world: World, asked: bool | None, freed: bool) -> None:
    """Where nothing is asked for, a rank that has them whole anyway keeps them."""
    student, _ = blocks_of_four(world, parallel__reshard_after_forward=asked)
    student([torch.zeros(2, 3, 16, 16)], None, torch.tensor([0]))
    assert [isinstance(block.attn.qkv.weight, DTensor) for block in student.backbone.blocks] == [freed] * 4


def weights_are_freed() -> bool:
    student, _ = blocks_of_four(this_world())
    student([torch.zeros(2, 3, 16, 16)], None, torch.tensor([0]))
    return all(isinstance(block.attn.qkv.weight, DTensor) for block in student.backbone.blocks)


@pytest.mark.distributed
def test_two_ranks_free_the_weights_they_share() -> None:
    assert run_on_ranks(weights_are_freed, 2) == [True, True]


def test_units_gather_as_many_others_ahead_as_asked_for(world: World) -> None:
    def ahead(prefetch: int) -> list[list[int]]:
        _, states = blocks_of_four(world, parallel__prefetch=prefetch)
        place = {id(state): index for index, state in enumerate(states)}
        wanted = [(*state._states_to_forward_prefetch, *state._states_to_backward_prefetch) for state in states]
        return [[place[id(state)] for state in found] for found in wanted]

    assert ahead(1) == [[], [], [], []], "one is what FSDP does by itself"
    assert ahead(2) == [[1, 2], [2, 3, 0], [3, 1, 0], [2, 1]]


@pytest.mark.parametrize("compiled", [True, False])
def test_every_block_is_compiled_or_none(world: World, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    seen: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: seen.append(self))
    student, _ = blocks_of_four(world, parallel__compile=compiled)
    assert [sum(module is block for module in seen) for block in student.backbone.blocks] == [int(compiled)] * 4


def test_gradients_are_exchanged_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the last microbatch they stay where they are: a rank's shard has none yet."""
    original, before = SelfDistillation.loss, []

    def loss(self: SelfDistillation, batch: Any, targets: Any) -> Any:
        before.append(sum(parameter.grad is not None for parameter in self.student.parameters()))
        return original(self, batch, targets)

    monkeypatch.setattr(SelfDistillation, "loss", loss)
    train_alone(tiny_run(tmp_path, train__duration="2it", train__microbatch=2))
    assert before == [0] * 8


def test_a_run_moves_every_weight(tmp_path: Path) -> None:
    """Comparisons of runs, bit for bit, would hold too if nothing moved."""
    config = tiny_run(tmp_path, train__duration="2it", optim__freeze_prototypes="0it", optim__warmup="0it")
    train_alone(config)
    final, start = saved_tensors(tmp_path), dict(plain_network(config).named_parameters())
    assert [name for name in start if torch.equal(final[f"student.{name}"], start[name])] == []
    assert [name for name in start if torch.equal(final[f"teacher.{name}"], final[f"student.{name}"])] == []


def test_replicas_that_do_not_divide_the_ranks_are_refused(world: World) -> None:
    with pytest.raises(UserError, match=r"parallel.replicate=2 does not divide 1 processes; valid: \[1\]"):
        build_mesh(ParallelConfig(device="cpu", replicate=2), world)


# ---------------------------------------------------------------------------------------------------------------------
# Two processes. They do one thing after the other in one life: to start them takes longest.


def teacher_after_an_update(forget: bool) -> list[str]:
    """Return the outputs in which a sharded teacher, after an EMA update, differs from a plain one with its weights.

    ``forget``: leave the teacher's root to FSDP's default.
    """
    original = sharding.fully_shard

    def forgetful(module: nn.Module, **options: Any) -> Any:
        if isinstance(module, Network):
            options["reshard_after_forward"] = None
        return original(module, **options)

    config = tiny_config()
    batch = tiny_batch(config)
    inputs = ([batch.normalised_globals()], None, batch.masked_patches)
    sharding.fully_shard = forgetful if forget else original  # type: ignore[assignment]
    try:
        _, teacher, ema = sharded_networks(config, this_world())
    finally:
        sharding.fully_shard = original
    plain = plain_network(config)
    with torch.no_grad():
        before = teacher(*inputs)
        for parameter in ema.student:
            parameter.mul_(1.5)
        ema.update(0.5, torch.zeros(()))
        found = teacher(*inputs)
        # From the shards, which the update moved: a network that is still gathered would show its old copy.
        for parameter, shards in zip(plain.parameters(), ema.teacher, strict=True):
            parameter.copy_(whole(shards))
        expected = plain(*inputs)
    assert not torch.equal(expected["cls"], before["cls"])
    return differing(expected, found)


def start_of_a_run() -> tuple[dict[str, Tensor], list[str], dict[str, tuple[int, ...]]]:
    """Return the student's first weights, where a sharded teacher's features differ from a plain network's, and the
    shapes of what this rank holds of each embedding."""
    config = tiny_config(model__registers=4)
    student, teacher, _ = sharded_networks(config, this_world())
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    with torch.no_grad():
        found, expected = teacher.features(images), plain_network(config).features(images)
    own = {n: tuple(p.to_local().shape) for n, p in student.backbone.named_parameters() if p.shape[0] == 1}
    return weights(student), differing(found, expected), own


def train_all(configs: list[Config]) -> None:
    for config in configs:
        train_as_rank(config)


def look_at_all() -> dict[str, Any]:
    return {
        "careful": teacher_after_an_update(forget=False),
        "forgetful": teacher_after_an_update(forget=True),
        "start": start_of_a_run(),
    }


RUNS: dict[str, dict[str, Any]] = {
    "softmax": {"model__drop_path": 0.3, "dino_head__batch_norm": True},
    "sinkhorn": {"model__drop_path": 0.3, "ibot_head__separate": True, "loss__centering": "sinkhorn"},
    "replicas": {},
}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run_on_ranks(look_at_all, 2)


@pytest.fixture(scope="module")
def runs_of_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run directories."""
    folder = tmp_path_factory.mktemp("runs_of_two_ranks")
    configs = [tiny_run(folder / name, **settings) for name, settings in RUNS.items()]
    configs[-1].parallel.replicate = 2
    run_on_ranks(train_all, 2, configs)
    return folder


@pytest.mark.distributed
def test_the_teacher_computes_with_the_weights_of_the_latest_update(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["careful"] for rank in two_ranks] == [[], []]


@pytest.mark.distributed
def test_a_teacher_that_keeps_its_gathered_root_is_noticed(two_ranks: list[dict[str, Any]]) -> None:
    """The test above can fail: with FSDP's default for a root the teacher goes stale."""
    for rank in two_ranks:
        assert rank["forgetful"] == ["cls", "dino", "ibot"]


@pytest.mark.distributed
def test_two_ranks_start_from_the_weights_of_one(two_ranks: list[dict[str, Any]]) -> None:
    alone = module_tensors(plain_network(tiny_config(model__registers=4)), "network")
    for rank in two_ranks:
        assert differing(rank["start"][0], alone) == []


@pytest.mark.distributed
def test_a_sharded_teacher_gives_features_outside_its_forward(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["start"][1] for rank in two_ranks] == [[], []]


@pytest.mark.distributed
def test_each_rank_holds_its_channels_of_what_has_a_single_row(two_ranks: list[dict[str, Any]]) -> None:
    backbone = plain_network(tiny_config(model__registers=4)).backbone
    dim, positions = backbone.embed_dim, backbone.pos_embed.shape[1]
    tokens = {"cls_token": (1, 1), "pos_embed": (1, positions), "register_tokens": (1, 4), "mask_token": (1,)}
    for rank in two_ranks:
        assert rank["start"][2] == {name: (*shape, dim // 2) for name, shape in tokens.items()}


@pytest.mark.parametrize(
    ("shape", "shards", "dimension"),
    [
        ((1, 257, 384), 128, 2),
        ((1, 384), 3, 1),
        ((1, 257, 384), 5, None),  # FSDP cannot split it evenly
        ((1, 257, 384), 1, None),
        ((384,), 3, None),
        ((1,), 1, None),
        ((384, 384), 3, None),
    ],
)
def test_single_rows_are_split_along_their_channels(shape: tuple[int, ...], shards: int, dimension: int | None) -> None:
    found = split_along(nn.Parameter(torch.empty(shape, device="meta")), shards)
    assert (None if found is None else found.dim) == dimension


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_learn_what_one_rank_learns_with_two_microbatches(
    runs_of_two_ranks: Path, tmp_path: Path, name: str
) -> None:
    """The last one shards over one rank and keeps two replicas (HSDP)."""
    train_alone(tiny_run(tmp_path, **RUNS[name]))
    together = runs_of_two_ranks / name
    assert differing(saved_tensors(tmp_path), saved_tensors(together)) == []
    for line, line_ in zip(metrics(tmp_path), metrics(together), strict=True):
        assert line == pytest.approx(line_, rel=1e-6)
    assert len(metrics(tmp_path)) == 2
