"""The lives of a run on a cluster: one per start of its job. What is written about each, and what follows from it.

Every start of the job takes the next number by creating a file that must not exist yet, so that no two starts share
one and a left-over of an earlier life can never pass for a later one. No torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FINISHED, INTERRUPTED, FAILED, MISTAKE = "finished", "interrupted", "failed", "mistake"
"""How a life ends: the run is done; a signal stopped it after it had saved; a fault; a mistake of the user."""

FOLDER = Path("slurm", "lives")
LIFE_FILE = "life.json"
"""Where the checkpoints' guard keeps the number of the newest life."""


@dataclass(frozen=True)
class Cause:
    """Why a life ended before the run did."""

    kind: str
    """mistake (of the user), preflight, exception, signal, exit (a code and no word), node, launch, slurm (time limit,
    preemption, requeue), lost (nobody could say)."""
    what: str
    rank: int | None = None
    node: str | None = None
    nodes: tuple[str, ...] = ()
    """Nodes that should not be used again."""
    told_by: int | None = None
    """The rank that said so."""

    def __str__(self) -> str:
        if self.rank is None or f"rank {self.rank}" in self.what:
            return self.what
        return f"rank {self.rank}{f' on {self.node}' if self.node else ''}: {self.what}"

    def same_as(self, other: Cause) -> bool:
        """Return whether two lives that reached the same step failed the same way.

        A node that is lost says nothing about the run, wherever it happens. A signal may hit any rank by chance, and
        a node that the pre-flight leaves out may be followed by another one.
        """
        if self.kind != other.kind or self.kind in ("node", "lost"):
            return False
        if self.kind == "signal" and self.rank != other.rank:
            return False
        if self.kind == "preflight" and set(self.nodes) != set(other.nodes):
            return False
        return _without_numbers(self.what) == _without_numbers(other.what)


def told(text: str, by: int | None, kind: str = "exception", nodes: Sequence[str] = ()) -> Cause:
    """Return the cause that a rank tells; the one that says so need not be the one that failed."""
    named = re.search(r"\brank\(?s?\)? (\d+)", text)
    what = " ".join(text.split())[:400]
    # What a pre-flight finds, every rank says.
    rank = int(named[1]) if named else None if kind == "preflight" else by
    return Cause(kind, what, rank, None, tuple(nodes), by)


