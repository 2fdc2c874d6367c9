"""A checkpoint belongs to a run, not to the processes that wrote it: it loads on other numbers and meshes of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ranks import run_on_ranks
from training import differing, saved_steps, saved_tensors, tiny_run, train_as_rank

from dinov2_fsdp.config import Config

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def run_of(run_dir: Path, **overrides: Any) -> Config:
    """Four steps of four microbatches, saved in the middle; momentum in every moment by then."""
    settings = {"train__microbatch": 2, "checkpoint__every": "2it", "model__drop_path": 0.3}
    return tiny_run(run_dir, **{**settings, **overrides})


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks, from beginning to end."""
    run_dir = tmp_path_factory.mktemp("two") / "run"
    run_on_ranks(train_as_rank, 2, run_of(run_dir))
    return run_dir


@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (4, 1), (4, 2)], ids=["1", "4", "2 × 2"])
def test_a_checkpoint_of_two_ranks_goes_on_elsewhere(two: Path, tmp_path: Path, ranks: int, replicate: int) -> None:
    shutil.copytree(two, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000004")
    config = run_of(tmp_path / "run", parallel__replicate=replicate)
    run_on_ranks(train_as_rank, ranks, config)
    assert saved_steps(tmp_path / "run") == [2, 4]
    found, expected = saved_tensors(tmp_path / "run"), saved_tensors(two)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        # Gradients of four microbatches are added in another order.
        assert found[name].sub(tensor).abs().max() <= 1e-4 * (1 + tensor.abs().max()), name


@pytest.mark.parametrize(("ranks", "replicate"), [(1, 1), (4, 1), (4, 2)])
def test_loading_on_other_ranks_changes_no_bit(two: Path, tmp_path: Path, ranks: int, replicate: int) -> None:
    """A run whose last checkpoint is loaded and saved again by others, without a step in between."""
    shutil.copytree(two, tmp_path / "run")
    config = run_of(tmp_path / "run", parallel__replicate=replicate)
    run_on_ranks(load_and_save, ranks, config)
    assert differing(saved_tensors(tmp_path / "run", 5), saved_tensors(two)) == []


def load_and_save(config: Config) -> None:
    from training import this_world

    from dinov2_fsdp.checkpoint import Checkpointer, module_tensors, optimizer_tensors
    from dinov2_fsdp.optim.build import build_optimizer
    from dinov2_fsdp.optim.groups import parameter_groups
    from dinov2_fsdp.optim.scaler import LossScaler
    from dinov2_fsdp.parallel.sharding import build_networks
    from dinov2_fsdp.ssl.step import SelfDistillation

    world = this_world()
    student, teacher = build_networks(config, world)
    groups = parameter_groups(student.named_parameters(), len(student.backbone.blocks), 0.9, 0.2)
    method = SelfDistillation(config, student, teacher, world.device)
    tensors = {
        **module_tensors(student, "student"),
        **module_tensors(teacher, "teacher"),
        **optimizer_tensors(build_optimizer(groups, "adamw", (0.9, 0.999), 1e-8, 0.9)),
        **method.tensors(),
        **LossScaler(False, world.device).tensors(),
        "skipped_in_a_row": method.centerings["dino"].norm().new_zeros(()),
    }
    saver = Checkpointer(Path(config.output_dir), world, 10, 0, life=9)
    newest = saver.newest()
    assert newest is not None
    saver.load(newest, tensors)
    saver.save(5, tensors, {}, {})
    saver.finish()
