"""Lengths of training in any unit (``10ep``, ``1250it``, ``2Mimg``, ``5%``), and when something periodic is due."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, cast

from dinov2_fsdp.errors import UserError

Unit = Literal["it", "ep", "img", "%"]

_MULTIPLIERS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}
_PATTERN = re.compile(r"(?P<number>\d+(\.\d+)?)\s*(?:(?P<multiplier>[kMG]?)(?P<counted>it|img)|(?P<plain>ep|%))")
_VALID_FORMS = (
    "'10ep' (epochs), '1250it' (steps), '2Mimg' (images), '5%' (of the run) or 0; k, M, G go before it and img"
)


@dataclass(frozen=True)
class Duration:
    """A length of training: ``value`` in ``unit``, multipliers already applied (``2Mimg`` is 2,000,000 ``img``)."""

    value: float
    unit: Unit

    def __post_init__(self) -> None:
        if not (math.isfinite(self.value) and self.value >= 0):
            raise UserError(f"a duration cannot be {self.value:g}{self.unit}: expected a finite number >= 0")

    @staticmethod
    def parse(text: str | int) -> Duration:
        """Return the duration written in ``text``; ``0`` needs no unit.

        Raises UserError for anything else without a unit, for negative numbers and for unknown units.
        """
        written = str(text).strip()
        if written == "0":
            return Duration(0.0, "it")
        match = _PATTERN.fullmatch(written)
        if match is None:
            raise UserError(f"duration {text!r} {_what_is_wrong(written)}; valid forms: {_VALID_FORMS}")
        # Decimal, because 4.35 * 10**6 is not a whole number of images in binary.
        value = Decimal(match["number"]) * _MULTIPLIERS[match["multiplier"] or ""]
        return Duration(float(value), cast(Unit, match["counted"] or match["plain"]))

    def steps(self, batch_size: int, epoch_steps: int, total_steps: int | None) -> int:
        """Return the duration in optimizer steps: the nearest number, images rounded up, at least 1 unless zero.

        ``batch_size`` is the global batch in images, ``epoch_steps`` the steps of one epoch. A small positive duration
        is one step rather than none, because 0 means "off" where a duration is an interval.
        Raises UserError for ``%`` where ``total_steps`` is None (the length of the run itself).
        """
        if self.value == 0:
            return 0
        if self.unit == "img":
            return math.ceil(self.value / batch_size)
        if self.unit == "%":
            if total_steps is None:
                raise UserError(
                    f"duration '{self}' is a part of the run, but here it would define the length of the run itself; "
                    "give it as epochs, steps or images, such as '10ep', '1250it' or '2Mimg'"
                )
            exact = self.value / 100 * total_steps
        else:
            exact = self.value * (epoch_steps if self.unit == "ep" else 1)
        return max(1, math.floor(exact + 0.5))

    def __str__(self) -> str:
        """Return a text that :meth:`parse` reads back as the same duration."""
        if self.unit in ("it", "img") and self.value >= 10_000:
            for suffix in "GMk":
                if self.value % _MULTIPLIERS[suffix] == 0:
                    return f"{int(self.value) // _MULTIPLIERS[suffix]}{suffix}{self.unit}"
        digits = str(int(self.value)) if self.value.is_integer() else format(Decimal(repr(self.value)), "f")
        return f"{digits}{self.unit}"


def _what_is_wrong(written: str) -> str:
    """Return the reason why ``written`` is not a duration, as the verb phrase of an error message."""
    if written.startswith("-"):
        return "is negative"
    if re.fullmatch(r"\d+(\.\d+)?", written):
        return f"has no unit: say which one, as in '{written}ep' or '{written}it'"
    return "is not understood"


def due(step: int, every: int, total_steps: int, *, first: bool = False, last: bool = True, near_end: int = 2) -> bool:
    """Return whether something periodic (a save, an evaluation, a log line) happens after ``step`` steps are done.

    ``step`` counts finished steps, 1 to ``total_steps``; nothing is due at 0. Due are the multiples of ``every``, step
    1 if ``first``, and ``total_steps`` if ``last``. When ``last`` will do it anyway, the ``near_end`` steps before the
    last are left out, so that nothing is saved twice within moments; an interval no longer than ``near_end`` asks for
    just that and keeps them. ``every <= 0`` switches the multiples off, not ``first`` and ``last``: where 0 should mean
    never at all, pass ``last=every > 0``.
    """
    if step <= 0:
        return False
    if (last and step == total_steps) or (first and step == 1):
        return True
    if every <= 0 or step % every:
        return False
    return not (last and every > near_end and total_steps - near_end <= step < total_steps)
