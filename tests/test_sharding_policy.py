"""Every knob of the sharding changes how a step is computed, and not what comes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny import tiny_config
from torch.distributed.fsdp import FSDPModule
from training import differing, saved_tensors, this_world, tiny_run, train_alone, train_as_rank

from dinov2_fsdp.parallel.sharding import build_networks

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def deep_run(run_dir: Path, **overrides: Any) -> Any:
    return tiny_run(run_dir, model__depth=4, model__drop_path=0.3, **overrides)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run_on_ranks(train_as_rank, 2, deep_run(run_dir))
    return run_dir


@pytest.mark.parametrize(
    "policy",
    [
        {"parallel__reshard_after_forward": False},
        {"parallel__blocks_per_unit": 2},
        {"parallel__blocks_per_unit": 3},
        {"parallel__prefetch": 3},
        {"parallel__activation_checkpointing": "full"},
        {"parallel__activation_checkpointing": "selective", "parallel__blocks_per_unit": 2},
    ],
    ids=lambda policy: ", ".join(f"{key[10:]}={value}" for key, value in policy.items()),
)
def test_a_policy_changes_no_bit(reference: Path, tmp_path: Path, policy: dict[str, Any]) -> None:
    run_on_ranks(train_as_rank, 2, deep_run(tmp_path / "run", **policy))
    assert differing(saved_tensors(tmp_path / "run"), saved_tensors(reference)) == []


def test_a_rank_alone_learns_the_same_whether_it_frees_its_weights_or_keeps_them(tmp_path: Path) -> None:
    settings = {"parallel__blocks_per_unit": 3, "ibot_head__separate": True, "train__precision": "bf16"}
    for name, freed in (("kept", None), ("freed", True)):
        train_alone(deep_run(tmp_path / name, parallel__reshard_after_forward=freed, **settings))
    assert differing(saved_tensors(tmp_path / "kept"), saved_tensors(tmp_path / "freed")) == []


def test_replicas_learn_the_same_as_shards(reference: Path, tmp_path: Path) -> None:
    """HSDP sums gradients in another order, so the last bits may differ."""
    run_on_ranks(train_as_rank, 2, deep_run(tmp_path / "run", parallel__replicate=2))
    found, expected = saved_tensors(tmp_path / "run"), saved_tensors(reference)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_compiled_blocks_learn_what_plain_ones_do(tmp_path: Path) -> None:
    """The compiler fuses operations, so the last bits differ."""
    for name, compiled in (("plain", False), ("compiled", True)):
        train_alone(tiny_run(tmp_path / name, model__depth=1, parallel__compile=compiled))
    found, expected = saved_tensors(tmp_path / "compiled"), saved_tensors(tmp_path / "plain")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def precisions() -> dict[str, str]:
    config = tiny_config(
        train__precision="bf16", parallel__heads_precision="fp32", parallel__reduce_precision="bf16",
        parallel__device="cpu",
    )  # fmt: skip
    student, _ = build_networks(config, this_world())
    found = {}
    for name, module in (("block", student.backbone.blocks[0]), ("head", student.dino_head)):
        assert isinstance(module, FSDPModule)
        policy = module._get_fsdp_state()._mp_policy
        found[name] = f"{policy.param_dtype} {policy.reduce_dtype}"
    return found


def test_each_part_has_its_precision() -> None:
    assert run_on_ranks(precisions, 1) == [
        {"block": "torch.bfloat16 torch.bfloat16", "head": "torch.float32 torch.bfloat16"}
    ]
