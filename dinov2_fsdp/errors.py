"""The one kind of error that a user can mend: shown as one message, without a traceback, exit code 2."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """A mistake of the user: the message names the value, what was expected, and the way out."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid word closest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def exit_with(error: UserError) -> NoReturn:
    """Print the error on stderr and leave with exit code 2."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    raise SystemExit(USER_ERROR_EXIT_CODE)


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main`` and turn a :class:`UserError` into one message and exit code 2."""
    try:
        code = main()
    except UserError as error:
        exit_with(error)
    raise SystemExit(code or 0)
