from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from torch import Tensor

from dinov2_fsdp.ssl import centering
from dinov2_fsdp.ssl.centering import SinkhornCentering, SoftmaxCentering, build_centering

CPU = torch.device("cpu")
GO, SKIP = torch.zeros(()), torch.ones(())
PROTOTYPES = 13


def _logits(rows: int, seed: int = 0, scale: float = 1.0, prototypes: int = PROTOTYPES) -> Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(seed)) * scale


def _step(method: SoftmaxCentering | SinkhornCentering, chunks: list[Tensor], skip: Tensor = GO) -> list[Tensor]:
    """One training step: the centre serves one microbatch after the other."""
    targets = [target for chunk in chunks for target in method.targets([chunk], 0.05)]
    method.reduce()
    method.commit(skip)
    return targets


def _centre(method: SoftmaxCentering) -> Tensor:
    return method.tensors()["centre"].double()


# -- EMA centre -------------------------------------------------------------------------------------------------------


def _reference_ema(steps: list[Tensor], momentum: float) -> Tensor:
    """Equation 4 of DINO: c ← m·c + (1 − m)·mean over the batch, from c = 0."""
    centre = torch.zeros(PROTOTYPES, dtype=torch.float64)
    for logits in steps:
        centre = momentum * centre + (1 - momentum) * logits.double().mean(dim=0)
    return centre


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.9])
def test_the_centre_is_the_ema_of_the_mean_logits(momentum: float) -> None:
    method, steps = SoftmaxCentering(PROTOTYPES, momentum, CPU), [_logits(6, seed) for seed in range(5)]
    for logits in steps:
        _step(method, [logits])
    torch.testing.assert_close(_centre(method), _reference_ema(steps, momentum), rtol=1e-5, atol=1e-6)


def test_the_centre_moves_at_every_step() -> None:
    method, steps = SoftmaxCentering(PROTOTYPES, 0.9, CPU), [_logits(6, seed) for seed in range(4)]
    for number, logits in enumerate(steps):
        targets = _step(method, [logits])[0]
        centre = _reference_ema(steps[:number], 0.9)
        expected = ((logits.double() - centre) / 0.05).softmax(dim=-1)
        torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-6)


def test_targets_are_the_softmax_of_centred_logits_over_the_temperature() -> None:
    method = SoftmaxCentering(PROTOTYPES, 0.9, CPU)
    method.tensors()["centre"].copy_(_logits(1, 7)[0])
    logits = _logits(5)
    z = (logits.double() - _logits(1, 7).double()) / 0.07
    expected = z.exp() / z.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(method.targets([logits], 0.07)[0].double(), expected, rtol=1e-5, atol=1e-7)


def test_rows_count_alike_whichever_microbatch_holds_them() -> None:
    method, chunks = SoftmaxCentering(PROTOTYPES, 0.9, CPU), [_logits(7, 0), _logits(1, 1, 5.0), _logits(2, 2)]
    _step(method, chunks)
    torch.testing.assert_close(_centre(method), _reference_ema([torch.cat(chunks)], 0.9), rtol=1e-5, atol=1e-6)


def test_all_microbatches_of_a_step_see_the_same_centre() -> None:
    method, logits = SoftmaxCentering(PROTOTYPES, 0.5, CPU), _logits(4)
    _step(method, [_logits(4, 9)])
    first, second = _step(method, [logits, logits])
    assert torch.equal(first, second)


def test_bf16_logits_are_centred_in_float32() -> None:
    method, logits = SoftmaxCentering(PROTOTYPES, 0.9, CPU), _logits(512).bfloat16()
    assert _step(method, [logits])[0].dtype == torch.float32
    torch.testing.assert_close(_centre(method), _reference_ema([logits], 0.9), rtol=1e-5, atol=1e-6)


def test_a_skipped_step_leaves_the_centre() -> None:
    method = SoftmaxCentering(PROTOTYPES, 0.9, CPU)
    _step(method, [_logits(4)])
    before = _centre(method).clone()
    _step(method, [torch.full((4, PROTOTYPES), float("nan"))], SKIP)
    assert torch.equal(_centre(method), before)


def test_a_step_after_a_skipped_one_counts_again() -> None:
    method, steps = SoftmaxCentering(PROTOTYPES, 0.9, CPU), [_logits(4, 0), _logits(4, 2)]
    _step(method, steps[:1])
    _step(method, [_logits(4, 1)], SKIP)
    _step(method, steps[1:])
    torch.testing.assert_close(_centre(method), _reference_ema(steps, 0.9), rtol=1e-5, atol=1e-6)


def test_a_step_without_rows_leaves_the_centre() -> None:
    method = SoftmaxCentering(PROTOTYPES, 0.9, CPU)
    _step(method, [_logits(4)])
    before = _centre(method).clone()
    assert _step(method, [torch.zeros(0, PROTOTYPES)])[0].shape == (0, PROTOTYPES)
    assert torch.equal(_centre(method), before)


