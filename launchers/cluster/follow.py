"""Watching jobs from the login node: what state they are in, and how far the run is. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinov2_fsdp.errors import UserError
from launchers.cluster.controller import ACTIVE, states
from launchers.cluster.lives import FINISHED, Life, Lives
from launchers.cluster.progress import last_lines
from launchers.cluster.submission import recorded_jobs

SECONDS = 5.0
_FORGOTTEN = 3
"""Answers in a row without a job after which it counts as gone: clusters forget ended jobs within minutes."""


@dataclass
class Followed:
    """A run and its job, as last shown."""

    name: str
    run_dir: Path
    job: str
    state: str = ""
    step: int = -1
    missing: int = 0
    life: int = 0
    """Whose slow nodes have been shown."""
    over: bool = False
    finished: bool = False


def follow(
    members: Sequence[tuple[str, Path, str]], show: Callable[[str], None] = print, seconds: float = SECONDS
) -> int:
    """Show the state and progress of (name, run directory, job) until all are over; return 0 if all have finished."""
    followed = [Followed(*member) for member in members]
    several = len(followed) > 1
    while not all(one.over for one in followed):
        try:
            known = states([one.job for one in followed if not one.over])
        except UserError as error:
            show(f"{error}; trying again")
            time.sleep(seconds)
            continue
        for one in followed:
            if not one.over:
                look(one, known.get(one.job), show, f"{one.name}: " if several else "")
        if not all(one.over for one in followed):
            time.sleep(seconds)
    return 0 if all(one.finished for one in followed) else 1


def look(one: Followed, known: tuple[str, str] | None, show: Callable[[str], None], prefix: str) -> None:
    """Show what is new about a run."""
    from dinov2_fsdp.monitor.console import report_line

    life = newest_life(one.run_dir)
    state, reason = known or ("", "")
    one.missing = 0 if known else one.missing + 1
    nodes = (
        f" on {len(life.nodes)} node(s), life {life.number}"
        if life and state == "RUNNING" and life.outcome is None
        else ""
    )
    shown = f"job {one.job} {state.lower()}{nodes}" + (f" ({reason})" if reason not in ("", "None") else "")
    if known and shown != one.state:
        show(prefix + shown)
        one.state = shown
    slow = Lives(one.run_dir).slow_nodes(life.number) if life and life.number != one.life else {}
    if life and slow:
        for node, why in slow.items():
            show(f"{prefix}the pre-flight found {node} slow: {why}")
        one.life = life.number
    lines = [line for line in last_lines(one.run_dir) if "img_per_s" in line][-1:]
    if lines and lines[0]["step"] != one.step:
        one.step = lines[0]["step"]
        total = total_steps(one.run_dir)
        show(prefix + (report_line(one.step, total, lines[0]) if total else f"step {one.step}"))
    if (known and state not in ACTIVE) or one.missing >= _FORGOTTEN:
        newest = recorded_jobs(one.run_dir)[-1:]
        if newest and newest[0] != one.job:
            # Where the cluster does not let a job requeue itself, it submits another one.
            show(f"{prefix}job {one.job} is over and goes on as job {newest[0]}")
            one.job, one.missing = newest[0], 0
            return
        one.over = True
        life = newest_life(one.run_dir)
        one.finished = life is not None and life.outcome == FINISHED
        show(prefix + (summary(life) if life else f"job {one.job} is over and never started a rank"))


def total_steps(run_dir: Path) -> int:
    """Return the length of a run, as its ranks have said; 0 before that."""
    lives = Lives(run_dir)
    return int(lives.said(lives.latest(), "plan").get("steps", 0))


def newest_life(run_dir: Path) -> Life | None:
    lives = Lives(run_dir).all()
    return lives[-1] if lives else None


def summary(life: Life) -> str:
    """Return how a run's last life ended."""
    why = f": {life.cause}" if life.cause else ""
    return f"life {life.number}: {life.outcome or 'ended without a word'} at step {life.step}{why}"
