"""How things end: the errors that are shown as one message, without a traceback, and the exit codes."""

from __future__ import annotations

import argparse
import difflib
import re
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn

EXIT_FAILED = 1
"""A machine, a process or the run itself failed; the log says which."""
EXIT_USER_ERROR = 2
"""A mistake of the user; the one message says how to mend it."""
EXIT_INTERRUPTED = 75
"""A signal asked the run to stop, and it has saved: the same command continues it (EX_TEMPFAIL of sysexits.h)."""
FILE_ONLY = {"file_only": True}
"""``extra`` of a log record that the terminal need not show: it gets one line that says the same."""


class UserError(Exception):
    """A mistake of the user: the message names the value, what was expected, and the way out."""

    silent = False
    """Whether another process already shows this message."""


class RunFailed(RuntimeError):
    """A machine, a process or the run itself failed: the message names the rank and the cause."""

    silent = False
    """Whether another process already shows this message."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the valid word closest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


class Parser(argparse.ArgumentParser):
    """Says in one message, without the long list of all options, what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        unknown = re.fullmatch(r"unrecognized arguments: (--[^\s=]+).*", message)
        guess = nearest(unknown[1], self._option_string_actions) if unknown else ""
        raise UserError(f"{message}{guess}\n--help lists all options")


def show(error: UserError | RunFailed) -> int:
    """Print the error on stderr, unless another process does, and return its exit code."""
    if not error.silent:
        print(f"error: {error}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR if isinstance(error, UserError) else EXIT_FAILED


def run_cli(main: Callable[[], int | None]) -> NoReturn:
    """Run a command's ``main``: a :class:`UserError` becomes one message and exit code 2, a :class:`RunFailed` one
    message and exit code 1, Ctrl-C (where nothing else is done about it) one word and the shell's code for it."""
    try:
        code = main()
    except (UserError, RunFailed) as error:
        code = show(error)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr, flush=True)
        code = 128 + signal.SIGINT
    raise SystemExit(code or 0)
