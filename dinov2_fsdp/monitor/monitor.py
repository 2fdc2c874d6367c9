"""One object that the training loop talks to: it gathers metrics and times, and rank 0 writes them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist

from dinov2_fsdp.monitor.clock import PAUSES, PHASES, Clock, Phases
from dinov2_fsdp.monitor.console import open_console
from dinov2_fsdp.monitor.environment import memory_gib
from dinov2_fsdp.monitor.meters import Meters, Value
from dinov2_fsdp.monitor.sinks import JsonLines, TensorBoard

_OWN = ("step", "images", "epoch", "seconds", "time", "nonfinite")
_FIRST_PHASES = ("data", "teacher", "student", "backward", "optimizer", "ema", "evaluation", "checkpoint")
"""Those of checkpoints that do not name them."""
_OWN_METRICS = ("img_per_s", "eta", "data_wait", "memory", "gpu_hours", "core_hours")
_OWN_PREFIXES = ("time/", "pause/")


class Monitor:
    """Metrics, clock and output of a run.

    Steps are counted as done: step 1 is the first one. ``record`` and ``phase`` never wait for the device. ``flush``
    and ``state_dict`` are collective: every rank calls them at the same step, having recorded the same names.

    Args:
        run_dir: holds ``metrics.jsonl`` and the TensorBoard events.
        rank: this process; rank 0 writes.
        world_size: processes; with more than one, the default process group must be able to gather on ``device``.
        total_steps: steps of the whole run.
        batch: images per step over all ranks.
        device: where the recorded tensors live.
        every: steps between two flushes, as far as they are regular.
        tensorboard: write TensorBoard events too.
        start_step: steps that earlier lives have done; what they wrote after it is dropped.
        console: whether rank 0 prints.
        epoch_steps: steps of an epoch; if given, lines say the epoch.
        stream: where rank 0 prints, by default stdout.
        now: source of time, seconds.
        on_phase: told the name of every phase that begins.
    """

    def __init__(
        self,
        run_dir: str | Path,
        rank: int,
        world_size: int,
        total_steps: int,
        batch: int,
        device: torch.device | str,
        every: int = 1,
        tensorboard: bool = True,
        start_step: int = 0,
        console: bool = True,
        epoch_steps: int | None = None,
        stream: TextIO | None = None,
        now: Callable[[], float] = time.perf_counter,
        on_phase: Callable[[str], None] = lambda name: None,
    ) -> None:
        self._on_phase = on_phase
        self.rank, self.world_size, self.total_steps = rank, world_size, total_steps
        self.device = torch.device(device)
        self.epoch_steps = epoch_steps
        self._on_gpu = self.device.type == "cuda"
        self._step = start_step
        self._names: set[str] = set()
        units = world_size * (1 if self._on_gpu else torch.get_num_threads())
        self.clock = Clock(batch, units, every, start_step, now)
        self.phase_times = Phases(self.clock, self.device)
        self.meters = Meters(self.device)
        writes = rank == 0
        self._jsonl = JsonLines(Path(run_dir) / "metrics.jsonl", start_step) if writes else None
        self._tensorboard = TensorBoard(Path(run_dir), start_step) if writes and tensorboard else None
        self._console = open_console(writes and console, total_steps, start_step, stream)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Return a context manager that adds its time to phase ``name``, one of PHASES or PAUSES of the clock.

        Raises:
            ValueError: the phase is unknown.
        """
        timed = self.phase_times(name)
        self._on_phase(name)
        return timed

    def record(self, step: int, values: Mapping[str, Value]) -> None:
        """Add the values of one step, 0-d tensors or numbers, to the means of the next flush.

        Several calls with the same step count as one step.

        Raises:
            ValueError: a tensor is not 0-d, or a name is one of the monitor's own.
        """
        if not values.keys() <= self._names:
            self._check_names(values)
            self._names |= values.keys()
        self.meters.add(values)
        if step != self._step:
            self._step = step
            self.clock.step()
            self._console.advance(step)

    def flush(self, step: int) -> dict[str, float]:
        """Write the means over the steps since the last flush and over ranks; return them on every rank.

        The wait for data and the memory are those of the rank where they are largest.
        """
        names = self.meters.names()
        if not self.clock.steps:
            return {}
        steps, seconds = self.clock.steps, self.clock.window
        rows = self._gather()
        metrics = _means(names, rows)
        phases = dict(zip((*PHASES, *PAUSES), rows[:, 3 * len(names) : -2].mean(axis=0).tolist(), strict=True))
        data_wait, memory = rows[:, -2:].max(axis=0).tolist()

        self.clock.end_window()
        self.meters.reset()
        self.phase_times.reset()
        metrics["img_per_s"] = steps * self.clock.batch / seconds if seconds > 0 else 0.0
        metrics["data_wait"] = data_wait
        metrics["memory"] = memory
        metrics["eta"] = self.clock.eta(self.total_steps - step)
        metrics["gpu_hours" if self._on_gpu else "core_hours"] = self.clock.unit_hours
        metrics |= {f"time/{name}": phases[name] / steps for name in PHASES if phases[name] > 0}
        metrics |= {f"pause/{name}": phases[name] for name in PAUSES if phases[name] > 0}
        self._write(step, metrics)
        self._console.report(step, metrics)
        return metrics

    def event(self, step: int, values: Mapping[str, float], quiet: bool = False) -> None:
        """Write results that come outside the regular flushes, at once. Not collective: other ranks do nothing.

        ``quiet`` keeps them off the console.

        Raises:
            ValueError: a name is one of the monitor's own.
        """
        self._check_names(values)
        numbers = {name: float(value) for name, value in values.items()}
        self._write(step, numbers)
        if not quiet:
            self._console.message(
                "  ".join([f"step {step}", *(f"{name} {value:.4g}" for name, value in numbers.items())])
            )

    def message(self, text: str) -> None:
        """Show one line on rank 0's console."""
        self._console.message(text)

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers that let another life continue the clock and the means, on any number of ranks."""
        return {
            "step": self._step,
            "clock": self.clock.state_dict(),
            "names": self.meters.names(),
            "phases": list(self.phase_times.seconds),
            "rows": self._gather().tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken.

        On as many ranks as then, each rank takes up its own sums; otherwise rank 0 takes up those of all.
        """
        names, rows = state["names"], np.array(state["rows"], dtype=np.float64)
        split = 3 * len(names)
        if len(rows) == self.world_size:
            totals, phases = rows[self.rank, :split], rows[self.rank, split:-2]
        else:
            totals = rows[:, :split].sum(axis=0) if self.rank == 0 else np.zeros(split)
            phases = rows[:, split:-2].mean(axis=0)
        self._step = state["step"]
        self.meters.load(names, torch.from_numpy(totals).view(3, len(names)))
        self.phase_times.load(dict(zip(state.get("phases", _FIRST_PHASES), phases.tolist(), strict=True)))
        self.clock.load_state_dict(state["clock"])

    def close(self) -> None:
        """Leave the terminal as it was and close the files; a second call does nothing."""
        self._console.close()
        for sink in (self._jsonl, self._tensorboard):
            if sink is not None:
                sink.close()
        self._jsonl = self._tensorboard = None

    def _gather(self) -> np.ndarray:
        """Return a row per rank: sums, counts, seconds of the phases, share of the window spent on data, memory.

        One gather serves means and maxima alike. Reading it is the only wait for the device.
        """
        phases = self.phase_times.totals()
        window = self.clock.window
        wait = min(1.0, phases[PHASES.index("data")] / window) if window > 0 else 0.0
        own = torch.tensor([*phases, wait, memory_gib(self.device)], dtype=torch.float64).to(self.device)
        row = torch.cat([self.meters.totals().flatten(), own])
        if self.world_size > 1:
            rows = [torch.empty_like(row) for _ in range(self.world_size)]
            dist.all_gather(rows, row)
            row = torch.cat(rows)
        return row.view(self.world_size, -1).cpu().numpy()

    def _write(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._jsonl is not None:
            head: dict[str, Any] = {"step": step, "images": step * self.clock.batch}
            if self.epoch_steps:
                head["epoch"] = round(step / self.epoch_steps, 4)
            head["seconds"] = round(self.clock.elapsed, 3)
            head["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
            self._jsonl.write({**head, **metrics})
        if self._tensorboard is not None:
            self._tensorboard.write(step, metrics)

    @staticmethod
    def _check_names(names: Iterable[str]) -> None:
        for name in names:
            if name in _OWN or name in _OWN_METRICS or name.startswith(_OWN_PREFIXES):
                raise ValueError(f"metric '{name}' has a name that the monitor uses itself; call it something else")


def _means(names: list[str], rows: np.ndarray) -> dict[str, float]:
    on_device, on_host, counts = rows[:, : 3 * len(names)].sum(axis=0).reshape(3, -1)
    return dict(zip(names, ((on_device + on_host) / counts).tolist(), strict=True))
