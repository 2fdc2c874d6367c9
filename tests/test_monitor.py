"""Meters, clock and files of a run."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from monitored import CPU, lines, make

from dinov2_fsdp.monitor.clock import PHASES, Clock, Phases
from dinov2_fsdp.monitor.environment import write_environment
from dinov2_fsdp.monitor.logs import setup_logging
from dinov2_fsdp.monitor.meters import Meters
from dinov2_fsdp.monitor.monitor import Monitor
from dinov2_fsdp.monitor.sinks import JsonLines


class FakeTime:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


# ---------------------------------------------------------------------------------------------------------------------
# Meters


def test_a_flush_gives_means_over_the_steps_since_the_last_one(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    for step, loss in enumerate([9.0, 6.0, 3.0, 5.0, 1.0], start=1):
        monitor.record(step, {"loss": torch.tensor(loss, requires_grad=True), "lr": loss / 10})
        if step in (3, 5):
            monitor.flush(step)
    assert [line["loss"] for line in lines(tmp_path)] == [6.0, 3.0]
    assert [line["lr"] for line in lines(tmp_path)] == pytest.approx([0.6, 0.3])


def test_a_name_recorded_in_some_steps_is_averaged_over_those(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    monitor.record(1, {"loss": 1.0, "rare": torch.tensor(4.0)})
    monitor.record(2, {"loss": 3.0})
    assert monitor.flush(2)["rare"] == 4.0


def test_half_precision_values_are_summed_in_full_precision(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    for step in range(1, 1001):
        monitor.record(step, {"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert monitor.flush(1000)["loss"] == 1.0


def test_record_does_not_read_the_device(tmp_path: Path) -> None:
    class Unreadable(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = getattr(func, "__name__", "")
            assert name not in {"item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__format__"}, (
                name
            )
            return super().__torch_function__(func, types, args, kwargs or {})

    monitor = make(tmp_path)
    value = torch.tensor(2.0).as_subclass(Unreadable)
    with pytest.raises(AssertionError):
        float(value)
    for step in (1, 2, 3):
        with monitor.phase("student"):
            monitor.record(step, {"loss": value})
    monitor.meters._on_device = {name: t.as_subclass(torch.Tensor) for name, t in monitor.meters._on_device.items()}
    assert monitor.flush(3)["loss"] == 2.0


def test_a_recorded_tensor_may_be_reused_by_its_owner(tmp_path: Path) -> None:
    monitor, buffer = make(tmp_path), torch.zeros(())
    for step in (1, 2):
        buffer.fill_(step)
        monitor.record(step, {"loss": buffer})
    assert monitor.flush(2)["loss"] == 1.5
    assert buffer == 2


def test_a_tensor_that_is_no_scalar_is_named() -> None:
    with pytest.raises(ValueError, match=r"'loss' has shape \(3,\)"):
        Meters(CPU).add({"loss": torch.zeros(3)})


def test_names_that_the_monitor_uses_itself_are_refused(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    for name in ("step", "img_per_s", "time/data"):
        with pytest.raises(ValueError, match=f"'{name}'"):
            monitor.record(1, {name: 1.0})
        with pytest.raises(ValueError, match=f"'{name}'"):
            monitor.event(1, {name: 1.0})


def test_a_flush_without_steps_writes_nothing(tmp_path: Path) -> None:
    assert make(tmp_path).flush(0) == {}
    assert lines(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# metrics.jsonl and TensorBoard


def test_a_value_that_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    monitor = make(tmp_path)
    monitor.record(1, {"loss": torch.tensor(math.nan), "norm": math.inf, "lr": 0.5})
    monitor.flush(1)
    (line,) = lines(tmp_path)
    assert (line["loss"], line["norm"], line["lr"]) == (None, None, 0.5)
    assert {"loss", "norm"} <= set(line["nonfinite"])


def test_lines_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    first = make(tmp_path)
    for step in range(1, 7):
        first.record(step, {"loss": float(step)})
        first.flush(step)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "cut sho')
    second = make(tmp_path, start_step=4)
    second.event(4, {"eval/knn": 50.0})
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 4]
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl"]


def test_a_run_from_the_start_keeps_no_lines(tmp_path: Path) -> None:
    make(tmp_path).event(0, {"eval/knn": 1.0})
    make(tmp_path)
    assert lines(tmp_path) == []


def test_a_full_disk_costs_a_line_and_not_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.write({"step": 1})
    disk = sink._file

    class Full:
        def __getattr__(self, name: str) -> Any:
            return getattr(disk, name)

        def write(self, data: bytes) -> int:
            return disk.write(data[:5])

    sink._file = Full()  # type: ignore[assignment]
    sink.write({"step": 2})
    sink._file = disk
    sink.write({"step": 3})
    assert [line["step"] for line in lines(tmp_path)] == [1, 3]
    assert "is lost" in caplog.text


def test_an_event_is_on_disk_at_once(tmp_path: Path) -> None:
    monitor = make(tmp_path, epoch_steps=10)
    monitor.record(1, {"loss": 1.0})
    monitor.event(1, {"eval/knn_20": 63.1})
    (line,) = lines(tmp_path)
    assert (line["step"], line["images"], line["epoch"], line["eval/knn_20"]) == (1, 8, 0.1, 63.1)
    assert "loss" not in line


def test_only_rank_0_writes(tmp_path: Path) -> None:
    stream = io.StringIO()
    monitor = make(tmp_path, rank=1, console=True, tensorboard=True, stream=stream)
    monitor.record(1, {"loss": 1.0})
    monitor.event(1, {"eval/knn": 1.0})
    monitor.message("hello")
    monitor.close()
    assert os.listdir(tmp_path) == []
    assert stream.getvalue() == ""


def test_tensorboard_hides_what_came_after_the_resumed_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, stop, value in ((0, 5, 1.0), (3, 6, 2.0)):
        monitor = make(tmp_path, tensorboard=True, start_step=start)
        for step in range(start + 1, stop + 1):
            monitor.record(step, {"loss": value})
            monitor.flush(step)
        monitor.close()
        time.sleep(1.1 if start == 0 else 0)  # event files are ordered by their second
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


# ---------------------------------------------------------------------------------------------------------------------
# Clock and phases


def test_pauses_count_into_elapsed_time_and_not_into_speed(tmp_path: Path) -> None:
    now = FakeTime()
    monitor = make(tmp_path, now=now)
    for step in (1, 2):
        with monitor.phase("data"):
            now.seconds += 0.5
        with monitor.phase("student"):
            now.seconds += 1.5
        monitor.record(step, {"loss": 1.0})
    with monitor.phase("evaluation"):
        now.seconds += 60
    metrics = monitor.flush(2)
    assert metrics["img_per_s"] == pytest.approx(4.0)
    assert metrics["eta"] == pytest.approx(98 * 2)
    assert metrics["data_wait"] == pytest.approx(0.25)
    assert metrics["time/data"] == pytest.approx(0.5)
    assert metrics["time/student"] == pytest.approx(1.5)
    assert metrics["pause/evaluation"] == pytest.approx(60)
    assert metrics["core_hours"] == pytest.approx(64 * torch.get_num_threads() / 3600)
    assert lines(tmp_path)[0]["seconds"] == pytest.approx(64)


def test_the_eta_follows_the_speed_of_the_last_windows() -> None:
    now = FakeTime()
    clock = Clock(batch=1, units=1, now=now)
    assert math.isinf(clock.eta(10))
    for seconds in [10.0] + [1.0] * 30:
        now.seconds += seconds
        clock.step()
        clock.end_window()
    assert clock.eta(10) == pytest.approx(10, rel=0.01)
    assert clock.eta(-5) == 0


def test_an_unknown_phase_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'daat' is unknown; valid: data, colours, teacher"):
        make(tmp_path).phase("daat")


def test_phases_on_a_gpu_are_read_from_events_without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    stream_ms = 0.0
    waits = 0

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.time = stream_ms

        def query(self) -> bool:
            return True

        def synchronize(self) -> None:
            nonlocal waits
            waits += 1

        def elapsed_time(self, end: Event) -> float:
            return end.time - self.time

    monkeypatch.setattr(torch.cuda, "Event", Event)
    phases = Phases(Clock(batch=1, units=1), torch.device("cuda"))
    for _ in range(2000):
        with phases("student"):
            stream_ms += 3.0
    assert waits == 0
    assert len(phases.pending) <= 513
    assert dict(zip(phases.seconds, phases.totals(), strict=True))["student"] == pytest.approx(6.0)
    assert waits > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_are_timed_on_the_gpu_itself() -> None:
    device = torch.device("cuda")
    phases = Phases(Clock(batch=1, units=1), device)
    with phases("student"):
        torch.cuda._sleep(200_000_000)
    start = time.perf_counter()
    torch.cuda.synchronize(device)
    waited = time.perf_counter() - start
    assert phases.totals()[PHASES.index("student")] == pytest.approx(waited, rel=0.5)


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def _train(monitor: Monitor, now: FakeTime, steps: range, generator: torch.Generator) -> None:
    for step in steps:
        with monitor.phase("data"):
            now.seconds += 0.25 + 0.01 * step
        with monitor.phase("student"):
            now.seconds += 1
        values = torch.randn(2, generator=generator)
        monitor.record(step, {"loss": values[0], "lr": float(values[1])})


def test_a_resumed_run_flushes_what_the_undisturbed_run_does(tmp_path: Path) -> None:
    generator, now = torch.Generator().manual_seed(0), FakeTime()
    whole = make(tmp_path / "a", now=now)
    _train(whole, now, range(1, 5), generator)
    whole.flush(4)
    _train(whole, now, range(5, 8), generator)
    with whole.phase("checkpoint"):
        now.seconds += 7
        state = json.loads(json.dumps(whole.state_dict()))
    place = generator.get_state()
    _train(whole, now, range(8, 11), generator)
    expected = whole.flush(10)

    generator.set_state(place)
    resumed = make(tmp_path / "b", now=now, start_step=7)
    resumed.load_state_dict(state)
    _train(resumed, now, range(8, 11), generator)
    actual = resumed.flush(10)
    # The checkpoint was being written when its state was taken, so that life's pause is not in the next one's window.
    assert expected.pop("pause/checkpoint") == 7
    assert (actual["loss"], actual["lr"]) == (expected["loss"], expected["lr"])
    expected["memory"] = actual["memory"]
    assert actual == pytest.approx(expected)
    assert lines(tmp_path / "b")[-1]["images"] == 80
    assert lines(tmp_path / "b")[-1]["seconds"] == pytest.approx(lines(tmp_path / "a")[-1]["seconds"])


def test_a_state_from_before_phases_were_named_is_continued(tmp_path: Path) -> None:
    now = FakeTime()
    whole = make(tmp_path / "a", now=now)
    _train(whole, now, range(1, 3), torch.Generator().manual_seed(0))
    state = json.loads(json.dumps(whole.state_dict()))
    place = 3 * len(state["names"]) + state.pop("phases").index("colours")
    assert [row.pop(place) for row in state["rows"]] == [0.0]
    resumed = make(tmp_path / "b", now=now, start_step=2)
    resumed.load_state_dict(state)
    found = resumed.flush(2)
    assert (found["time/data"], found["time/student"]) == pytest.approx((0.265, 1.0))


def test_the_state_of_two_ranks_continues_on_one(tmp_path: Path) -> None:
    state: dict[str, Any] = {}
    rows = []
    for loss in (2.0, 6.0):
        rank = make(tmp_path)
        rank.record(1, {"loss": torch.tensor(loss), "lr": 0.1})
        state = rank.state_dict()
        rows += state["rows"]
    resumed = make(tmp_path, start_step=1)
    resumed.load_state_dict({**state, "rows": rows})
    resumed.record(2, {"loss": torch.tensor(1.0), "lr": 0.4})
    metrics = resumed.flush(2)
    assert metrics["loss"] == (2.0 + 6.0 + 1.0) / 3
    assert metrics["lr"] == pytest.approx((0.1 + 0.1 + 0.4) / 3)


# ---------------------------------------------------------------------------------------------------------------------
# Ranks


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    now = FakeTime()
    monitor = make(Path(folder) / "run", rank=rank, world_size=2, now=now)
    for step in (1, 2):
        with monitor.phase("data"):
            now.seconds += 3.0 * rank
        now.seconds += 10.0 - 3.0 * rank
        values: dict[str, torch.Tensor | float] = {"lr": 0.5} if rank else {}
        values |= {"loss": torch.tensor(float(step + 10 * rank)), "lr": 0.5}  # the ranks' orders differ
        monitor.record(step, values)
        if step == 1:
            state = monitor.state_dict()
            monitor.load_state_dict(state)
    metrics = monitor.flush(2)
    monitor.close()
    (Path(folder) / f"rank_{rank}.json").write_text(json.dumps(metrics))
    dist.destroy_process_group()


@pytest.mark.distributed
def test_ranks_are_averaged_and_the_slowest_one_shows(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1))
    assert first["loss"] == (1 + 2 + 11 + 12) / 4
    assert first["lr"] == 0.5
    assert first["data_wait"] == pytest.approx(0.3)
    assert first["time/data"] == pytest.approx(1.5)
    assert first["img_per_s"] == pytest.approx(0.8)
    assert {**second, "eta": 0, "core_hours": 0} == pytest.approx({**first, "eta": 0, "core_hours": 0})
    (line,) = lines(tmp_path / "run")
    assert line["loss"] == first["loss"]


# ---------------------------------------------------------------------------------------------------------------------
# Logs and environment


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.usefixtures("untouched_logging")
def test_every_rank_logs_to_its_file_and_warns_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):  # a second call must not write everything twice
        setup_logging(tmp_path, rank=3)
    logging.getLogger("a").info("quiet")
    logging.getLogger("a").warning("loud")
    text = (tmp_path / "logs" / "rank_3.log").read_text()
    assert text.count("quiet") == text.count("loud") == 1
    assert capsys.readouterr().err == "[rank 3] WARNING a: loud\n"
    setup_logging(tmp_path, rank=3)
    assert (tmp_path / "logs" / "rank_3.log").read_text() == text


def test_the_environment_names_versions_host_and_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["python", "launchers/local.py", "data.train=folder:/my images"])
    write_environment(tmp_path, world_size=4, device="cpu", extra={"attention": "sdpa"})
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment["torch"] == torch.__version__
    assert environment["world_size"] == 4
    assert environment["attention"] == "sdpa"
    assert environment["cores"] >= 1
    assert environment["cpu"]
    assert environment["hostname"]
    assert environment["command"] == "python launchers/local.py 'data.train=folder:/my images'"


def test_the_environment_is_written_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert write_environment(tmp_path, 1, "cpu")["commit"] is None
