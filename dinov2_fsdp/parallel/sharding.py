"""How a network is spread over ranks: applied from outside, the model knows nothing of it.

The order is fixed: activation checkpointing, then compilation, then sharding.
"""

from __future__ import annotations

import functools

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard

from dinov2_fsdp.config import Config, ParallelConfig, frees_gathered
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.attention import resolve_backend
from dinov2_fsdp.parallel.world import World
from dinov2_fsdp.ssl.network import Network

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def build_mesh(config: ParallelConfig, world: World) -> DeviceMesh:
    """Return the mesh that parameters are sharded over: (shard,), or (replicate, shard) for HSDP.

    Raises:
        UserError: ``parallel.replicate`` does not divide the number of ranks.
    """
    if config.replicate == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    if world.size % config.replicate:
        valid = [n for n in range(1, world.size + 1) if world.size % n == 0]
        raise UserError(f"parallel.replicate={config.replicate} does not divide {world.size} processes; valid: {valid}")
    shape = (config.replicate, world.size // config.replicate)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicate", "shard"))


def parallelise(network: Network, config: ParallelConfig, mesh: DeviceMesh, precision: str, trained: bool) -> None:
    """Checkpoint, compile and shard a network in place, block by block.

    Weights stay in fp32; they are gathered, and everything is computed, in ``precision``; gradients are reduced in
    fp32. ``trained`` is False for the teacher.
    """
    blocks = network.backbone.blocks
    every = {"none": 0, "selective": 2, "full": 1}[config.activation_checkpointing]
    if trained and every:
        for index in range(0, len(blocks), every):
            blocks[index] = checkpoint_wrapper(blocks[index])
    if config.compile:
        for block in blocks:
            block.compile(dynamic=True)
    sums = PRECISIONS[config.reduce_precision]
    policy = MixedPrecisionPolicy(param_dtype=PRECISIONS[precision], reduce_dtype=sums)
    heads_policy = MixedPrecisionPolicy(param_dtype=PRECISIONS[config.heads_precision or precision], reduce_dtype=sums)
    # The teacher must free its weights after every pass: gathered ones would not see the EMA's updates.
    reshard = frees_gathered(config, mesh.size(mesh.ndim - 1), mesh.device_type) or not trained
    size = config.blocks_per_unit
    units = [list(blocks[start : start + size]) for start in range(0, len(blocks), size)]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    for head in (network.dino_head, network.ibot_head):
        if head is not None:
            fully_shard(head, mesh=mesh, mp_policy=heads_policy, reshard_after_forward=reshard)
    # A root left alone keeps its gathered weights after a forward pass without gradients, for ever.
    fully_shard(
        network,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=not trained,
        shard_placement_fn=functools.partial(split_along, shards=mesh.size(mesh.ndim - 1)),
    )
    register_fsdp_forward_method(network, "features")
    if config.prefetch > 1:
        _prefetch([unit[0] for unit in units], config.prefetch)


def split_along(parameter: nn.Parameter, shards: int) -> Shard | None:
    """Return the dimension along which FSDP splits a parameter; None: the first, with padding to a row for each rank.

    The embeddings of positions, class, registers and mask are one row. Padded, the first alone is 4 % of what 128 ranks
    of ViT-g exchange, so they are split along their channels; FSDP does that without a remainder only.
    """
    last = parameter.ndim - 1
    single = last > 0 and parameter.shape[0] == 1 and shards > 1 and parameter.shape[last] % shards == 0
    return Shard(last) if single else None


def _prefetch(units: list[nn.Module], ahead: int) -> None:
    """Let each unit start to gather the weights of those that come after it, on the way forward and back."""
    for index, unit in enumerate(units):
        assert isinstance(unit, FSDPModule)
        unit.set_modules_to_forward_prefetch(units[index + 1 : index + 1 + ahead])  # type: ignore[arg-type]
        unit.set_modules_to_backward_prefetch(units[max(0, index - ahead) : index][::-1])  # type: ignore[arg-type]


def held_bytes(student: Network, teacher: Network) -> dict[str, int]:
    """Return the bytes that this rank holds for good: weights, the teacher's weights, gradients, AdamW's two moments.

    Works on the meta device too, where nothing is allocated.
    """

    def local(network: Network, trained: bool = False) -> int:
        parameters = [p for p in network.parameters() if p.requires_grad or not trained]
        return sum((p.to_local() if isinstance(p, DTensor) else p).numel() * p.element_size() for p in parameters)

    trained = local(student, trained=True)
    return {"weights": local(student), "teacher": local(teacher), "gradients": trained, "optimizer": 2 * trained}


def build_networks(config: Config, world: World) -> tuple[Network, Network]:
    """Return the sharded student and teacher, on the meta device until every shard knows its place, then filled."""
    mesh = build_mesh(config.parallel, world)
    networks = []
    for trained in (True, False):
        with torch.device("meta"):
            network = Network(config)
        network.backbone.set_attention_backend(
            resolve_backend(config.parallel.attention, world.device, config.train.precision)
        )
        if not trained:
            network.requires_grad_(False)
        parallelise(network, config.parallel, mesh, config.train.precision, trained)
        network.to_empty(device=world.device)
        networks.append(network)
    return networks[0], networks[1]
