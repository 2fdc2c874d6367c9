"""Signals ask a run to stop, and are seen even while the main thread waits inside a library."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from dinov2_fsdp.errors import run_cli
from dinov2_fsdp.signals import STOPPING, StopSignals


def wait_for(signals: StopSignals, seconds: float = 10.0) -> str | None:
    deadline = time.monotonic() + seconds
    while signals.requested is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return signals.requested


ASKING = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)
"""What schedulers and terminals send; written here anew, so that none is forgotten there."""


@pytest.mark.parametrize("number", ASKING, ids=lambda number: number.name)
def test_every_stop_signal_is_noticed(number: signal.Signals) -> None:
    # Uncaught, a signal would end pytest before the test could fail.
    before = signal.signal(number, lambda *_: None)
    try:
        with StopSignals() as signals:
            assert signals.requested is None
            os.kill(os.getpid(), number)
            assert wait_for(signals) == number.name
    finally:
        signal.signal(number, before)


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in STOPPING]
    with StopSignals():
        assert [signal.getsignal(number) for number in STOPPING] != before
    assert [signal.getsignal(number) for number in STOPPING] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_leaving_does_not_wait_for_processes_that_were_forked_meanwhile() -> None:
    """Data workers are, and on a failure they outlive the loop."""
    pid = 0
    try:
        with StopSignals():
            pid = os.fork()
            if pid == 0:
                time.sleep(30)
                os._exit(0)
            start = time.monotonic()
        assert time.monotonic() - start < 10
    finally:
        if pid:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_other_signals_ask_for_nothing() -> None:
    before = signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGCHLD)
            assert wait_for(signals, 0.3) is None
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_outside_the_main_thread_nothing_is_caught() -> None:
    found: list[str | None] = []

    def work() -> None:
        with StopSignals() as signals:
            found.append(signals.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [None]


WAITING = """
import sys, threading, ctypes
from dinov2_fsdp.signals import StopSignals
with StopSignals() as signals:
    def tell():
        while signals.requested is None:
            pass
        print(signals.requested, flush=True)
        import os; os._exit(7)
    threading.Thread(target=tell, daemon=True).start()
    print("ready", flush=True)
    # PyDLL would hold the lock; CDLL lets other threads run, as a collective does, and the main thread sees nothing.
    libc = ctypes.CDLL(None)
    while True:
        libc.poll(None, 0, 60000)
"""


def started(code: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_signal_is_seen_while_the_main_thread_waits_in_native_code() -> None:
    process = started(WAITING)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=30)
    assert (output, process.returncode) == ("SIGUSR1\n", 7)


def test_a_second_interrupt_ends_the_process_at_once() -> None:
    process = started(
        "import time\nfrom dinov2_fsdp.signals import StopSignals\n"
        "with StopSignals() as signals:\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first one asks only"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted twice" in said


def test_ctrl_c_ends_a_command_with_a_word(capfd: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        run_cli(interrupted)
    assert ended.value.code == 130
    assert capfd.readouterr().err == "\ninterrupted\n"
