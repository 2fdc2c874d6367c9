"""The layers that keep less for their backward pass, held against the plain ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dinov2_fsdp.models import frugal
from dinov2_fsdp.models.block import Block
from dinov2_fsdp.models.frugal import ACTIVATIONS, activated_linear, norm_linear
from dinov2_fsdp.models.layout import Layout

DIM, WIDTH, ROWS = 12, 20, 31


def layers(dtype: torch.dtype = torch.float64) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear, nn.Parameter]:
    torch.manual_seed(0)
    norm, first, second = nn.LayerNorm(DIM), nn.Linear(DIM, 2 * WIDTH), nn.Linear(WIDTH, DIM)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    gamma = nn.Parameter(torch.rand(DIM) - 0.5)
    return norm.to(dtype), first.to(dtype), second.to(dtype), nn.Parameter(gamma.to(dtype))


def gradients(function: Callable[[Tensor], Tensor], rows: Tensor, parameters: list[nn.Parameter]) -> list[Tensor]:
    """Return the output of a function of ``rows`` and the gradients of a random sum of it."""
    rows = rows.clone().requires_grad_()
    out = function(rows)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), [rows, *parameters])]


@pytest.fixture(params=[512, 7], ids=["whole", "a few rows at a time"], autouse=True)
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs with activations that are computed whole, and a few rows at a time."""
    monkeypatch.setattr(frugal, "CACHED_ROWS", request.param)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the plain modules run from then on."""
    return lambda: monkeypatch.setattr(frugal, "_as_plain_products", lambda *_: False)


def test_norm_and_linear_have_the_gradients_of_the_plain_modules(plain: Callable[[], None]) -> None:
    norm, first, _, _ = layers()
    rows, parameters = torch.randn(ROWS, DIM, dtype=torch.float64), [*norm.parameters(), *first.parameters()]
    found = gradients(lambda x: norm_linear(x, norm, first), rows, parameters)
    plain()
    expected = gradients(lambda x: norm_linear(x, norm, first), rows, parameters)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_linear_have_the_gradients_of_the_plain_modules(
    activation: str, scaled: bool, plain: Callable[[], None]
) -> None:
    _, _, second, gamma = layers()
    rows = torch.randn(ROWS, 2 * WIDTH if activation == "swiglu" else WIDTH, dtype=torch.float64)
    parameters = [*second.parameters(), *([gamma] if scaled else [])]

    def run(x: Tensor) -> Tensor:
        return activated_linear(x, activation, second, gamma if scaled else None)

    found = gradients(run, rows, parameters)
    plain()
    for mine, theirs in zip(found, gradients(run, rows, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_without_gradients_the_result_is_the_same(activation: str, scaled: bool) -> None:
    _, _, second, gamma = layers()
    rows = torch.randn(ROWS, 2 * WIDTH if activation == "swiglu" else WIDTH, dtype=torch.float64)
    with torch.no_grad():
        found = activated_linear(rows, activation, second, gamma if scaled else None)
        expected = second(frugal.activate(rows, activation)) * (gamma if scaled else 1)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_gradients_are_those_of_finite_differences(activation: str) -> None:
    norm, first, second, gamma = layers()
    if activation == "gelu":
        first = nn.Linear(DIM, WIDTH).double()

    def run(tokens: Tensor) -> Tensor:
        return activated_linear(norm_linear(tokens, norm, first), activation, second, gamma)

    assert torch.autograd.gradcheck(run, torch.randn(3, DIM, dtype=torch.float64, requires_grad=True))


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_bf16_is_as_near_to_fp32_as_with_the_plain_modules(ffn: str, plain: Callable[[], None]) -> None:
    torch.manual_seed(0)
    layout, tokens = Layout(((8, 17),)), torch.randn(8 * 17, 48)
    exact = Block(48, 3, 192, ffn, layer_scale=True)
    for name, parameter in exact.named_parameters():
        nn.init.constant_(parameter, 0.1) if "gamma" in name else None
    rounded = Block(48, 3, 192, ffn, layer_scale=True).bfloat16()
    rounded.load_state_dict(exact.state_dict())
    for block in (exact, rounded):
        block.attn.backend = "math"

    def errors() -> list[float]:
        found = gradients(lambda x: rounded(x, layout), tokens.bfloat16(), list(rounded.parameters()))
        expected = gradients(lambda x: exact(x, layout), tokens, list(exact.parameters()))
        return [float((f.float() - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]

    mine = errors()
    plain()
    for own, theirs in zip(mine, errors(), strict=True):
        assert own < 1.5 * theirs + 1e-3


@pytest.mark.parametrize(("ffn", "share"), [("mlp", 0.62), ("swiglu", 0.75)])
def test_a_block_keeps_less_for_its_backward_pass(ffn: str, share: float, plain: Callable[[], None]) -> None:
    block = Block(64, 4, 256, ffn, layer_scale=True)
    block.attn.backend = "math"

    def kept() -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            held.append(tensor)
            return tensor

        held: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            block(torch.randn(64 * 17, 64, requires_grad=True), Layout(((64, 17),))).sum()
        return sum(storages.values()) - sum(p.numel() * 4 for p in block.parameters())

    mine = kept()
    plain()
    assert mine < share * kept()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fp16_and_autocast_take_the_plain_modules(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, first, second, gamma = layers(dtype)
    monkeypatch.setattr(frugal._NormLinear, "apply", None)
    monkeypatch.setattr(frugal._ActivatedLinear, "apply", None)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        hidden = norm_linear(torch.randn(ROWS, DIM, dtype=dtype, requires_grad=True), norm, first)
        assert activated_linear(hidden, "swiglu", second, gamma).requires_grad


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_a_block_compiles_as_a_whole(ffn: str) -> None:
    torch._dynamo.reset()
    block = Block(16, 2, 64, ffn, layer_scale=True)
    for name, parameter in block.named_parameters():
        nn.init.constant_(parameter, 0.1) if "gamma" in name else None
    block.attn.backend = "math"
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    tokens, layout = torch.randn(2 * 5, 16), Layout(((2, 5),))
    expected = gradients(lambda x: block(x, layout), tokens, list(block.parameters()))
    found = gradients(lambda x: compiled(x, layout), tokens, list(block.parameters()))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_frozen_weights_get_no_gradient_and_what_is_before_them_does() -> None:
    _, _, second, gamma = layers()
    rows = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad((second(frugal.activate(rows, "gelu")) * gamma).sum(), [rows])
    second.requires_grad_(False)
    out = activated_linear(rows, "gelu", second, gamma.detach())
    out.sum().backward()
    assert second.weight.grad is None
    torch.testing.assert_close(rows.grad, expected)
