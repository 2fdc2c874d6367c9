"""What rank 0 shows on stdout: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO, cast

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

_SECONDS_BETWEEN_REDRAWS = 0.25


def open_console(enabled: bool, total_steps: int, start_step: int, stream: TextIO | None = None) -> Console:
    """Return the console that suits ``stream`` (stdout by default), or one that says nothing."""
    stream = sys.stdout if stream is None else stream
    if not enabled:
        return Console()
    return Bar(stream, total_steps, start_step) if stream.isatty() else Lines(stream, total_steps)


class Console:
    """Says nothing; the base of those that do."""

    def advance(self, step: int) -> None:
        """Tell that ``step`` steps are done, between two reports."""

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics of a flush."""

    def message(self, text: str) -> None:
        """Show one line of text."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class Lines(Console):
    """One plain line per report."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        self.stream, self.total_steps = _Unbreakable(stream), total_steps

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self.message(report_line(step, self.total_steps, metrics))

    def message(self, text: str) -> None:
        self.stream.write(text + "\n")
        self.stream.flush()


class Bar(Console):
    """A live bar with the last report beside it, at most 100 columns; messages scroll by above it."""

    def __init__(self, stream: TextIO, total_steps: int, start_step: int, width: int | None = None) -> None:
        self.total_steps = total_steps
        self._drawn = -math.inf
        self._metrics: Mapping[str, float] = {}
        terminal = rich.console.Console(file=cast(TextIO, _Unbreakable(stream)), width=width, highlight=False)
        self._progress = Progress(
            BarColumn(bar_width=14),
            TextColumn("{task.fields[text]}", markup=False),
            console=terminal,
            auto_refresh=False,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=start_step, text="starting")
        self._progress.start()

    def advance(self, step: int) -> None:
        if time.monotonic() - self._drawn >= _SECONDS_BETWEEN_REDRAWS:
            self._draw(step)

    def report(self, step: int, metrics: Mapping[str, float]) -> None:
        self._metrics = metrics
        self._draw(step)

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()

    def _draw(self, step: int) -> None:
        self._drawn = time.monotonic()
        text = bar_text(step, self.total_steps, self._metrics)
        self._progress.update(self._task, completed=step, text=text, refresh=True)


class _Unbreakable:
    """A stream that falls silent when nobody reads it any more: a reader that left must not end the run."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._broken = False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._broken:
            return
        try:
            action()
        except (OSError, ValueError):
            self._broken = True
            # What is left in the buffer would raise again when the interpreter flushes it at exit.
            with contextlib.suppress(OSError, ValueError):
                sink = os.open(os.devnull, os.O_WRONLY)
                os.dup2(sink, self._stream.fileno())
                os.close(sink)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def report_line(step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """Return ``step 120/5000  2.4%  loss 8.123  dino 5.1 …  112 img/s  data 3%  1.2 GiB  ETA 0:34:10``.

    What ``metrics`` lacks is left out.
    """
    share = 100 * step / total_steps if total_steps else 100.0
    parts = [f"step {step}/{total_steps}", f"{share:.1f}%", _total_loss(metrics)]
    losses = [name for name in metrics if name.startswith("loss/") and name != "loss/total"]
    parts.append(" ".join(f"{name[len('loss/') :]} {metrics[name]:.3g}" for name in losses))
    parts += _numbers(metrics, ("lr", "img_per_s", "data_wait", "memory", "eta"))
    return "  ".join(part for part in parts if part)


def bar_text(step: int, total_steps: int, metrics: Mapping[str, float]) -> str:
    """Return what stands beside the bar: step, loss, learning rate, speed, wait for data, ETA; up to 80 columns."""
    numbers = _numbers(metrics, ("lr", "img_per_s", "data_wait", "eta"))
    return "  ".join(part for part in (f"{step}/{total_steps}", _total_loss(metrics), *numbers) if part)


def format_seconds(seconds: float) -> str:
    """Return ``0:34:10`` or, from a day on, ``3d 04:05:06``; ``-:--:--`` where the time is unknown."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{days}d {hour:02}:{minute:02}:{second:02}" if days else f"{hour}:{minute:02}:{second:02}"


def _total_loss(metrics: Mapping[str, float]) -> str:
    loss = metrics.get("loss", metrics.get("loss/total"))
    return "" if loss is None else f"loss {loss:.3f}"


def _numbers(metrics: Mapping[str, float], names: Sequence[str]) -> list[str]:
    return [_FORMATS[name](metrics[name]) for name in names if name in metrics]


_FORMATS: dict[str, Callable[[float], str]] = {
    "lr": lambda x: f"lr {x:.1e}",
    "img_per_s": lambda x: f"{x:.0f} img/s" if x >= 10 else f"{x:.2g} img/s",
    "data_wait": lambda x: f"data {x:.0%}",
    "memory": lambda x: f"{x:.1f} GiB",
    "eta": lambda x: f"ETA {format_seconds(x)}",
}
