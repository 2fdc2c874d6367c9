"""Estimated memory and traffic against what autograd keeps and what collectives move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_config
from torch import Tensor

from dinov2_fsdp import footprint as footprint_module
from dinov2_fsdp import native
from dinov2_fsdp.config import Config, load
from dinov2_fsdp.counts import count_parameters, masked_patches
from dinov2_fsdp.data.loader import build_loader
from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.footprint import activation_bytes, footprint, logits_bytes
from dinov2_fsdp.models import attention, frugal, plain_attention
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.planner import GPUS, gpu_of, plan, ways_to_fit
from dinov2_fsdp.ssl import losses
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.ssl.step import SelfDistillation
from dinov2_fsdp.units import traffic

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "model__patch": 14, "model__dim": 96, "model__depth": 4, "model__heads": 3, "crops__global_size": 112,
    "crops__local_size": 56, "crops__local_number": 4, "train__batch": 8, "train__microbatch": 8,
    "dino_head__prototypes": 2048, "dino_head__hidden": 128, "dino_head__bottleneck": 32, "train__precision": "fp32",
    "masks__probability": 1.0, "masks__ratio": [0.3, 0.3], "data__train": "scenes:n=8",
}  # fmt: skip


def config_of(**changes: Any) -> Config:
    return tiny_config(**{**SIZES, "model__drop_path": 0.0, **changes})


def kept_by_autograd(config: Config) -> int:
    """What a microbatch's loss keeps for the backward pass, without the weights themselves."""
    student, teacher = Network(config), Network(config)
    for network in (student, teacher):
        initialise(network, 0, config.model.layer_scale)
        network.backbone.set_attention_backend("math")
    method = SelfDistillation(config, student, teacher, CPU)
    batch = next(build_loader(config, open_source(config.data.train), 0, 1, 0, 1, False))
    (targets,) = method.targets([batch], 0.05)
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        method.loss(batch, targets)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__ffn": "swiglu"},
        {"model__drop_path": 0.4},
        {"model__registers": 4, "crops__local_number": 0},
        {"dino_head__prototypes": 16384},
    ],
    ids=["mlp", "swiglu", "stochastic depth", "registers, no local crops", "many prototypes"],
)
def test_the_estimate_is_what_autograd_keeps(changes: dict[str, Any]) -> None:
    config = config_of(**changes)
    estimate = activation_bytes(config, "cpu") + logits_bytes(config)
    with native.switched_off():
        assert estimate == pytest.approx(kept_by_autograd(config), rel=0.1)


@pytest.mark.skipif(
    (found := native.parallel_library()) is None or not found.has_branches,
    reason="compiled attention needs AVX-512 and an installation with a compiler",
)
def test_compiled_attention_keeps_no_softmax_weights() -> None:
    """A plan is made without knowing whether there will be compiled code, and for a CPU counts them.

    Nor of the last block queries, and what they gather, but for those that are read, whose tokens are kept instead.
    """
    config = config_of()
    with native.switched_off():
        plain = kept_by_autograd(config)
    weights = 4 * 3 * (16 * 65**2 + 32 * 17**2) * 4
    tokens, read = 16 * 65 + 32 * 17, 16 + 32 + config.train.microbatch * masked_patches(config)
    of_last = 96 * (2 * tokens - 3 * read) * 4
    assert plain - kept_by_autograd(config) == pytest.approx(weights + of_last, rel=0.01)


def test_recomputed_blocks_keep_their_input_alone() -> None:
    none, selective, full = (
        activation_bytes(config_of(parallel__activation_checkpointing=mode), "cpu")
        for mode in ("none", "selective", "full")
    )
    assert full < selective < none
    deep = config_of(parallel__activation_checkpointing="full", model__depth=104)
    shallow = config_of(parallel__activation_checkpointing="full", model__depth=4)
    tokens = 16 * 65 + 32 * 17
    assert activation_bytes(deep, "cpu") - activation_bytes(shallow, "cpu") == 100 * tokens * 96 * 4


def test_half_the_precision_takes_half_the_memory() -> None:
    exact, half = (activation_bytes(config_of(train__precision=name), "cpu") for name in ("fp32", "bf16"))
    assert half == exact / 2


def test_plain_attention_ends_at_the_same_length_here_and_in_the_model() -> None:
    """It stands twice, as plans are made without torch."""
    assert footprint_module.MATH_LONGEST == attention.MATH_LONGEST


def test_what_is_computed_at_a_time_is_the_same_here_and_in_the_model() -> None:
    assert footprint_module.LOGITS_AT_A_TIME == losses.CHUNK
    assert footprint_module.ROWS_AT_A_TIME == frugal.CACHED_ROWS
    assert footprint_module.WEIGHTS_AT_A_TIME == plain_attention.CACHED


def test_attention_weights_are_kept_by_plain_attention_alone() -> None:
    plain, fused = (activation_bytes(config_of(parallel__attention=name), "cpu") for name in ("math", "sdpa"))
    tokens = 16 * 65 + 32 * 17
    weights = 4 * 3 * (16 * 65**2 + 32 * 17**2) * 4
    # Instead: the logarithm of each softmax's sum, and each crop size's output beside the one for both.
    assert plain - fused == weights - 4 * 3 * tokens * 4 - 4 * tokens * 96 * 4


