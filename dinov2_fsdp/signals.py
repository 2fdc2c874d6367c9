"""Signals that ask a run to stop: noticed at once, whatever the main thread is waiting for."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

STOPPING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""What schedulers, ``kill`` and a terminal's Ctrl-C send."""


class StopSignals(AbstractContextManager["StopSignals"]):
    """While entered, the signals of STOPPING set ``requested`` to their name; a second SIGINT ends the process at once.

    Python runs its signal handlers between two of the main thread's own instructions, so not while it waits in a
    collective. The interpreter's C handler, though, writes each signal's number into a file at once, and a thread
    reads it there. Only the main thread can enter; in another one nothing is caught.
    """

    def __init__(self) -> None:
        self.requested: str | None = None

    def __enter__(self) -> StopSignals:
        self._caught = threading.current_thread() is threading.main_thread()
        if self._caught:
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            self._earlier: dict[int, Any] = {number: signal.signal(number, _ignore) for number in STOPPING}
            self._earlier_file = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
            self._listener.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._caught:
            signal.set_wakeup_fd(self._earlier_file)
            for number, handler in self._earlier.items():
                signal.signal(number, handler)
            # Not close alone: data workers were forked with a copy, and the listener would wait for theirs too.
            self._writer.shutdown(socket.SHUT_RDWR)
            self._listener.join()
            self._writer.close()
            self._reader.close()

    def _listen(self) -> None:
        interrupts = 0
        while received := self._reader.recv(64):
            for number in received:
                if number not in STOPPING:
                    continue
                self.requested = self.requested or signal.Signals(number).name
                interrupts += number == signal.SIGINT
                if interrupts > 1:
                    print("interrupted twice: ending without a save", file=sys.stderr, flush=True)
                    os._exit(128 + signal.SIGINT)


def leave_signals_to_parent() -> None:
    """Ignore the stop signals, in a process that another one ends: schedulers and terminals send them to all."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


def _ignore(_number: int, _frame: FrameType | None) -> None:
    """Stand in for the default action, which would end the process."""
