from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from dinov2_fsdp.ssl.losses import CHUNK, cross_entropy, dino_loss, entropy, ibot_loss, koleo_loss, softmax_entropy

TEMPERATURE = 0.1


@pytest.fixture(params=[2**18, 2 * 17], ids=["whole", "two rows at a time"], autouse=True)
def _at_a_time(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs with losses that are computed whole, and a few rows at a time."""
    monkeypatch.setitem(CHUNK, "cpu", request.param)


def _logits(rows: int, prototypes: int = 17, seed: int = 0, scale: float = 0.3) -> Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed)) * scale


def _targets(rows: int, prototypes: int = 17, seed: int = 1) -> Tensor:
    return (_logits(rows, prototypes, seed, 3.0)).softmax(dim=-1)


def _reference_cross_entropy(target: Tensor, logit: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """H(p, q) of one row in float64, q = exp(z/T) / Σ exp(z/T)."""
    z = logit.double() / temperature
    q = (z - z.max()).exp()
    return -(target.double() * (q / q.sum()).log()).sum()


# -- cross-entropy ----------------------------------------------------------------------------------------------------


def test_cross_entropy_equals_the_definition() -> None:
    logits, targets = _logits(6), _targets(6)
    expected = torch.stack([_reference_cross_entropy(t, z) for t, z in zip(targets, logits, strict=True)])
    torch.testing.assert_close(cross_entropy(logits, targets, TEMPERATURE).double(), expected, rtol=2e-6, atol=1e-6)


def test_the_gradient_of_cross_entropy_equals_the_definitions() -> None:
    logits, targets = _logits(6).requires_grad_(), _targets(6)
    exact = logits.detach().double().requires_grad_()
    cross_entropy(logits, targets, TEMPERATURE).sum().backward()
    torch.stack([_reference_cross_entropy(t, z) for t, z in zip(targets, exact, strict=True)]).sum().backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)  # type: ignore[union-attr]


def test_targets_for_other_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="6 rows of logits for targets of 4"):
        cross_entropy(_logits(6), _targets(4), TEMPERATURE)


def test_no_rows_have_no_cross_entropy_and_gradients_of_no_rows() -> None:
    logits = torch.zeros(0, 17, requires_grad=True)
    cross_entropy(logits, torch.zeros(0, 17), TEMPERATURE).sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == (0, 17)


def test_cross_entropy_keeps_logits_as_they_come_and_no_softmax() -> None:
    """In float32 the logits of 131,072 prototypes and their softmax would be a step's largest tensors."""
    kept: list[Tensor] = []
    logits, targets = _logits(6).bfloat16().requires_grad_(), _targets(6)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        cross_entropy(logits, targets, TEMPERATURE)
    wide = [tensor for tensor in kept if tensor.dim() == 2]
    assert {tensor.data_ptr() for tensor in wide} == {logits.data_ptr(), targets.data_ptr()}


def test_targets_that_add_up_to_two_count_twice() -> None:
    logits, first, second = _logits(5), _targets(5, seed=1), _targets(5, seed=2)
    apart = cross_entropy(logits, first, TEMPERATURE) + cross_entropy(logits, second, TEMPERATURE)
    torch.testing.assert_close(cross_entropy(logits, first + second, TEMPERATURE, mass=2.0), apart)


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = torch.tensor([[300.0, -300.0, 0.0]])
    loss = cross_entropy(logits, torch.tensor([[0.0, 1.0, 0.0]]), 0.1)
    assert loss.item() == pytest.approx(6000.0)


def test_cross_entropy_of_bf16_logits_is_summed_in_float32() -> None:
    logits, targets = _logits(4, 4096).bfloat16(), _targets(4, 4096)
    expected = torch.stack([_reference_cross_entropy(t, z) for t, z in zip(targets, logits, strict=True)])
    loss = cross_entropy(logits, targets, TEMPERATURE)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


# -- DINO -------------------------------------------------------------------------------------------------------------


def _reference_dino(logits: Tensor, targets: Tensor, images: int, crops: int) -> tuple[Tensor, int]:
    """Equation 3 of DINO: every student crop against every teacher crop but itself, averaged over pairs and images."""
    terms = []
    for teacher in (0, 1):
        for student in range(crops):
            if student != teacher:
                rows = range(images)
                losses = [
                    _reference_cross_entropy(targets[teacher * images + i], logits[student * images + i]) for i in rows
                ]
                terms.append(torch.stack(losses).mean())
    return torch.stack(terms).mean(), len(terms)


@pytest.mark.parametrize("local_crops", [0, 1, 3, 8])
def test_the_dino_loss_is_the_mean_over_all_pairs_but_a_crops_own(local_crops: int) -> None:
    images, crops = 3, 2 + local_crops
    logits, targets = _logits(crops * images).requires_grad_(), _targets(2 * images)
    exact = logits.detach().double().requires_grad_()
    expected, terms = _reference_dino(exact, targets, images, crops)
    loss = dino_loss(logits, targets, images, TEMPERATURE)
    assert terms == 2 + 2 * local_crops
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_a_global_crop_is_not_held_against_its_own_target() -> None:
    logits, targets = _logits(4), _targets(4)
    changed = logits.clone()
    changed[0] = _logits(1, seed=5)[0]  # the first crop of the first image …
    own = targets.clone()
    own[0] = _targets(1, seed=9)[0]  # … and its own target, which only the other crop is held against

    def share(z: Tensor, t: Tensor) -> float:
        return dino_loss(z, t, 2, TEMPERATURE).item()

    # Were the pair part of the loss, the effects of the two changes would not add up.
    both = share(changed, own) - share(logits, targets)
    assert both == pytest.approx(share(changed, targets) + share(logits, own) - 2 * share(logits, targets), abs=1e-5)


def test_the_dino_loss_of_one_image_does_not_see_another() -> None:
    logits, targets = _logits(8).requires_grad_(), _targets(4)
    dino_loss(logits, targets, 2, TEMPERATURE).backward()
    changed = logits.detach().clone()
    changed[1::2] = 7.0  # every crop of the second image
    changed.requires_grad_()
    dino_loss(changed, targets, 2, TEMPERATURE).backward()
    assert torch.equal(logits.grad[::2], changed.grad[::2])  # type: ignore[index]


# -- iBOT -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_masked_crop_weighs_the_same_in_the_ibot_loss(dtype: torch.dtype) -> None:
    masked_patches, global_crops = [5, 1, 2], 6  # three of six crops are masked
    logits, targets = _logits(8).to(dtype), _targets(8)
    expected, first = torch.zeros((), dtype=torch.float64), 0
    for masked in masked_patches:
        rows = range(first, first + masked)
        expected += sum(_reference_cross_entropy(targets[i], logits[i]) for i in rows) / masked
        first += masked
    weights = torch.cat([torch.full((masked,), 1 / masked) for masked in masked_patches])
    loss = ibot_loss(logits, targets, weights, global_crops, TEMPERATURE)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item() / global_crops, rel=1e-6)