def test_without_momentum_there_is_no_centre() -> None:
    method = build_centering("none", PROTOTYPES, 0.9, 3, CPU)
    for seed in range(3):
        logits = _logits(4, seed)
        assert torch.equal(_step(method, [logits])[0], (logits / 0.05).softmax(dim=-1))
    assert method.norm() == 0


def test_the_centre_survives_a_checkpoint() -> None:
    saved, loaded = SoftmaxCentering(PROTOTYPES, 0.9, CPU), SoftmaxCentering(PROTOTYPES, 0.9, CPU)
    _step(saved, [_logits(4)])
    loaded.tensors()["centre"].copy_(saved.tensors()["centre"])
    for method in (saved, loaded):
        _step(method, [_logits(4, 1)])
    assert torch.equal(saved.tensors()["centre"], loaded.tensors()["centre"])


class _Exchange:
    """Stands in for ``dist.all_reduce`` and remembers who waited."""

    def __init__(self) -> None:
        self.calls: list[bool] = []
        self.waited = 0

    def __call__(self, tensor: Tensor, async_op: bool = False) -> _Exchange:
        self.calls.append(async_op)
        return self

    def wait(self) -> None:
        self.waited += 1


def test_the_exchange_is_awaited_only_when_the_centre_is_needed_next(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange, method = _Exchange(), SoftmaxCentering(PROTOTYPES, 0.9, CPU)
    monkeypatch.setattr(centering, "_several_ranks", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", exchange)
    _step(method, [_logits(4), _logits(4, 1)])
    method.norm()
    assert (exchange.calls, exchange.waited) == ([True], 0)
    method.targets([_logits(4)], 0.05)
    assert (exchange.calls, exchange.waited) == ([True], 1)


# -- Sinkhorn–Knopp ---------------------------------------------------------------------------------------------------


def _reference_sinkhorn(logits: Tensor, temperature: float, iterations: int = 3) -> Tensor:
    """SwAV, section 3.1 and listing 1, in float64: one global maximum is taken out before exp."""
    scores = logits.double() / temperature
    plan = (scores - scores.max()).exp().T
    prototypes, rows = plan.shape
    plan = plan / plan.sum()
    for _ in range(iterations):
        plan = plan / plan.sum(dim=1, keepdim=True) / prototypes
        plan = plan / plan.sum(dim=0, keepdim=True) / rows
    return (plan * rows).T


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_equals_the_published_algorithm(iterations: int) -> None:
    logits = _logits(20)
    targets = SinkhornCentering(iterations).targets([logits], 0.07)[0]
    expected = _reference_sinkhorn(logits, 0.07, iterations)
    torch.testing.assert_close(targets.double(), expected, rtol=1e-4, atol=1e-6)


def test_three_iterations_differ_from_convergence() -> None:
    logits = _logits(20)
    three, many = (SinkhornCentering(n).targets([logits], 0.07)[0] for n in (3, 200))
    assert (three - many).abs().max() > 1e-3


def test_logits_that_overflow_exp_give_finite_targets() -> None:
    logits = _logits(20) + 50.0  # exp(50 / .04) is beyond float64 too
    targets = SinkhornCentering(3).targets([logits], 0.04)[0]
    torch.testing.assert_close(targets.double(), _reference_sinkhorn(logits, 0.04), rtol=1e-3, atol=1e-5)


def test_logits_of_a_huge_range_give_distributions() -> None:
    logits = _logits(20, scale=100.0)
    logits[3] -= 5000.0  # exp underflows for the whole row, whatever global maximum is taken out
    targets = SinkhornCentering(3).targets([logits], 0.04)[0]
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(20), rtol=1e-4, atol=1e-4)


def test_a_prototype_that_dwarfs_the_others_gets_its_share_only() -> None:
    logits = _logits(20)
    dwarfing = logits.clone()
    dwarfing[:, 4] += 5000.0  # a factor per prototype is what Sinkhorn–Knopp divides out
    plain, targets = (SinkhornCentering(3).targets([chunk], 0.07)[0] for chunk in (logits, dwarfing))
    torch.testing.assert_close(targets, plain, rtol=0.02, atol=1e-3)


def test_several_microbatches_equal_one() -> None:
    logits = _logits(24)
    whole = SinkhornCentering(3).targets([logits], 0.07)[0]
    parts = SinkhornCentering(3).targets(list(logits.split([5, 0, 18, 1])), 0.07)
    assert [len(part) for part in parts] == [5, 0, 18, 1]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-7)


def test_rows_sum_to_one_and_prototypes_share_the_rows() -> None:
    targets = SinkhornCentering(100).targets([_logits(26)], 1.0)[0]
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(26), rtol=1e-5, atol=0)
    torch.testing.assert_close(targets.sum(dim=0), torch.full((PROTOTYPES,), 2.0), rtol=1e-3, atol=0)


