"""The layers that keep less for their backward pass, held against the plain ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from operations import Called, gradients
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dinov2_fsdp import native
from dinov2_fsdp.models import frugal, frugal_attention, fused, products
from dinov2_fsdp.models.block import Block
from dinov2_fsdp.models.frugal import ACTIVATIONS, feed_forward, norm_linear, scaled_linear
from dinov2_fsdp.models.frugal_attention import attention_branch
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.plain_attention import attend_plainly

DIM, WIDTH, ROWS = 12, 20, 31
HEADS, LAYOUT = 3, Layout(((2, 8), (5, 3)))


def layers(
    dtype: torch.dtype = torch.float64, activation: str = "swiglu"
) -> tuple[nn.LayerNorm, nn.Linear, nn.Linear, nn.Parameter]:
    torch.manual_seed(0)
    norm, second = nn.LayerNorm(DIM), nn.Linear(WIDTH, DIM)
    first = nn.Linear(DIM, 2 * WIDTH if activation == "swiglu" else WIDTH)
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    gamma = nn.Parameter(torch.rand(DIM) - 0.5)
    return norm.to(dtype), first.to(dtype), second.to(dtype), nn.Parameter(gamma.to(dtype))


def attention_layers() -> tuple[nn.LayerNorm, nn.Linear, nn.Linear, nn.Parameter]:
    norm, _, _, gamma = layers()
    return norm, nn.Linear(DIM, 3 * DIM).double(), nn.Linear(DIM, DIM).double(), gamma


def everything(*layers: nn.Module, gamma: nn.Parameter | None) -> list[nn.Parameter]:
    found = [parameter for layer in layers for parameter in layer.parameters()]
    return found if gamma is None else [*found, gamma]


@pytest.fixture(
    params=[(*way, fast) for fast in (True, False) for way in [(512, True), (7, True), (7, False)]],
    ids=[
        "whole",
        "a few rows at a time",
        "a few rows at a time by torch alone",
        "whole, bf16 multiplied in fp32",
        "a few rows at a time, bf16 multiplied in fp32",
        "a few rows at a time by torch alone, bf16 multiplied in fp32",
    ],
    autouse=True,
)
def at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Every test of this file runs with activations that are computed whole, and a few rows at a time, by compiled code
    and without, on a processor that is fast in bf16 and on one that is not."""
    rows, compiled, fast = request.param
    monkeypatch.setattr(products, "bf16_is_fast", lambda: fast)
    monkeypatch.setattr(frugal, "CACHED_ROWS", rows)
    monkeypatch.setattr(fused, "_LEAST", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with nullcontext() if compiled else native.switched_off():
        yield rows


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and the plain modules run from then on."""
    return lambda: monkeypatch.setattr(frugal, "applies", lambda *_, **__: False)


def test_norm_and_linear_have_the_gradients_of_the_plain_modules(plain: Callable[[], None]) -> None:
    norm, first, _, _ = layers()
    rows, parameters = torch.randn(ROWS, DIM, dtype=torch.float64), [*norm.parameters(), *first.parameters()]
    found = gradients(lambda x: norm_linear(x, norm, first), rows, parameters)
    plain()
    expected = gradients(lambda x: norm_linear(x, norm, first), rows, parameters)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
def test_linear_and_scale_have_the_gradients_of_the_plain_modules(scaled: bool, plain: Callable[[], None]) -> None:
    _, _, linear, gamma = layers()
    used = gamma if scaled else None
    rows, parameters = torch.randn(ROWS, WIDTH, dtype=torch.float64), everything(linear, gamma=used)
    found = gradients(lambda x: scaled_linear(x, linear, used), rows, parameters)
    plain()
    expected = gradients(lambda x: scaled_linear(x, linear, used), rows, parameters)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_feed_forward_branch_has_the_gradients_of_the_plain_modules(
    activation: str, scaled: bool, plain: Callable[[], None]
) -> None:
    norm, first, second, gamma = layers(activation=activation)
    used = gamma if scaled else None
    rows, parameters = torch.randn(ROWS, DIM, dtype=torch.float64), everything(norm, first, second, gamma=used)

    def run(x: Tensor) -> Tensor:
        return feed_forward(x, norm, first, activation, second, used)

    found = gradients(run, rows, parameters)
    with torch.no_grad():
        torch.testing.assert_close(run(rows), found[0], rtol=1e-12, atol=1e-12)
    plain()
    for mine, theirs in zip(found, gradients(run, rows, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False], ids=["LayerScale", "none"])
def test_an_attention_branch_has_the_gradients_of_the_plain_modules(scaled: bool) -> None:
    norm, qkv, proj, gamma = attention_layers()
    used = gamma if scaled else None
    rows, parameters = torch.randn(LAYOUT.total_tokens, DIM).double(), everything(norm, qkv, proj, gamma=used)

    def run(x: Tensor) -> Tensor:
        return attention_branch(x, LAYOUT, HEADS, norm, qkv, proj, used)

    def plain(x: Tensor) -> Tensor:
        attended = attend_plainly(qkv(norm(x)).unflatten(-1, (3, HEADS, -1)), LAYOUT).flatten(1)
        return proj(attended) * (1 if used is None else used)

    found = gradients(run, rows, parameters)
    with torch.no_grad():
        torch.testing.assert_close(run(rows), found[0], rtol=1e-12, atol=1e-12)
    for mine, theirs in zip(found, gradients(plain, rows, parameters), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_those_of_finite_differences(activation: str) -> None:
    norm, first, second, gamma = layers(activation=activation)

    def run(tokens: Tensor) -> Tensor:
        return feed_forward(tokens, norm, first, activation, second, gamma)

    assert torch.autograd.gradcheck(run, torch.randn(3, DIM, dtype=torch.float64, requires_grad=True))


@pytest.mark.slow
def test_gradients_of_attention_are_those_of_finite_differences() -> None:
    norm, qkv, proj, gamma = attention_layers()
    layout = Layout(((3, 2), (1, 1)))

    def run(tokens: Tensor) -> Tensor:
        return attention_branch(tokens, layout, HEADS, norm, qkv, proj, gamma)

    assert torch.autograd.gradcheck(run, torch.randn(7, DIM, dtype=torch.float64, requires_grad=True))


def test_a_block_takes_the_branch_that_goes_a_few_sequences_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr("dinov2_fsdp.models.block.attention_branch", lambda tokens, *_: taken.append(1) or tokens)
    block = Block(DIM, HEADS, WIDTH, "mlp", layer_scale=True)
    for backend, expected in (("math", 1), ("sdpa", 0)):
        block.attn.backend = backend
        taken.clear()
        block(torch.randn(LAYOUT.total_tokens, DIM, requires_grad=True), LAYOUT)
        assert len(taken) == expected


def test_all_sequences_are_taken_once_each_and_a_few_at_a_time() -> None:
    found = list(frugal_attention._few_sequences(LAYOUT))
    assert [row for rows, _ in found for row in range(rows.start, rows.stop)] == list(range(LAYOUT.total_tokens))
    for rows, sequences in found:
        length = 8 if rows.start < 16 else 3
        assert rows.stop - rows.start == sequences * length
        assert sequences == 1 or sequences * length <= 1.5 * frugal.CACHED_ROWS


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
    for kind in (frugal._NormLinear, frugal._ScaledLinear, frugal._FeedForward):
        monkeypatch.setattr(kind, "apply", None)
    rows = torch.randn(ROWS, DIM, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        assert norm_linear(rows, norm, first).requires_grad
        assert feed_forward(rows, norm, first, "swiglu", second, gamma).requires_grad
        assert scaled_linear(torch.randn(ROWS, WIDTH, dtype=dtype), second, gamma).requires_grad
        assert not frugal_attention.applies(rows, first, second)


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "frozen", [("norm",), ("first",), ("second",), ("first", "second"), ("norm", "first", "second")]
)
@pytest.mark.parametrize("branch", ["feed forward", "attention"])
def test_frozen_weights_get_no_gradient_and_the_others_theirs(branch: str, frozen: tuple[str, ...]) -> None:
    """Whichever way is taken; what is expected is written out here."""
    norm, first, second, gamma = layers() if branch == "feed forward" else attention_layers()
    named = {"norm": norm, "first": first, "second": second}
    for name in frozen:
        named[name].requires_grad_(False)
    block = Block(DIM, HEADS, WIDTH, "mlp", layer_scale=True)
    block.norm1, block.attn.qkv, block.attn.proj, block.ls1.gamma = norm, first, second, gamma
    block.attn.backend = "math"

    def mine(x: Tensor) -> Tensor:
        if branch == "attention":
            return block._attention_branch(x, LAYOUT, False)
        return feed_forward(x, norm, first, "swiglu", second, gamma)

    def expected(x: Tensor) -> Tensor:
        hidden = F.linear(F.layer_norm(x, (DIM,), norm.weight, norm.bias), first.weight, first.bias)
        if branch == "attention":
            hidden = attend_plainly(hidden.unflatten(-1, (3, HEADS, -1)), LAYOUT).flatten(1)
        else:
            hidden = F.silu(hidden[:, :WIDTH]) * hidden[:, WIDTH:]
        return F.linear(hidden, second.weight, second.bias) * gamma

    start, found = torch.randn(LAYOUT.total_tokens, DIM).double(), []
    weights = torch.randn(LAYOUT.total_tokens, DIM).double()
    for run in (mine, expected):
        rows = start.clone().requires_grad_()
        (run(rows) * weights).sum().backward()
        assert all((p.grad is None) == (name in frozen) for name, layer in named.items() for p in layer.parameters())
        found.append([rows.grad, *(p.grad for p in everything(*named.values(), gamma=gamma) if p.grad is not None)])
        for parameter in everything(*named.values(), gamma=gamma):
            parameter.grad = None
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("trained", ["norm", "bias", "gamma"])
@pytest.mark.parametrize("branch", ["_ffn_branch", "_attention_branch"])
def test_what_stands_around_frozen_layers_may_be_trained_alone(branch: str, trained: str) -> None:
    """Its gradients are those that it has when all are trained."""
    block = Block(DIM, HEADS, WIDTH, "mlp", layer_scale=True)
    block.attn.backend = "math"
    for name, parameter in block.named_parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if "gamma" in name else None
    rows = torch.randn(LAYOUT.total_tokens, DIM)
    getattr(block, branch)(rows, LAYOUT, True).sum().backward()
    expected = {name: p.grad for name, p in block.named_parameters() if trained in name and p.grad is not None}
    assert expected
    for name, parameter in block.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(name in expected)
    getattr(block, branch)(rows, LAYOUT, True).sum().backward()
    for name, parameter in block.named_parameters():
        torch.testing.assert_close(parameter.grad, expected.get(name), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("maker")
@pytest.mark.parametrize("onto", [True, False], ids=["added to its tokens", "alone"])
@pytest.mark.parametrize("branch", ["feed forward", "attention"])
def test_branches_in_fp32_are_those_of_the_plain_modules(branch: str, onto: bool, plain: Callable[[], None]) -> None:
    torch.manual_seed(0)
    block = Block(DIM, HEADS, WIDTH, "mlp", layer_scale=True)
    for name, parameter in block.named_parameters():
        nn.init.uniform_(parameter, 0.5, 1.5) if "gamma" in name else None
    block.attn.backend = "math"
    parameters = [p for n, p in block.named_parameters() if ("attn" in n or "1" in n[:5]) == (branch == "attention")]
    parameters = [p for p in parameters if p.requires_grad]

    def run(x: Tensor) -> Tensor:
        return block._attention_branch(x, LAYOUT, onto) if branch == "attention" else block._ffn_branch(x, LAYOUT, onto)

    rows = torch.randn(LAYOUT.total_tokens, DIM)
    found = gradients(run, rows, parameters)
    run(rows.requires_grad_()).sum().backward()  # its gradient is one number, expanded
    plain()
    for own, other in zip(found, gradients(run, rows.detach(), parameters), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("foreign")
def test_a_branch_of_many_parts_lays_its_weights_out_forward(at_a_time: int) -> None:
    block = Block(DIM, HEADS, WIDTH, "mlp", layer_scale=True)
    block.attn.backend = "math"
    tokens = torch.randn(20 * LAYOUT.total_tokens, DIM)
    layout = Layout(tuple((20 * sequences, length) for sequences, length in LAYOUT.groups))
    with Called() as called:
        out = block(tokens, layout)
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    assert called.names.count("_reorder_linear_weight") == (4 if wide and at_a_time == 7 else 0)
    with Called() as called:
        out.sum().backward()
    assert "_reorder_linear_weight" not in called.names


@pytest.mark.parametrize("grad", [True, False])
def test_without_gradients_nothing_is_kept(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that could be trained do not say that they are."""
    kept, block = [], Block(DIM, HEADS, WIDTH, "mlp", layer_scale=True)
    block.attn.backend = "math"
    for kind in (frugal._FeedForward, frugal_attention._AttentionBranch):
        forward = kind.forward

        def recorded(ctx: Any, *inputs: Any, forward: Any = forward) -> Tensor:
            kept.append(inputs[-1])
            return forward(ctx, *inputs)

        monkeypatch.setattr(kind, "forward", staticmethod(recorded))
    with torch.set_grad_enabled(grad):
        block(torch.randn(LAYOUT.total_tokens, DIM), LAYOUT)
    assert kept == [grad, grad]


@pytest.mark.slow
def test_a_compiled_block_takes_any_number_of_chosen_rows() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block = Block(16, 2, 64, "mlp", layer_scale=True)
    for name, parameter in block.named_parameters():
        nn.init.constant_(parameter, 0.1) if "gamma" in name else None  # its memory is not set otherwise
    block.attn.backend = "math"
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, backend=counter, dynamic=True)
    tokens, layout = torch.randn(2 * 9, 16), Layout(((2, 9),))
    for count in (5, 7, 8, 11, 13):
        rows = torch.arange(count)
        torch.testing.assert_close(compiled(tokens, layout, None, None, rows), block(tokens, layout)[:count])
    assert counter.frame_count <= 2


def test_no_rows_are_no_rows() -> None:
    norm, first, second, gamma = layers()
    rows = torch.empty(0, DIM, dtype=torch.float64)
    found = gradients(
        lambda x: feed_forward(x, norm, first, "swiglu", second, gamma),
        rows,
        everything(norm, first, second, gamma=gamma),
    )
    assert found[0].shape == (0, DIM)
    assert all(not gradient.any() for gradient in found[1:])
    with torch.no_grad():
        assert products.linear(torch.empty(0, 4), torch.ones(3, 4)).shape == (0, 3)