def test_the_gradient_of_the_ibot_loss_equals_float64() -> None:
    logits, targets, weights = _logits(4).requires_grad_(), _targets(4), torch.tensor([1.0, 0.5, 0.5, 0.25])
    exact = logits.detach().double().requires_grad_()
    ibot_loss(logits, targets, weights, 4, TEMPERATURE).backward()
    sum(w * _reference_cross_entropy(t, z) / 4 for w, t, z in zip(weights, targets, exact, strict=True)).backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-5, atol=1e-7)  # type: ignore[union-attr]


def test_no_masked_patch_gives_zero_with_zero_gradients() -> None:
    head = torch.nn.Linear(5, 17)
    loss = ibot_loss(head(torch.zeros(0, 5)), torch.zeros(0, 17), torch.zeros(0), 8, TEMPERATURE)
    loss.backward()
    assert loss.item() == 0.0
    assert head.weight.grad is not None
    assert torch.equal(head.weight.grad, torch.zeros(17, 5))


# Masked patches of the global crops that each rank holds; two crops are not masked, one rank has hardly any.
MASKED_ON_RANKS = [[7, 0, 4, 2], [1, 0, 0, 0]]


def _ibot_on_rank(masked: list[list[int]], logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    counts = [sum(crops) for crops in masked]
    rank = dist.get_rank()
    own = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    rows = logits[own].clone().requires_grad_()
    weights = torch.cat([torch.full((number,), 1 / number) for number in masked[rank] if number])
    loss = ibot_loss(rows, targets[own], weights, len(masked[rank]), TEMPERATURE)
    loss.backward()
    assert rows.grad is not None
    dist.all_reduce(loss.detach())
    return loss.detach() / dist.get_world_size(), rows.grad / dist.get_world_size()


@pytest.mark.distributed
def test_ranks_with_uneven_masks_add_up_to_the_loss_of_the_batch() -> None:
    """Equation 2 over the whole batch in float64: the mean over ranks is not one over their masked patches."""
    crops = [number for rank in MASKED_ON_RANKS for number in rank]
    logits, targets = _logits(sum(crops)), _targets(sum(crops))
    exact, expected, row = logits.double().requires_grad_(), torch.zeros((), dtype=torch.float64), 0
    for number in crops:
        for _ in range(number):
            expected = expected + _reference_cross_entropy(targets[row], exact[row]) / number / len(crops)
            row += 1
    expected.backward()
    results = run_on_ranks(_ibot_on_rank, 2, MASKED_ON_RANKS, logits, targets)
    for loss, _ in results:
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    gradient = torch.cat([gradient for _, gradient in results])
    torch.testing.assert_close(gradient.double(), exact.grad, rtol=1e-5, atol=1e-7)


# -- KoLeo ------------------------------------------------------------------------------------------------------------


def _reference_koleo(cls: Tensor, images: int) -> Tensor:
    """−mean log(‖x − nearest other x‖ + 1e-8) on the sphere, by brute force, added up over the two global crops."""
    total = cls.new_zeros(())
    for crop in (cls[:images], cls[images : 2 * images]):
        points = [row / row.norm() for row in crop]
        for i, point in enumerate(points):
            nearest = min((point - other).norm() for j, other in enumerate(points) if j != i)
            total = total - torch.log(nearest + 1e-8) / images
    return total


@pytest.mark.parametrize("images", [2, 3, 16])
def test_koleo_is_the_mean_log_distance_to_the_nearest_neighbour(images: int) -> None:
    cls = _logits(2 * images + 3, 10, scale=2.0).requires_grad_()  # three rows of local crops do not count
    exact = cls.detach().double().requires_grad_()
    loss, expected = koleo_loss(cls, images), _reference_koleo(exact, images)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(cls.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)  # type: ignore[union-attr]


def test_the_two_global_crops_are_spread_apart_each_for_itself() -> None:
    points = _logits(4, 10)
    # The second crop is a copy of the first one: were they compared, each would have a neighbour at distance zero.
    assert koleo_loss(torch.cat([points, points]), 4).item() == pytest.approx(2 * _half(points), rel=1e-6)


def _half(points: Tensor) -> float:
    return _reference_koleo(torch.cat([points, points]).double(), len(points)).item() / 2


@pytest.mark.parametrize("gap", [1e-3, 1e-5, 1e-7])
def test_near_duplicates_keep_their_distance(gap: float) -> None:
    directions = torch.eye(6, dtype=torch.float64)
    pair = torch.stack([directions[0], directions[0] + gap * directions[1]])
    cls = torch.cat([pair, directions[2:4], pair, directions[2:4]]).float()
    # ½ log of the gap and ½ log √2, for both crops
    expected = -2 * (0.5 * math.log(gap + 1e-8) + 0.5 * math.log(math.sqrt(2)))
    assert koleo_loss(cls, 4).item() == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("images", [2, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype: torch.dtype, images: int) -> None:
    cls = _logits(2 * images, 64)
    cls[1] = cls[0] + 1e-4  # a distance that neither of them can tell from zero
    plain = cls.clone().requires_grad_()
    koleo_loss(plain, images).backward()
    cast = cls.clone().requires_grad_()
    with torch.autocast("cpu", dtype):
        loss = koleo_loss(cast, images)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.equal(loss, koleo_loss(cls, images))
    assert loss.item() == pytest.approx(_reference_koleo(cls.double(), images).item(), rel=1e-3)
    assert torch.equal(cast.grad, plain.grad)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_features_in_half_precision_are_compared_in_float32(dtype: torch.dtype) -> None:
    cls = _logits(12, 64, scale=2.0).to(dtype).requires_grad_()
    exact = cls.detach().double().requires_grad_()
    loss, expected = koleo_loss(cls, 6), _reference_koleo(exact, 6)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(cls.grad.double(), exact.grad, rtol=1e-2, atol=1e-3)  # type: ignore[union-attr]


def test_exact_duplicates_have_a_finite_loss_and_gradient() -> None:
    cls = torch.ones(4, 8).requires_grad_()
    loss = koleo_loss(cls, 2)
    loss.backward()
    assert 30 < loss.item() < 40  # −2 log of about 1e-8
    assert cls.grad is not None
    assert cls.grad.isfinite().all()


def test_a_zero_feature_has_a_finite_gradient() -> None:
    cls = torch.cat([torch.zeros(1, 8), _logits(3, 8)]).requires_grad_()
    koleo_loss(cls, 2).backward()
    assert cls.grad is not None
    assert cls.grad.isfinite().all()


def _koleo_on_rank(cls: Tensor, images: int) -> tuple[Tensor, Tensor]:
    own = cls.chunk(dist.get_world_size(), dim=1)[dist.get_rank()].flatten(0, 1).clone().requires_grad_()
    loss = koleo_loss(own, images // dist.get_world_size(), across_ranks=True)
    loss.backward()
    assert own.grad is not None
    return loss.detach(), own.grad


@pytest.mark.distributed
def test_koleo_across_ranks_sees_the_whole_batch() -> None:
    images, world = 6, 2
    cls = _logits(2 * images, 10).unflatten(0, (2, images))
    results: list[Any] = run_on_ranks(_koleo_on_rank, world, cls, images)
    whole = cls.flatten(0, 1).double().requires_grad_()
    expected = _reference_koleo(whole, images)
    expected.backward()
    assert sum(loss.item() for loss, _ in results) / world == pytest.approx(expected.item(), rel=1e-5)
    # Data parallelism averages the ranks' gradients.
    gradient = torch.cat([grad.unflatten(0, (2, images // world)) for _, grad in results], dim=1) / world
    torch.testing.assert_close(gradient.flatten(0, 1).double(), whole.grad, rtol=1e-4, atol=1e-5)


# -- entropy ----------------------------------------------------------------------------------------------------------


def test_entropy_equals_the_definition() -> None:
    probabilities = _targets(5)
    exact = -(probabilities.double() * probabilities.double().log()).sum(dim=-1).mean()
    assert entropy(probabilities).item() == pytest.approx(exact.item(), rel=1e-6)


def test_the_entropy_of_certainty_is_zero_and_of_uniformity_log_k() -> None:
    assert entropy(torch.eye(4)).item() == 0.0
    assert entropy(torch.full((3, 8), 1 / 8)).item() == pytest.approx(math.log(8))


def test_the_entropy_of_logits_is_that_of_their_softmax() -> None:
    logits = _logits(5).bfloat16()
    exact = (logits.double() / TEMPERATURE).softmax(dim=-1)
    expected = -(exact * exact.log()).sum(dim=-1).mean()
    assert softmax_entropy(logits, TEMPERATURE).item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_entropy_of_no_rows_is_zero() -> None:
    assert entropy(torch.zeros(0, 8)).item() == 0.0