def _without_numbers(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+|\d+", "#", text)


@dataclass
class Life:
    """One start of a run's job, and how it ended if that is known."""

    number: int
    job: str
    submission: str
    restarts: int
    nodes: list[str]
    started: float
    ports: list[int]
    outcome: str | None = None
    cause: Cause | None = None
    step: int = 0
    ended: float | None = None
    next: str | None = None
    limit: float | None = None
    """When SLURM will end it at the latest, if there is a time limit."""


class Lives:
    """The records of a run directory."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir, self.folder = run_dir, run_dir / FOLDER

    def begin(
        self,
        job: str,
        submission: str,
        restarts: int,
        nodes: Sequence[str],
        ports: list[int],
        limit: float | None = None,
    ) -> Life:
        """Take the next number and return the new life."""
        self.folder.mkdir(parents=True, exist_ok=True)
        # The run may have lived outside of jobs meanwhile.
        number = max(self.latest(), (_read(self.run_dir / LIFE_FILE) or {}).get("life", 0))
        while True:
            number += 1
            life = Life(number, job, submission, restarts, list(nodes), time.time(), ports, limit=limit)
            with contextlib.suppress(FileExistsError):
                file = os.open(self._file(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
                with os.fdopen(file, "w") as stream:
                    stream.write(json.dumps(_plain(life)))
                return life

    def end(self, life: Life) -> None:
        """Write down how a life ended; the first word counts."""
        if not self._file(life.number, "end").exists():
            _write(self._file(life.number, "end"), _plain(life))

    def all(self) -> list[Life]:
        """Return every life, oldest first."""
        found = []
        for number in sorted(self._numbers()):
            content = _read(self._file(number, "end")) or _read(self._file(number))
            if content is not None:
                cause = content.pop("cause", None)
                found.append(Life(**content, cause=_cause(cause)))
        return found

    def latest(self) -> int:
        """Return the number of the newest life, 0 before the first."""
        return max(self._numbers(), default=0)

    # -- what ranks say ----------------------------------------------------------------------------------------------

    def rank_failed(self, number: int, cause: Cause) -> None:
        """Write down why a rank failed."""
        _write(self._file(number, f"rank_{cause.told_by}"), {"time": time.time(), **asdict(cause)})

    def failures(self, number: int) -> list[Cause]:
        """Return what ranks said about why they failed, the first word first."""
        found = [content for file in self.folder.glob(f"{number:06d}.rank_*.json") if (content := _read(file))]
        return [cause for content in sorted(found, key=lambda c: c.pop("time")) if (cause := _cause(content))]

    def say(self, number: int, topic: str, content: dict[str, Any]) -> None:
        """Write down something about a life: ``outcome`` (rank 0) or ``preflight``."""
        _write(self._file(number, topic), content)

    def said(self, number: int, topic: str) -> dict[str, Any]:
        """Return what was said about a life, or an empty dictionary."""
        return _read(self._file(number, topic)) or {}

    def slow_nodes(self, number: int) -> dict[str, str]:
        """Return why, by node, for those that the pre-flight of a life found slow."""
        return dict(self.said(number, "preflight").get("slow", {}))

    def _numbers(self) -> list[int]:
        files = self.folder.glob("*.json") if self.folder.is_dir() else ()
        return [int(match[1]) for file in files if (match := re.fullmatch(r"(\d{6})\.json", file.name))]

    def _file(self, number: int, topic: str = "") -> Path:
        return self.folder / f"{number:06d}{'.' + topic if topic else ''}.json"


def _plain(life: Life) -> dict[str, Any]:
    return asdict(life)


def _cause(content: dict[str, Any] | None) -> Cause | None:
    return None if content is None else Cause(**{**content, "nodes": tuple(content.get("nodes", ()))})


def _write(file: Path, content: dict[str, Any]) -> None:
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content))
    partial.replace(file)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# What follows from the lives.


@dataclass(frozen=True)
class Decision:
    """Whether a run lives on, and why."""

    again: bool
    reason: str


def decide(lives: Sequence[Life], max_requeues: int, max_restarts: int) -> Decision:
    """Return what follows from the lives of one submission, the last of which has just ended."""
    last = lives[-1]
    if last.outcome == FINISHED:
        return Decision(False, "the run is finished")
    if last.outcome == MISTAKE:
        return Decision(False, "this is a mistake that a restart does not mend")
    if last.outcome == INTERRUPTED:
        requeues = sum(life.outcome == INTERRUPTED for life in lives)
        if requeues > max_requeues:
            return Decision(False, f"{requeues} interruptions are more than --max-requeues {max_requeues}")
        return Decision(True, f"interrupted after saving (requeue {requeues} of at most {max_requeues})")
    failed = [life for life in lives if life.outcome == FAILED]
    for life in failed[:-1]:
        if life.step == last.step and life.cause and last.cause and life.cause.same_as(last.cause):
            return Decision(False, f"it failed the same way before, in life {life.number}, at step {life.step}")
    if len(failed) > max_restarts:
        return Decision(False, f"{len(failed)} faults are more than --max-restarts {max_restarts}")
    return Decision(True, f"a fault (restart {len(failed)} of at most {max_restarts})")


_SRUN_TASK = re.compile(r"srun: error: (\S+): tasks? (\d+)(?:[-,\d]*): (.+)")
_SRUN_NODE = re.compile(
    r"Node failure on (\S+)|DUE TO NODE (\S+) FAILURE|error: (\S+): .*(?:Zero Bytes|Communication connection failure)",
    re.IGNORECASE,
)
_SRUN_OTHER = re.compile(r"srun: error: (?!Timed out)(.+)")
_ENDED_BY_SLURM = re.compile(r"CANCELLED AT \S+ DUE TO (PREEMPTION|JOB REQUEUE|TIME LIMIT)")
SIGNALLED = {"User defined signal 1", "User defined signal 2", "Terminated"}
"""srun's words for ranks that a request to stop ended before they could train."""


def cause_in_log(text: str) -> Cause | None:
    """Return the first thing that srun says went wrong in a life's part of the batch log."""
    first: Cause | None = None
    for line in text.splitlines():
        if found := _SRUN_NODE.search(line):
            node = next(name for name in found.groups() if name).strip(":,")
            lost = Cause("node", f"node {node} failed", node=node)
            # SLURM takes its time to notice; the ranks that have left meanwhile did so because of it.
            return lost if first is None or first.kind == "exit" else first
        if first is not None:
            continue
        if found := _SRUN_TASK.search(line):
            node, rank, what = found[1], int(found[2]), found[3].removesuffix(" (core dumped)")
            first = Cause("exit" if what.startswith("Exited with exit code") else "signal", what, rank, node)
        elif (found := _SRUN_OTHER.search(line)) and "lacks support for cpu binding" not in line:
            first = Cause("launch", found[1])
    return first


def judge(code: int, outcome: str | None, failures: Sequence[Cause], log: str) -> tuple[str, Cause | None]:
    """Return how a life ended and why, from what is left of it.

    Args:
        code: srun's exit code. outcome: rank 0's word. failures: the ranks' words, in order. log: the batch log.
    """
    said = cause_in_log(log)
    ended = _ENDED_BY_SLURM.search(log)
    if ended and outcome is None:
        reason = ended[1].lower()
        return INTERRUPTED, Cause("slurm", f"SLURM ended it ({reason}) before it had saved; its last save counts")
    # A rank that loses another one fails too: what a signal ended, or a mistake, is the cause of the rest.
    if said and said.kind in ("signal", "node") and said.what not in SIGNALLED:
        return FAILED, said
    for cause in failures:
        if cause.kind == "mistake":
            return MISTAKE, cause
    if outcome in (FINISHED, INTERRUPTED) and not (failures and code):
        return outcome, None
    if failures:
        return FAILED, failures[0]
    if said and said.what in SIGNALLED:
        return INTERRUPTED, said
    return FAILED, said or Cause("exit", f"srun ended with code {code} and nobody said why")
