from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.optim.schedules import (
    Constant,
    Cosine,
    Linear,
    Schedules,
    build_schedules,
    scaled_learning_rate,
)


def _published(start: float, end: float, total: int, warmup: int, warmup_start: float, freeze: int) -> np.ndarray:
    """The values that the published runs were trained with, as their papers' code tabulates them."""
    n = total - warmup - freeze
    ramp = np.linspace(warmup_start, start, warmup)
    cosine = np.array([end + 0.5 * (start - end) * (1 + np.cos(np.pi * i / n)) for i in range(n)])
    return np.concatenate([np.zeros(freeze), ramp, cosine])


@pytest.mark.parametrize(
    ("warmup", "warmup_start", "freeze"),
    [(0, 0.0, 0), (10, 0.0, 0), (10, 1e-5, 7), (1, 0.0, 0), (100, 0.0, 0), (60, 0.1, 40)],
)
def test_a_cosine_equals_the_published_table(warmup: int, warmup_start: float, freeze: int) -> None:
    schedule = Cosine(4e-3, 1e-6, 100, warmup=warmup, warmup_start=warmup_start, freeze=freeze)
    table = _published(4e-3, 1e-6, 100, warmup, warmup_start, freeze)
    np.testing.assert_allclose([schedule(t) for t in range(100)], table, rtol=1e-12, atol=1e-18)


def test_the_ends_of_a_cosine_are_exact() -> None:
    schedule = Cosine(4e-3, 1e-6, 125_000, warmup=12_500)
    assert schedule(0) == 0.0
    assert schedule(12_499) == schedule(12_500) == 4e-3
    assert 1e-6 < schedule(124_999) < 1e-6 + 1e-11
    assert schedule(125_000) == schedule(10**9) == 1e-6


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"12500 warm-up steps .* 100 steps"):
        Cosine(1.0, 0.0, 100, warmup=12_500)


def test_a_linear_ramp_includes_both_ends_and_then_stays() -> None:
    schedule = Linear(0.04, 0.07, 30)
    np.testing.assert_allclose([schedule(t) for t in range(30)], np.linspace(0.04, 0.07, 30), rtol=1e-12)
    assert (schedule(0), schedule(29), schedule(30), schedule(10**6)) == (0.04, 0.07, 0.07, 0.07)
    assert Linear(0.04, 0.07, 1)(0) == 0.04
    assert Linear(0.04, 0.07, 0)(0) == 0.07


def test_a_constant_is_constant() -> None:
    assert {Constant(0.5)(t) for t in (0, 1, 10**9)} == {0.5}


def _vitl16_in1k() -> Schedules:
    return build_schedules(
        total_steps=125_000,
        warmup_steps=12_500,
        learning_rate=4e-3,
        min_learning_rate=1e-6,
        weight_decay=0.04,
        weight_decay_end=0.4,
        teacher_momentum=0.992,
        teacher_momentum_end=1.0,
        teacher_temperature_start=0.04,
        teacher_temperature=0.07,
        teacher_temperature_warmup_steps=37_500,
        freeze_prototypes_steps=1250,
    )


def test_prototypes_are_frozen_for_an_epoch_and_then_learn_like_the_rest() -> None:
    schedules = _vitl16_in1k()
    last_frozen, first_free = schedules(1249), schedules(1250)
    assert last_frozen.prototype_learning_rate == 0.0 < last_frozen.learning_rate
    assert first_free.prototype_learning_rate == first_free.learning_rate == pytest.approx(4e-3 * 1250 / 12_499)


def test_the_ends_of_a_run() -> None:
    schedules = _vitl16_in1k()
    first, last = schedules(0), schedules(124_999)
    assert (first.weight_decay, first.teacher_momentum) == (pytest.approx(0.04), pytest.approx(0.992))
    assert first.teacher_temperature == 0.04
    assert (last.weight_decay, last.teacher_momentum) == (pytest.approx(0.4), pytest.approx(1.0))
    assert last.teacher_temperature == schedules(37_499).teacher_temperature == 0.07
    assert schedules(37_498).teacher_temperature < 0.07
    # Halfway along the cosine each is halfway between its ends.
    assert schedules(62_500).weight_decay == pytest.approx(0.22)
    assert schedules(62_500).teacher_momentum == pytest.approx(0.996)


def test_a_short_run_may_end_within_the_temperature_warm_up() -> None:
    arguments = {"weight_decay": 0.04, "weight_decay_end": 0.4, "teacher_momentum": 0.992, "teacher_momentum_end": 1.0}
    schedules = build_schedules(
        total_steps=10,
        warmup_steps=10,
        learning_rate=1.0,
        min_learning_rate=0.0,
        teacher_temperature_start=0.0,
        teacher_temperature=1.0,
        teacher_temperature_warmup_steps=101,
        freeze_prototypes_steps=20,
        **arguments,
    )
    assert schedules(9).teacher_temperature == pytest.approx(0.09)
    assert schedules(9).learning_rate == 1.0
    assert schedules(9).prototype_learning_rate == 0.0


def test_the_learning_rate_follows_the_batch() -> None:
    assert scaled_learning_rate(4e-3, 2048, "sqrt") == pytest.approx(4e-3 * 2**0.5)
    assert scaled_learning_rate(4e-3, 1024, "sqrt") == 4e-3
    assert scaled_learning_rate(5e-4, 1024, "linear") == pytest.approx(2e-3)
    assert scaled_learning_rate(4e-3, 64, "none") == 4e-3
    with pytest.raises(UserError, match="did you mean 'sqrt'"):
        scaled_learning_rate(4e-3, 64, "sqr")  # type: ignore[arg-type]


def test_schedules_and_durations_do_not_import_torch() -> None:
    code = "import sys, dinov2_fsdp.optim.schedules, dinov2_fsdp.duration; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
