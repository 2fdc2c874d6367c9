"""Time of a run over all its lives, and how a step's time is split between its phases."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

PHASES = ("data", "colours", "teacher", "student", "backward", "optimizer", "ema")
"""Parts of a step; their time counts into the speed."""
PAUSES = ("evaluation", "checkpoint")
"""Interruptions between steps; their time counts into the elapsed time, not into the speed."""

_SMOOTHING = 0.3
_MOST_PENDING = 512


class Clock:
    """Seconds, steps and images of a run. All times in seconds.

    Args:
        batch: images per step over all ranks.
        units: processing units that are busy on the run's behalf (GPUs, or CPU cores) over all ranks.
        every: steps of a full window; a shorter one says less about the speed.
        start_step: steps done by the lives before.
        now: source of time.
    """

    def __init__(
        self, batch: int, units: int, every: int = 1, start_step: int = 0, now: Callable[[], float] = time.perf_counter
    ) -> None:
        self.batch, self.units, self.every, self.now = batch, units, every, now
        self.images = batch * start_step
        self.steps = 0
        self.seconds_per_step: float | None = None
        self._born = self._window_start = now()
        self._earlier = self._earlier_units = 0.0
        self._paused = 0.0
        self._paused_at: float | None = None

    @property
    def elapsed(self) -> float:
        """Seconds over all lives, pauses included."""
        return self._earlier + self.now() - self._born

    @property
    def unit_hours(self) -> float:
        """GPU-hours or core-hours over all lives."""
        return (self._earlier_units + (self.now() - self._born) * self.units) / 3600

    @property
    def window(self) -> float:
        """Seconds since the last window ended, without pauses."""
        end = self.now() if self._paused_at is None else self._paused_at
        return end - self._window_start - self._paused

    def step(self) -> None:
        """Count one step."""
        self.steps += 1
        self.images += self.batch

    def pause(self) -> None:
        """Stop the window's time."""
        self._paused_at = self.now()

    def unpause(self) -> float:
        """Let the window's time go on; return the seconds that the pause took."""
        assert self._paused_at is not None
        seconds = self.now() - self._paused_at
        self._paused += seconds
        self._paused_at = None
        return seconds

    def end_window(self) -> None:
        """Take the window into the mean speed and start the next one."""
        if self.steps:
            speed = self.window / self.steps
            weight = _SMOOTHING * min(1.0, self.steps / self.every)
            before = speed if self.seconds_per_step is None else self.seconds_per_step
            self.seconds_per_step = before + weight * (speed - before)
        self._window_start, self._paused, self.steps = self.now(), 0.0, 0

    def eta(self, steps_left: int) -> float:
        """Return the seconds that ``steps_left`` steps will take without pauses; infinite before the first window."""
        return math.inf if self.seconds_per_step is None else max(0, steps_left) * self.seconds_per_step

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers that let another life continue this clock."""
        return {
            "elapsed": self.elapsed,
            "unit_seconds": self.unit_hours * 3600,
            "images": self.images,
            "window": self.window,
            "steps": self.steps,
            "seconds_per_step": self.seconds_per_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the clock of an earlier life; the time since this clock was made counts as elapsed."""
        self._earlier, self._earlier_units = state["elapsed"], state["unit_seconds"]
        self.images, self.steps = state["images"], state["steps"]
        self.seconds_per_step = state["seconds_per_step"]
        self._window_start, self._paused = self.now() - state["window"], 0.0


class Phases:
    """Seconds spent in each phase since the last reset.

    On a GPU a phase lies between two events on the current stream: the host runs ahead, so its own time would say
    nothing about kernels, and waiting for data matters only as far as the stream runs dry. Events are read when they
    are past, so that entering and leaving a phase never waits.
    """

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock = clock
        self.asynchronous = device.type == "cuda"
        self.device = device
        self.seconds = dict.fromkeys((*PHASES, *PAUSES), 0.0)
        self.pending: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._free: list[torch.cuda.Event] = []
        stopwatch = _StreamStopwatch if self.asynchronous else _Stopwatch
        self._stopwatches: dict[str, AbstractContextManager[None]] = {name: stopwatch(self, name) for name in PHASES}
        self._stopwatches |= {name: _Pause(self, name) for name in PAUSES}

    def __call__(self, name: str) -> AbstractContextManager[None]:
        """Return the context manager that times one phase; phases do not nest within themselves.

        Raises:
            ValueError: the phase is unknown (ranks must agree on all names before they exchange their times).
        """
        if name not in self._stopwatches:
            raise ValueError(f"phase '{name}' is unknown; valid: {', '.join(self._stopwatches)}")
        return self._stopwatches[name]

    def event(self) -> torch.cuda.Event:
        """Return an event just recorded on the current stream."""
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def collect(self, wait: bool) -> None:
        """Add up the phases that the device has finished; all phases, if ``wait``."""
        while self.pending:
            name, start, end = self.pending[0]
            if wait:
                end.synchronize()
            elif not end.query():
                return
            self.pending.popleft()
            self.seconds[name] += start.elapsed_time(end) / 1000
            self._free += (start, end)

    def totals(self) -> list[float]:
        """Return seconds in the order of PHASES, then PAUSES; waits for the device to end the phases."""
        self.collect(wait=True)
        return list(self.seconds.values())

    def load(self, totals: Mapping[str, float]) -> None:
        """Replace the content by these seconds; phases without any have had none."""
        self.collect(wait=True)
        self.seconds = {name: totals.get(name, 0.0) for name in self.seconds}

    def reset(self) -> None:
        """Forget everything."""
        self.load({})


class _Stopwatch(AbstractContextManager[None]):
    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name
        self.start = 0.0

    def __enter__(self) -> None:
        self.start = self.phases.clock.now()

    def __exit__(self, *error: object) -> None:
        self.phases.seconds[self.name] += self.phases.clock.now() - self.start


class _StreamStopwatch(AbstractContextManager[None]):
    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name

    def __enter__(self) -> None:
        self.start = self.phases.event()

    def __exit__(self, *error: object) -> None:
        pending = self.phases.pending
        pending.append((self.name, self.start, self.phases.event()))
        if len(pending) > _MOST_PENDING:
            self.phases.collect(wait=False)


class _Pause(AbstractContextManager[None]):
    def __init__(self, phases: Phases, name: str) -> None:
        self.phases, self.name = phases, name

    def __enter__(self) -> None:
        if self.phases.asynchronous:
            torch.cuda.synchronize(self.phases.device)  # the steps in flight are the window's, not the pause's
        self.phases.clock.pause()

    def __exit__(self, *error: object) -> None:
        self.phases.seconds[self.name] += self.phases.clock.unpause()
