"""AdamW on a CPU, by compiled code and without: against double precision, however tensors are cut, and the trainer's
signals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dinov2_fsdp import native
from dinov2_fsdp.optim.build import build_optimizer

BETAS, EPS, RATE, DECAY = (0.9, 0.999), 1e-8, 1e-2, 0.1


pytestmark = pytest.mark.usefixtures("way")


def optimizer_of(parameters: list[nn.Parameter]) -> Any:
    optimizer = build_optimizer([{"params": parameters}], "adamw", BETAS, EPS, 0.9)
    optimizer.param_groups[0].update(lr=RATE, weight_decay=DECAY)
    return optimizer


def gradients(steps: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    # Of very different sizes, as those of a network are.
    sizes = 10 ** (8 * torch.rand(count, generator=generator) - 7)
    return torch.randn(steps, count, generator=generator) * sizes


def start(count: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def test_it_follows_the_paper_in_double_precision() -> None:
    weights, grads = start(1003), gradients(6, 1003)
    parameter = nn.Parameter(weights.clone())
    optimizer = optimizer_of([parameter])
    exact, first, second = weights.double(), torch.zeros(1003).double(), torch.zeros(1003).double()
    for step, grad in enumerate(grads, start=1):
        parameter.grad = grad.clone()
        optimizer.step()
        assert torch.equal(parameter.grad, grad)
        first = BETAS[0] * first + (1 - BETAS[0]) * grad.double()
        second = BETAS[1] * second + (1 - BETAS[1]) * grad.double() ** 2
        root = (second / (1 - BETAS[1] ** step)).sqrt() + EPS
        exact = exact * (1 - RATE * DECAY) - RATE * (first / (1 - BETAS[0] ** step)) / root
    torch.testing.assert_close(parameter.detach().double(), exact, rtol=1e-6, atol=1e-7)
    state = optimizer.state[parameter]
    assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
    assert state["step"].item() == 6
    torch.testing.assert_close(state["exp_avg"].double(), first, rtol=1e-4, atol=1e-12)
    torch.testing.assert_close(state["exp_avg_sq"].double(), second, rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize("cut", [1, 5, 16, 333, 997])
def test_where_a_tensor_is_cut_does_not_show_in_its_bits(cut: int) -> None:
    weights, grads = start(1003), gradients(3, 1003)
    whole, parts = (
        nn.Parameter(weights.clone()),
        [nn.Parameter(part.clone()) for part in (weights[:cut], weights[cut:])],
    )
    for parameters in ([whole], parts):
        optimizer = optimizer_of(parameters)
        for grad in grads:
            pieces = grad.split([len(parameter) for parameter in parameters])
            for parameter, piece in zip(parameters, pieces, strict=True):
                parameter.grad = piece.clone()
            optimizer.step()
    assert torch.equal(torch.cat([part.detach() for part in parts]), whole.detach())


def test_gradients_are_divided_by_the_loss_scale_and_a_bad_step_changes_nothing() -> None:
    weights, grads = start(100), gradients(2, 100)
    plain, scaled = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
    first, second = optimizer_of([plain]), optimizer_of([scaled])
    for grad in grads:
        plain.grad, scaled.grad = grad.clone(), grad * 1024
        first.step()
        second.grad_scale, second.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
        second.step()
    assert torch.equal(plain.detach(), scaled.detach())
    before, steps = scaled.detach().clone(), second.state[scaled]["step"].item()
    scaled.grad, second.found_inf = torch.full((100,), float("nan")), torch.tensor(1.0)
    second.step()
    assert torch.equal(scaled.detach(), before)
    assert second.state[scaled]["step"].item() == steps


def test_a_state_goes_on_where_it_was_saved_by_either_way() -> None:
    weights, grads = start(200), gradients(4, 200)
    parameter, other = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
    optimizer = optimizer_of([parameter])
    for grad in grads[:2]:
        parameter.grad = grad.clone()
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    with torch.no_grad():
        other.copy_(parameter)
    resumed = optimizer_of([other])
    resumed.load_state_dict(saved)
    with native.switched_off():
        for grad in grads[2:]:
            other.grad = grad.clone()
            resumed.step()
    for grad in grads[2:]:
        parameter.grad = grad.clone()
        optimizer.step()
    torch.testing.assert_close(other.detach(), parameter.detach(), rtol=1e-6, atol=1e-7)
    assert resumed.state[other]["step"].item() == 4


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_what_compiled_code_does_not_know_is_left_to_torch(option: str) -> None:
    weights, grad = start(100), gradients(1, 100)[0]
    own, other = nn.Parameter(weights.clone()), nn.Parameter(weights.clone())
    optimizer = optimizer_of([own])
    optimizer.param_groups[0][option] = True
    torchs = torch.optim.AdamW(
        [other], RATE, BETAS, EPS, DECAY, foreach=True, amsgrad=option == "amsgrad", maximize=option == "maximize"
    )
    own.grad, other.grad = grad.clone(), grad.clone()
    optimizer.step()
    torchs.step()
    assert torch.equal(own.detach(), other.detach())


def test_moments_that_lie_otherwise_are_left_to_torch() -> None:
    parameter, other = (nn.Parameter(start(100).view(10, 10).clone()) for _ in range(2))
    for used, layout in ((parameter, "turned"), (other, "plain")):
        optimizer = optimizer_of([used])
        for grad in gradients(3, 100):
            used.grad = grad.view(10, 10).clone()
            optimizer.step()
            if layout == "turned":
                state = optimizer.state[used]
                state["exp_avg"] = state["exp_avg"].t().contiguous().t()
    torch.testing.assert_close(parameter.detach(), other.detach(), rtol=1e-6, atol=1e-7)
