from __future__ import annotations

import pytest

from dinov2_fsdp.duration import Duration, due
from dinov2_fsdp.errors import UserError


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("10ep", 10, "ep"),
        ("0.5ep", 0.5, "ep"),
        ("1250it", 1250, "it"),
        ("500kit", 500_000, "it"),
        ("2Mimg", 2_000_000, "img"),
        ("4.35Mimg", 4_350_000, "img"),
        ("1Gimg", 1_000_000_000, "img"),
        ("12 img", 12, "img"),
        ("5%", 5, "%"),
        ("0", 0, "it"),
        (0, 0, "it"),
    ],
)
def test_every_unit_is_read(text: str | int, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["10", 10, "1.5"])
def test_a_number_without_a_unit_is_refused_with_the_valid_forms(text: str | int) -> None:
    with pytest.raises(UserError, match="has no unit") as error:
        Duration.parse(text)
    assert str(text) in str(error.value)
    assert all(form in str(error.value) for form in ("10ep", "1250it", "2Mimg", "5%"))


@pytest.mark.parametrize("text", ["-5ep", -1])
def test_a_negative_duration_is_refused(text: str | int) -> None:
    with pytest.raises(UserError, match="negative"):
        Duration.parse(text)
    with pytest.raises(UserError, match=">= 0"):
        Duration(-1.0, "it")


@pytest.mark.parametrize("text", ["10kep", "5k%", "10 epochs", "Mimg", "", "infep", "2mimg", "True"])
def test_an_unknown_form_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not understood"):
        Duration.parse(text)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("10ep", 12_500),
        ("0.5ep", 625),
        ("0.001ep", 1),  # 1.25 steps
        ("0.0014ep", 2),  # 1.75 steps
        ("7it", 7),
        ("2048img", 2),
        ("2049img", 3),
        ("2Mimg", 1954),
        ("5%", 50),
        ("0.25%", 3),  # 2.5 steps: halves go up
        ("0", 0),
        ("0%", 0),
    ],
)
def test_a_duration_in_steps_of_1024_images_and_epochs_of_1250_steps(text: str, steps: int) -> None:
    assert Duration.parse(text).steps(batch_size=1024, epoch_steps=1250, total_steps=1000) == steps


def test_a_small_duration_is_one_step_and_never_none() -> None:
    assert Duration.parse("1%").steps(batch_size=64, epoch_steps=10, total_steps=20) == 1


def test_the_length_of_the_run_cannot_be_a_part_of_the_run() -> None:
    with pytest.raises(UserError, match="5%"):
        Duration.parse("5%").steps(batch_size=64, epoch_steps=10, total_steps=None)


@pytest.mark.parametrize(
    "text", ["10ep", "0.5ep", "1250it", "500kit", "2Mimg", "1000it", "12345it", "5%", "0.05%", "0it"]
)
def test_the_text_of_a_duration_is_what_the_user_wrote(text: str) -> None:
    assert str(Duration.parse(text)) == text
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)


@pytest.mark.parametrize("text", ["0.0000001ep", "1234567.5img", "99999999999img"])
def test_unusual_durations_survive_being_written_and_read(text: str) -> None:
    assert Duration.parse(str(Duration.parse(text))) == Duration.parse(text)


def _due_steps(total: int, every: int, **options: bool | int) -> list[int]:
    return [step for step in range(total + 1) if due(step, every, total, **options)]  # type: ignore[arg-type]


def test_a_save_is_due_at_multiples_and_at_the_last_step() -> None:
    assert _due_steps(25, 10) == [10, 20, 25]
    assert _due_steps(20, 10) == [10, 20]


def test_no_save_is_due_two_steps_before_the_last() -> None:
    assert _due_steps(22, 10) == [10, 22]
    assert _due_steps(21, 10) == [10, 21]
    assert _due_steps(23, 10) == [10, 20, 23]
    assert _due_steps(22, 10, near_end=0) == [10, 20, 22]


def test_nothing_is_left_out_near_the_end_when_the_last_step_is_not_due() -> None:
    assert _due_steps(22, 10, last=False) == [10, 20]


def test_a_log_line_at_every_step_is_due_at_every_step() -> None:
    assert _due_steps(5, 1) == [1, 2, 3, 4, 5]
    assert _due_steps(6, 2) == [2, 4, 6]


def test_the_first_step_is_due_on_request() -> None:
    assert _due_steps(20, 10, first=True) == [1, 10, 20]
    assert _due_steps(2, 10, first=True) == [1, 2]


def test_an_interval_of_zero_leaves_only_the_last_step() -> None:
    assert _due_steps(20, 0) == [20]
    assert _due_steps(20, 0, last=False) == []
