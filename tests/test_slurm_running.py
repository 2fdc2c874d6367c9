"""Jobs that run: when they stop, the ports they take, how they are submitted anew and followed."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from submitting import Stub

from launchers.cluster import batch, controller, progress
from launchers.cluster.allocation import Allocation
from launchers.cluster.batch import free_ports
from launchers.cluster.follow import Followed, look
from launchers.cluster.lives import Life, Lives
from launchers.cluster.rank import stop_in_time
from launchers.cluster.submission import record_job


def write_metrics(run: Path, **values: Any) -> None:
    run.mkdir(parents=True, exist_ok=True)
    line = {
        "step": 10,
        "images": 80,
        "img_per_s": 0.5,
        "checkpoint/writing_s": 40.0,
        "checkpoint/stall_s": 1.0,
        **values,
    }
    (run / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 11, "ima')


def test_the_signal_comes_before_a_step_and_a_save_as_measured(tmp_path: Path) -> None:
    assert progress.signal_seconds(tmp_path, 8, None, default=300) == 300
    assert progress.signal_seconds(tmp_path, 8, 10, default=300) == 150  # a quarter of ten minutes
    write_metrics(tmp_path)
    # A step of 8 images takes 16 s, a save 41 s; SLURM may be a minute off.
    assert progress.signal_seconds(tmp_path, 8, None, default=300) == 2 * (16 + 41) + 60


@pytest.mark.parametrize(("left", "stopped"), [(150.0, True), (900.0, False)])
def test_a_life_stops_as_early_as_its_own_times_ask_for(tmp_path: Path, left: float, stopped: bool) -> None:
    """SLURM's signal was settled before anything had been measured."""
    write_metrics(tmp_path)  # 174 s
    now, ended, calls = time.time(), threading.Event(), []

    class Ended(threading.Event):
        looks = 0

        def wait(self, timeout: float | None = None) -> bool:
            self.looks += 1
            return self.looks > 3

    life = Life(1, "1", "/s", 0, ["n"], now - 3000, [1, 2], limit=now + left)
    stop_in_time(tmp_path, 8, life, lambda: calls.append(1), Ended(), every=0)
    stop_in_time(tmp_path, 8, dataclasses.replace(life, limit=None), lambda: calls.append(2), ended)
    assert calls == ([1] if stopped else [])


@pytest.mark.parametrize(
    ("said", "seconds"), [("59:58", 3598), ("1-02:00:01", 93601), ("UNLIMITED", None), ("INVALID", None)]
)
def test_what_is_left_of_a_job_is_what_slurm_says(stub: Stub, said: str, seconds: float | None) -> None:
    stub(squeue=f"echo {said}")
    assert controller.seconds_left("7") == seconds


def test_a_cut_off_line_of_metrics_is_left_out(tmp_path: Path) -> None:
    write_metrics(tmp_path)
    assert progress.last_step(tmp_path) == 10


def test_jobs_that_start_together_on_a_node_take_different_ports() -> None:
    taken = [port for job in range(1000, 1100) for port in free_ports(str(job), 0)]
    assert len(set(taken)) == len(taken)
    assert set(free_ports("1000", 1)).isdisjoint(free_ports("1000", 0))


def test_a_port_in_use_is_passed_over() -> None:
    import socket

    first = free_ports("123", 0)
    with socket.socket() as taken:
        taken.bind(("", first[0]))
        taken.listen()
        assert first[0] not in free_ports("123", 0)


def test_a_job_that_is_submitted_anew_can_be_submitted_anew_once_more(stub: Stub, tmp_path: Path) -> None:
    """The script bears the number of the first job only."""
    folder = stub()
    (tmp_path / "5_submission.sh").write_text("#!/bin/bash\n# this script\n")
    second = Allocation("6", "6", 0, 0, ("n1",), 1)
    assert batch._start_again(tmp_path, second, tmp_path / "run", ())
    assert "# this script" in (folder / "script").read_text()
    member = Allocation("6_2", "8", 0, 2, ("n1",), 1)
    assert batch._start_again(tmp_path, member, tmp_path / "run", ())
    assert sorted(path.name for path in (tmp_path / "run" / "slurm" / "jobs").iterdir()) == ["77", "77_2"]


def test_following_goes_on_with_the_job_that_was_submitted_anew(tmp_path: Path) -> None:
    said: list[str] = []
    record_job(tmp_path, "5")
    one = Followed("run", tmp_path, "5")
    look(one, ("RUNNING", "None"), said.append, "")
    record_job(tmp_path, "77")
    os.utime(tmp_path / "slurm" / "jobs" / "5", (1, 1))
    look(one, ("COMPLETED", "None"), said.append, "")
    assert (one.job, one.over) == ("77", False)
    assert said[-1] == "job 5 is over and goes on as job 77"
    look(one, ("COMPLETED", "None"), said.append, "")
    assert one.over


def test_following_names_nodes_that_the_pre_flight_found_slow(tmp_path: Path) -> None:
    lives, said = Lives(tmp_path), list[str]()
    life = lives.begin("5", "/s", 0, ["n1", "n2"], [1, 2])
    lives.say(life.number, "preflight", {"slow": {"n2": "compute takes 9 ms"}})
    one = Followed("run", tmp_path, "5")
    for _ in range(2):
        look(one, ("RUNNING", "None"), said.append, "")
    assert said[1:] == ["the pre-flight found n2 slow: compute takes 9 ms"]
