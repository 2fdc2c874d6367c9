"""What a run shows: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from monitored import lines, make

from dinov2_fsdp.monitor.console import Bar, bar_text, format_seconds, report_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


METRICS = {
    "loss": 8.1234, "loss/dino": 5.1, "loss/ibot": 3.0, "loss/koleo": -0.1, "lr": 1.2e-4, "img_per_s": 112.3,
    "data_wait": 0.03, "memory": 1.2, "eta": 2050.0,
}  # fmt: skip


def test_a_plain_line_says_all_that_matters() -> None:
    assert report_line(120, 5000, METRICS) == (
        "step 120/5000  2.4%  loss 8.123  dino 5.1 ibot 3 koleo -0.1  "
        "lr 1.2e-04  112 img/s  data 3%  1.2 GiB  ETA 0:34:10"
    )


def test_a_plain_line_leaves_out_what_is_not_there() -> None:
    assert report_line(1, 4, {"loss": math.nan, "eta": math.inf}) == "step 1/4  25.0%  loss nan  ETA -:--:--"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (2050, "0:34:10"), (86399, "23:59:59"), (273845, "3d 04:04:05"),
     (math.inf, "-:--:--"), (math.nan, "-:--:--")],
)  # fmt: skip
def test_durations_are_written_for_people(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_lines_and_messages_reach_a_stream_that_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    monitor = make(tmp_path, console=True, stream=stream)
    monitor.message("hello")
    monitor.record(1, {"loss": torch.tensor(2.0)})
    monitor.flush(1)
    monitor.event(1, {"eval/knn_20": 63.1})
    hello, step, event = stream.getvalue().splitlines()
    assert hello == "hello"
    assert step.startswith("step 1/100  1.0%  loss 2.000  ")
    assert event == "step 1  eval/knn_20 63.1"
    assert "\x1b" not in stream.getvalue()


def test_the_bar_fits_100_columns_and_messages_stay_above_it() -> None:
    stream = Terminal()
    bar = Bar(stream, total_steps=1_250_000, start_step=0, width=100)
    metrics = {**METRICS, "img_per_s": 11234.0, "data_wait": 1.0, "eta": 12 * 86400.0 + 3}
    bar.report(1_249_999, metrics)
    bar.message("[a message]")
    bar.close()
    assert bar_text(1_249_999, 1_250_000, metrics) in stream.getvalue()
    assert "12d 00:00:03" in stream.getvalue()
    assert "[a message]\n" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[?25h")  # the cursor is back


class Broken(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def fileno(self) -> int:
        raise OSError


@pytest.mark.parametrize("terminal", [False, True])
def test_a_stream_that_breaks_does_not_end_the_run(tmp_path: Path, terminal: bool) -> None:
    monitor = make(tmp_path, console=True, stream=Broken(terminal))
    for step in (1, 2):
        monitor.record(step, {"loss": 1.0})
        monitor.message("hello")
        monitor.flush(step)
    monitor.close()
    assert len(lines(tmp_path)) == 2


def test_a_closed_pipe_leaves_the_exit_code_at_zero(tmp_path: Path) -> None:
    program = (
        "import sys, time; from dinov2_fsdp.monitor.console import Lines\n"
        "sys.stdin.read()\n"
        "lines = Lines(sys.stdout, 9)\n"
        "for _ in range(3): lines.message('x' * 100)\n"
        "print('not ours')"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[1],
    )
    assert child.stdin
    assert child.stdout
    assert child.stderr
    child.stdout.close()
    child.stdin.close()
    errors = child.stderr.read()
    child.stderr.close()
    assert (child.wait(), errors) == (0, b"")
