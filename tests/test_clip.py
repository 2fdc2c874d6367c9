from __future__ import annotations

import math
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from dinov2_fsdp import native
from dinov2_fsdp.optim.clip import clip_, gradient_norms, square_sums


def _grads() -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"backbone": [(7, 5), (5,), (1, 3)], "dino_head": [(9, 4), (4,)]}
    return {part: [torch.randn(s, generator=generator) for s in sizes] for part, sizes in shapes.items()}


@pytest.fixture
def one_rank_world() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_norms_equal_float64_references() -> None:
    for part, norm in gradient_norms(_grads()).items():
        exact = math.sqrt(sum(float(g.double().square().sum()) for g in _grads()[part]))
        assert norm.dtype == torch.float32
        assert norm.item() == torch.tensor(exact, dtype=torch.float32).item()


def test_squares_too_small_for_float32_are_counted() -> None:
    norm = gradient_norms({"backbone": [torch.full((4,), 1e-30)]})["backbone"]
    assert norm.item() == pytest.approx(2e-30, rel=1e-6, abs=0.0)


@pytest.mark.parametrize("size", [1, 2**16 - 1, 2**16 + 1, 300_001])
def test_large_gradients_have_one_norm_with_any_number_of_threads(size: int) -> None:
    """Compiled code sums parts of a gradient up by threads."""
    grad = torch.randn(size, generator=torch.Generator().manual_seed(1))
    exact = torch.tensor(math.sqrt(float(grad.double().square().sum())), dtype=torch.float32).item()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(square_sums([grad], [grad]).item())
    finally:
        torch.set_num_threads(before)
    assert len(set(found)) == 1
    assert gradient_norms({"backbone": [grad]})["backbone"].item() == exact
    with native.switched_off():
        assert square_sums([grad], [grad]).item() == pytest.approx(found[0], rel=1e-12)
    for bad in (math.nan, math.inf):
        grad[size // 2] = bad
        assert not math.isfinite(square_sums([grad], [grad]).item())


@pytest.mark.parametrize("max_norm", [0.5, 3.0, 1e4])
def test_clipping_equals_torch(max_norm: float) -> None:
    ours, theirs = _grads(), _grads()
    clip_(ours, gradient_norms(ours), max_norm)
    for part, grads in theirs.items():
        parameters = [nn.Parameter(torch.zeros_like(g)) for g in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad
        torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        torch.testing.assert_close(ours[part], grads)


def test_gradients_below_the_limit_keep_every_bit() -> None:
    grads = _grads()
    clip_(grads, gradient_norms(grads), 1e4)
    assert all(torch.equal(a, b) for part in grads for a, b in zip(grads[part], _grads()[part], strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_part_with_a_non_finite_norm_is_left_as_it_is(bad: float) -> None:
    grads = _grads()
    grads["backbone"][0][0, 0] = bad
    norms = gradient_norms(grads)
    assert not norms["backbone"].isfinite()
    assert norms["dino_head"].isfinite()
    clip_(grads, norms, 0.5)
    assert torch.equal(grads["backbone"][1], _grads()["backbone"][1])
    assert not torch.equal(grads["dino_head"][1], _grads()["dino_head"][1])


def test_norms_in_units_of_the_loss_scale_clip_as_without() -> None:
    scaled, plain = _grads(), _grads()
    for part in scaled.values():
        torch._foreach_mul_(part, 1024.0)
    clip_(scaled, {name: norm / 1024 for name, norm in gradient_norms(scaled).items()}, 0.5)
    clip_(plain, gradient_norms(plain), 0.5)
    torch.testing.assert_close(scaled["backbone"], [g * 1024 for g in plain["backbone"]])


def test_empty_parts_and_empty_shards_have_no_norm() -> None:
    norms = gradient_norms({"backbone": [torch.ones(4), torch.ones(0, 3)], "ibot_head": []})
    assert (norms["backbone"].item(), norms["ibot_head"].item()) == (2.0, 0.0)
    clip_({"ibot_head": []}, norms, 1.0)
    assert gradient_norms({}) == {}


def test_an_unreduced_gradient_is_refused(one_rank_world: None) -> None:
    mesh = init_device_mesh("cpu", (1,))
    partial = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    with pytest.raises(ValueError, match="not reduced"):
        gradient_norms({"backbone": [partial]})


@pytest.mark.parametrize("max_norm", [0.0, -1.0, float("inf")])
def test_a_limit_that_is_none_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="max_norm"):
        clip_({}, {}, max_norm)


def _norms_on_a_mesh(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 4), rank=rank, world_size=4)
    flat, hybrid = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
    layouts = {
        "sharded": lambda g: distribute_tensor(g, flat, [Shard(0)]),
        "replicated": lambda g: distribute_tensor(g, flat, [Replicate()]),
        "hybrid": lambda g: distribute_tensor(g, hybrid, [Replicate(), Shard(0)]),
        "sharded twice": lambda g: distribute_tensor(g, hybrid, [Shard(0), Shard(0)]),
        "plain": lambda g: g,
    }
    found: dict[str, dict[str, Tensor]] = {}
    counts: dict[str, int] = {}
    all_reduce = dist.all_reduce
    for layout, place in layouts.items():
        calls: list[None] = []
        grads = {part: [place(g) for g in gradients] for part, gradients in _grads().items()}
        dist.all_reduce = lambda *a, calls=calls, **k: (calls.append(None), all_reduce(*a, **k))[1]
        found[layout] = gradient_norms(grads)
        dist.all_reduce = all_reduce
        counts[layout] = len(calls)
        clip_(grads, found[layout], 0.5)
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in grads["backbone"]]
        found[layout]["clipped"] = torch.cat([g.flatten() for g in whole])
    mixed = {"backbone": [layouts[n](g) for n, g in zip(layouts, _grads()["backbone"], strict=False)]}
    found["mixed"] = gradient_norms(mixed)
    torch.save((found, counts), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_norms_do_not_depend_on_how_gradients_are_sharded(tmp_path: Path) -> None:
    # One server imports torch for all four, which otherwise takes most of the test's time.
    multiprocessing.set_forkserver_preload(["torch.distributed.tensor", "dinov2_fsdp.optim.clip"])
    torch.multiprocessing.start_processes(
        _norms_on_a_mesh, (str(tmp_path / "store"), str(tmp_path)), nprocs=4, start_method="forkserver"
    )
    whole, grads = gradient_norms(_grads()), _grads()
    clip_(grads, whole, 0.5)
    clipped = torch.cat([g.flatten() for g in grads["backbone"]])
    for rank in range(4):
        found, counts = torch.load(tmp_path / f"{rank}.pt")
        assert counts == {"sharded": 1, "replicated": 0, "hybrid": 1, "sharded twice": 2, "plain": 0}
        assert torch.equal(found.pop("mixed")["backbone"], whole["backbone"])
        for layout, norms in found.items():
            assert torch.equal(norms["backbone"], whole["backbone"]), layout
            assert torch.equal(norms["dino_head"], whole["dino_head"]), layout
            assert torch.equal(norms["clipped"], clipped), layout