def test_traffic_of_one_rank_is_none_and_of_many_that_of_rings() -> None:
    config = load("configs/vitg14.yaml", ["data.train=scenes:n=4000"])
    assert traffic(load("configs/bench.yaml"), 1) == {}
    moved = traffic(config, 128)
    weights = (1_134_776_832 + 58_556_416 + 41_648_384) * 2 * 127 / 128
    assert moved["teacher's weights (all-gather)"] == pytest.approx(2 * weights, rel=0.01)
    assert moved["student's weights (all-gather)"] == pytest.approx(4 * weights, rel=0.02)
    assert moved["gradients (reduce-scatter)"] == pytest.approx(2 * weights, rel=0.01)


def test_several_microbatches_keep_whole_gradients() -> None:
    one, two = (config_of(train__batch=batch, parallel__device="cpu") for batch in (16, 32))
    parameters = count_parameters(one).total
    assert footprint(two, 2, "cpu").gradients == 4 * parameters
    assert footprint(one, 2, "cpu").gradients <= 4 * parameters / 2


def test_sinkhorn_keeps_the_targets_of_all_microbatches() -> None:
    softmax, sinkhorn = (
        footprint(config_of(train__batch=32, loss__centering=name), 1, "cpu") for name in ("softmax", "sinkhorn")
    )
    rows = 16 + 8 * masked_patches(config_of())
    assert sinkhorn.logits - softmax.logits == pytest.approx(3 * rows * 2048 * 4, rel=1e-3)


def test_what_does_not_fit_is_said_with_a_way_out() -> None:
    config = load("configs/vitg14.yaml", ["data.train=scenes:n=4000", "train.batch=1024", "train.microbatch=128"])
    text = plan(config, 8, "cuda", 4000, GPUS[0])
    assert (
        "warning: that is too much for a GPU of 80 GiB; what would fit: parallel.activation_checkpointing=full" in text
    )
    limit = 0.9 * 80 * 2**30
    assert footprint(config, 8, "cuda").total > limit
    (smaller,) = [way for way in ways_to_fit(config, 8, "cuda", limit) if way.startswith("train.microbatch=")]
    changed = load("configs/vitg14.yaml", ["data.train=scenes:n=4000", "train.batch=1024", smaller])
    assert footprint(changed, 8, "cuda").total < limit
    assert "warning" not in plan(changed, 8, "cuda", 4000, GPUS[0])


def test_a_machines_memory_is_compared_where_there_is_no_gpu() -> None:
    config = load("configs/vitl16_in1k.yaml", ["train.batch=64"])
    text = plan(config, 1, "cpu", 4000, memory=16 * 2**30)
    assert "warning: that is too much for the 16 GiB that this machine allows each process; what would fit: " in text
    assert "train.microbatch=" in text
    assert "processes" not in text.partition("what would fit")[2]
    assert "warning" not in plan(config, 1, "cpu", 4000, memory=64 * 2**30)
    assert "warning" not in plan(config, 1, "cpu", 4000)


@pytest.mark.parametrize("asked", [None, False, True])
def test_what_a_rank_keeps_gathered_is_the_first_to_go(asked: bool | None) -> None:
    config = config_of(parallel__reshard_after_forward=asked)
    freed = replace(config, parallel=replace(config.parallel, reshard_after_forward=True))
    held, least = (footprint(each, 1, "cpu").total for each in (config, freed))
    assert (held > least) is (asked is not True)
    ways = ways_to_fit(config, 1, "cpu", held)
    assert (ways[:1] == ["parallel.reshard_after_forward=true"]) is (asked is not True)
    ways = ways_to_fit(config, 1, "cpu", least)
    assert ways
    assert all(way.startswith("parallel.reshard_after_forward=true ") is (asked is not True) for way in ways)


def test_only_a_rank_alone_on_a_cpu_keeps_what_it_gathered() -> None:
    def frees(processes: int, kind: str, **changes: object) -> bool:
        found = footprint(config_of(**changes), processes, kind)
        return found == footprint(config_of(parallel__reshard_after_forward=True, **changes), processes, kind)

    assert not frees(1, "cpu")
    assert frees(1, "cuda")
    assert frees(2, "cpu", train__microbatch=4)
    assert not frees(2, "cpu", train__microbatch=4, parallel__replicate=2)


def test_a_plan_is_for_the_gpu_that_is_named() -> None:
    config = load("configs/vitg14.yaml", ["data.train=scenes:n=4000"])
    large, slow = (plan(config, 128, "cuda", 4000, gpu_of(name)) for name in ("h200", "24,100"))
    assert "warning" not in large
    assert "hours on H200" in large
    assert "A100" not in large
    assert "warning: that is too much for a GPU of 24 GiB" in plan(config, 8, "cuda", 4000, gpu_of("24,100"))
    hours = [
        float(text.partition("assumption): ")[2].partition(" hours")[0].replace(",", "")) for text in (slow, large)
    ]
    assert hours[0] / hours[1] == pytest.approx(989 / 100, rel=1e-3)


@pytest.mark.parametrize("text", ["H1000", "", "80", "80,", "0,100", "80,-1", "nan,1", "1,2,3", "inf,5"])
def test_an_unknown_gpu_is_refused_with_those_that_are_known(text: str) -> None:
    with pytest.raises(UserError, match=r"--gpu .*valid: A100, A100-40GB, H100"):
        gpu_of(text)
