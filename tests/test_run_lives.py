"""Each start of a run has a number, higher than those before."""

from __future__ import annotations

from pathlib import Path

import pytest

from dinov2_fsdp.checkpoint import Superseded, begin_life, check_life


def test_every_life_gets_a_number_of_its_own(tmp_path: Path) -> None:
    assert [begin_life(tmp_path, None) for _ in range(3)] == [1, 2, 3]
    check_life(tmp_path, 3)


def test_a_life_that_was_counted_by_the_scheduler_keeps_its_number(tmp_path: Path) -> None:
    assert begin_life(tmp_path, 5) == 5
    with pytest.raises(Superseded, match=r"this is life 4 .* life 5 has begun on"):
        begin_life(tmp_path, 4)