def test_bf16_logits_are_balanced_in_float32() -> None:
    logits = _logits(20).bfloat16()
    targets = SinkhornCentering(3).targets([logits], 0.07)[0]
    assert targets.dtype == torch.float32
    torch.testing.assert_close(targets.double(), _reference_sinkhorn(logits, 0.07), rtol=1e-4, atol=1e-6)


def test_no_rows_at_all_give_no_targets() -> None:
    (targets,) = SinkhornCentering(3).targets([torch.zeros(0, PROTOTYPES)], 0.07)
    assert targets.shape == (0, PROTOTYPES)


def test_the_configs_names_choose_the_method() -> None:
    chosen = {name: build_centering(name, PROTOTYPES, 0.8, 5, CPU) for name in ("softmax", "sinkhorn", "none")}
    assert isinstance(chosen["sinkhorn"], SinkhornCentering)
    assert chosen["sinkhorn"].iterations == 5
    momenta = [method.momentum for method in chosen.values() if isinstance(method, SoftmaxCentering)]
    assert momenta == [0.8, None]


# -- two ranks with uneven rows ---------------------------------------------------------------------------------------

# Rows of each microbatch of each rank; in the second step one rank has none at all.
UNEVEN: list[list[list[int]]] = [[[5, 2], [1, 9]], [[4, 3], [0, 0]], [[0, 1], [6, 0]]]


def _rank_chunks(step: int) -> list[list[Tensor]]:
    return [
        [_logits(rows, seed=100 * step + 10 * rank + number) for number, rows in enumerate(sizes)]
        for rank, sizes in enumerate(UNEVEN[step])
    ]


# Added to a rank's logits: exp overflows float64 on one, and without its maximum underflows on the other.
FAR_APART = [[60.0, 61.0], [-40.0, 40.0]]


def _far_apart(rank: int, case: int) -> Tensor:
    return _logits(7 - 3 * rank, seed=50 + rank) + FAR_APART[case][rank]


def _centre_steps_on_rank() -> dict[str, Any]:
    rank, skips = dist.get_rank(), [GO, SKIP, GO]
    softmax, sinkhorn = SoftmaxCentering(PROTOTYPES, 0.9, CPU), SinkhornCentering(3)
    centres, targets = [], []
    for step, skip in enumerate(skips):
        chunks = _rank_chunks(step)[rank]
        _step(softmax, chunks, skip)
        centres.append(softmax.tensors()["centre"].clone())
        targets.append(torch.cat(sinkhorn.targets(chunks, 0.07)))
    overflowing = [sinkhorn.targets([_far_apart(rank, case)], 0.04)[0] for case in range(len(FAR_APART))]
    return {"centres": centres, "sinkhorn": targets, "overflowing": overflowing}


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_on_ranks(_centre_steps_on_rank, 2)


@pytest.mark.distributed
def test_ranks_agree_on_the_centre_bit_for_bit(two_ranks: list[dict[str, Any]]) -> None:
    first, second = two_ranks
    for a, b in zip(first["centres"], second["centres"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.distributed
def test_the_centre_weighs_the_rows_of_uneven_ranks_alike(two_ranks: list[dict[str, Any]]) -> None:
    seen: list[Tensor] = []
    for step, centre in enumerate(two_ranks[0]["centres"]):
        if step != 1:  # skipped
            seen.append(torch.cat([chunk for chunks in _rank_chunks(step) for chunk in chunks]))
        torch.testing.assert_close(centre.double(), _reference_ema(seen, 0.9), rtol=1e-5, atol=1e-6)


@pytest.mark.distributed
@pytest.mark.parametrize("step", range(len(UNEVEN)))
def test_sinkhorn_over_uneven_ranks_equals_one_process(two_ranks: list[dict[str, Any]], step: int) -> None:
    whole = torch.cat([chunk for chunks in _rank_chunks(step) for chunk in chunks])
    targets = torch.cat([rank["sinkhorn"][step] for rank in two_ranks])
    torch.testing.assert_close(targets.double(), _reference_sinkhorn(whole, 0.07), rtol=1e-4, atol=1e-6)


@pytest.mark.distributed
def test_sinkhorn_over_ranks_whose_logits_overflow_exp_equals_one_process(two_ranks: list[dict[str, Any]]) -> None:
    whole = torch.cat([_far_apart(rank, 0) for rank in range(2)])
    assert (whole.double() / 0.04).exp().isinf().any()
    targets = torch.cat([rank["overflowing"][0] for rank in two_ranks])
    torch.testing.assert_close(targets.double(), _reference_sinkhorn(whole, 0.04), rtol=2e-3, atol=1e-5)


@pytest.mark.distributed
def test_sinkhorn_over_ranks_that_are_far_apart_gives_distributions(two_ranks: list[dict[str, Any]]) -> None:
    targets = torch.cat([rank["overflowing"][1] for rank in two_ranks])
    assert targets.isfinite().all()
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(targets)), rtol=1e-4, atol=1e-4)
