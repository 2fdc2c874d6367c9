"""fp16's loss scale: where it goes, and that it leaves no trace in what is learnt."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training import differing, saved_tensors, tiny_run, train_alone

from dinov2_fsdp.config import Config, ParallelConfig
from dinov2_fsdp.optim.scaler import LossScaler
from dinov2_fsdp.parallel.place import Place
from dinov2_fsdp.parallel.world import end_world, start_world

CPU = torch.device("cpu")
GOOD, OVERFLOW = torch.zeros(()), torch.ones(())


@pytest.fixture
def one_rank_world() -> Iterator[None]:
    threads = torch.get_num_threads()
    start_world(ParallelConfig(device="cpu", threads=1), Place())
    yield
    end_world()
    torch.set_num_threads(threads)


def scales(steps: str, interval: int = 3) -> list[float]:
    """The scale, from 16, after each step: x is an overflow, anything else is none."""
    scaler, found = LossScaler(True, CPU, initial=16.0, interval=interval), []
    for step in steps:
        scaler.update(OVERFLOW if step == "x" else GOOD)
        found.append(scaler.scale.item())
    return found


def test_an_overflow_halves_the_scale() -> None:
    assert scales("x.x") == [8.0, 8.0, 4.0]


def test_good_steps_in_a_row_double_the_scale() -> None:
    assert scales(".......") == [16.0, 16.0, 32.0, 32.0, 32.0, 64.0, 64.0]


def test_an_overflow_begins_the_row_anew() -> None:
    assert scales("..x..x...") == [16.0, 16.0, 8.0, 8.0, 8.0, 4.0, 4.0, 4.0, 8.0]


def test_by_default_it_starts_at_32768_and_doubles_after_2000_steps() -> None:
    scaler = LossScaler(True, CPU)
    assert scaler.scale.item() == 2.0**15
    for _ in range(1999):
        scaler.update(GOOD)
    assert scaler.scale.item() == 2.0**15
    scaler.update(GOOD)
    assert scaler.scale.item() == 2.0**16


def gradients(scaler: LossScaler, weight: Tensor) -> Tensor:
    weight = weight.clone().requires_grad_()
    scaler.scaled((weight**2).sum()).backward()
    assert weight.grad is not None
    return weight.grad


def test_the_backward_pass_is_scaled_and_the_gradient_is_not() -> None:
    scaler, weight = LossScaler(True, CPU, initial=1024.0), torch.tensor([0.1, -2.0, 3e-5])
    grad, other = gradients(scaler, weight), gradients(scaler, weight + 1)
    torch.testing.assert_close(grad, 2 * weight * 1024)
    scaler.unscale_({"backbone": [grad], "heads": [other]})
    assert torch.equal(grad, 2 * weight), "a power of two costs no bit"
    assert torch.equal(other, 2 * (weight + 1)), "of every part"


def test_a_sharded_gradient_is_unscaled_in_place(one_rank_world: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    grad = distribute_tensor(torch.full((4, 2), 64.0), mesh, [Shard(0)])
    LossScaler(True, CPU, initial=16.0).unscale_({"all": [grad]})
    assert torch.equal(grad.full_tensor(), torch.full((4, 2), 4.0))


def test_an_overflow_stays_one_after_unscaling() -> None:
    grad = torch.tensor([float("inf"), float("nan"), 1.0])
    LossScaler(True, CPU, initial=16.0).unscale_({"all": [grad]})
    assert grad.isfinite().tolist() == [False, False, True]


def test_without_fp16_nothing_is_scaled_and_nothing_adapts() -> None:
    scaler, loss, grad = LossScaler(False, CPU), torch.tensor(0.3), torch.tensor([0.7])
    assert scaler.scaled(loss) is loss
    scaler.unscale_({"all": [grad]})
    scaler.update(OVERFLOW)
    assert (grad.item(), scaler.scale.item()) == (torch.tensor(0.7).item(), 1.0)


def test_a_checkpoint_continues_the_row_of_good_steps() -> None:
    first, second = (LossScaler(True, CPU, initial=16.0, interval=3) for _ in range(2))
    for step in (OVERFLOW, GOOD, GOOD):
        first.update(step)
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    second.update(GOOD)
    assert second.scale.item() == 16.0, "8 after the overflow, doubled by the third good step"


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def fp16_run(run_dir: Path, duration: str = "8it") -> Config:
    """The first steps overflow (KoLeo's gradient does at the first scales), the others do not."""
    return tiny_run(
        run_dir, train__precision="fp16", train__duration=duration, checkpoint__every="4it", model__layer_scale=1e-5
    )


@pytest.mark.slow
def test_an_fp16_run_resumes_with_its_scale(tmp_path: Path) -> None:
    train_alone(fp16_run(tmp_path / "whole"))
    assert saved_tensors(tmp_path / "whole", 4)["scaler.scale"].item() < 2.0**15
    (tmp_path / "stopped").mkdir()
    train_alone(fp16_run(tmp_path / "stopped"))
    for path in sorted((tmp_path / "stopped" / "checkpoints").glob("step_00000008")):
        path.rename(path.with_name("later"))
    train_alone(fp16_run(tmp_path / "stopped"))
    assert differing(saved_tensors(tmp_path / "whole"), saved_tensors(tmp_path / "stopped")) == []
