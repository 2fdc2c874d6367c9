from __future__ import annotations

import copy
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from dinov2_fsdp.optim.build import build_optimizer
from dinov2_fsdp.optim.clip import local_shard
from dinov2_fsdp.optim.lars import LARS


@pytest.fixture
def one_rank_world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _model(*, sharded: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    return model


def _backward(model: nn.Module, step: int, scale: float = 1.0) -> None:
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    (model(inputs).square().mean() * scale).backward()


def _values(model: nn.Module) -> list[Tensor]:
    return [local_shard(p.detach()).clone() for p in model.parameters()]


def _reference_step(
    weight: np.ndarray,
    grad: np.ndarray,
    momentum_buffer: np.ndarray,
    lr: float,
    decay: float,
    momentum: float,
    trust: float,
) -> tuple[np.ndarray, np.ndarray]:
    """One parameter's step in float64 (arXiv 1708.03888, algorithm 1, with weight decay inside the update's norm)."""
    update = grad
    if weight.ndim > 1:
        update = grad + decay * weight
        size, step_size = np.sqrt((weight**2).sum()), np.sqrt((update**2).sum())
        if size > 0 and step_size > 0:
            update = update * trust * size / step_size
    momentum_buffer = momentum * momentum_buffer + update
    return weight - lr * momentum_buffer, momentum_buffer


@pytest.mark.parametrize("sharded", [False, True])
def test_lars_follows_the_paper(sharded: bool, one_rank_world: None) -> None:
    model = _model(sharded=sharded)
    optimizer = LARS(model.parameters(), lr=0.3, weight_decay=0.1, momentum=0.9, trust_coefficient=0.02)
    weights = [value.double().numpy() for value in _values(model)]
    buffers = [np.zeros_like(weight) for weight in weights]
    for step in range(5):
        _backward(model, step)
        grads = [local_shard(p.grad).double().numpy() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        for i, grad in enumerate(grads):
            weights[i], buffers[i] = _reference_step(weights[i], grad, buffers[i], 0.3, 0.1, 0.9, 0.02)
    for value, weight in zip(_values(model), weights, strict=True):
        np.testing.assert_allclose(value.numpy(), weight, rtol=1e-5, atol=1e-7)


def test_lars_does_not_scale_a_weight_of_zeros() -> None:
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.ones(2, 2)
    LARS([weight], lr=0.5).step()
    assert weight.tolist() == [[-0.5, -0.5], [-0.5, -0.5]]


def test_lars_keeps_a_parameter_without_gradient() -> None:
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    used.grad = torch.ones(2, 2)
    LARS([used, unused], lr=0.5, weight_decay=0.1).step()
    assert not torch.equal(used, torch.ones(2, 2))
    assert torch.equal(unused, torch.ones(2, 2))


def test_lars_divides_gradients_by_the_loss_scale() -> None:
    plain, scaled = _model(), _model()
    optimizers = [LARS(m.parameters(), lr=0.3, weight_decay=0.1) for m in (plain, scaled)]
    optimizers[1].grad_scale, optimizers[1].found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    for step in range(3):
        _backward(plain, step)
        _backward(scaled, step, scale=1024.0)
        for optimizer in optimizers:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(_values(plain), _values(scaled), strict=True))


def test_lars_resumes_exactly() -> None:
    model = _model()
    optimizer = LARS(model.parameters(), lr=0.3, weight_decay=0.1)
    _backward(model, 0)
    optimizer.step()
    resumed = copy.deepcopy(model)
    other = LARS(resumed.parameters(), lr=0.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (resumed, other)):
        _backward(m, 1)
        o.step()
    assert all(torch.equal(a, b) for a, b in zip(_values(model), _values(resumed), strict=True))


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lars"])
def test_a_step_with_found_inf_changes_nothing_at_all(name: str, sharded: bool, one_rank_world: None) -> None:
    model = _model(sharded=sharded)
    groups = [{"params": list(model.parameters())}]
    optimizer = build_optimizer(groups, name, betas=(0.9, 0.999), eps=1e-8, momentum=0.9)
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 0.1, 0.1
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)  # type: ignore[attr-defined]
    _backward(model, 0)
    optimizer.step()
    assert isinstance(next(model.parameters()), DTensor) == sharded
    weights = _values(model)
    state = [
        (slot, entry, local_shard(entry).clone()) for slots in optimizer.state.values() for slot, entry in slots.items()
    ]
    _backward(model, 1)
    for parameter in model.parameters():
        assert parameter.grad is not None
        local_shard(parameter.grad).fill_(float("nan"))
    optimizer.found_inf = torch.tensor(1.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, _values(model), strict=True))
    assert {slot for slot, _, _ in state} == (
        {"step", "exp_avg", "exp_avg_sq"} if name == "adamw" else {"momentum_buffer"}
    )
    for slot, entry, before in state:
        assert torch.equal(local_shard(entry), before), slot
    # The next good step does move.
    _backward(model, 2)
    optimizer.found_inf = torch.tensor(0.0)  # type: ignore[attr-defined]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(weights, _values(model), strict=True))
    assert all(value.isfinite().all() for value in _values(model))


def _train_sharded(rank: int, store: str, result: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    model = _model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = LARS(model.parameters(), lr=0.3, weight_decay=0.1)
    for step in range(3):
        _backward(model, step)
        optimizer.step()
    weights = [p.full_tensor() for p in model.parameters() if isinstance(p, DTensor)]
    if rank == 0:
        torch.save(weights, result)
    dist.destroy_process_group()


@pytest.mark.distributed
def test_lars_scales_by_the_norm_of_the_whole_parameter(tmp_path: Path) -> None:
    # One server imports torch for both, which otherwise takes most of the test's time.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "dinov2_fsdp.optim.lars"])
    torch.multiprocessing.start_processes(
        _train_sharded, (str(tmp_path / "store"), str(tmp_path / "weights.pt")), nprocs=2, start_method="forkserver"
    )
    model = _model()
    optimizer = LARS(model.parameters(), lr=0.3, weight_decay=0.1)
    for step in range(3):
        _backward(model, step)
        optimizer.step()
    sharded = torch.load(tmp_path / "weights.pt")
    assert len(sharded) == len(list(model.parameters()))
    for value, weight in zip(_values(model), sharded, strict=True):
        torch.testing.assert_close(value, weight.detach(), rtol=1e-6, atol=1e-7)
