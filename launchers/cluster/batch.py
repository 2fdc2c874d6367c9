"""What a job's batch script does around srun: begin a life, and at its end decide what becomes of the run.

    python -m launchers.cluster.batch meet FOLDER         prints where the ranks meet, for the shell
    python -m launchers.cluster.batch begin FOLDER        the same, and begins a life of a training run
    python -m launchers.cluster.batch end FOLDER CODE     CODE: srun's

SLURM's own ways to end a life (time limit, preemption, `scontrol requeue`, a lost node) and the run's faults all
come by here, so that one place counts them and knows their limits. No torch.
"""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from dinov2_fsdp.errors import EXIT_FAILED, EXIT_USER_ERROR, UserError
from dinov2_fsdp.parallel.place import LIFE
from launchers.cluster.allocation import Allocation, allocation_from_environment, node_name
from launchers.cluster.controller import PATIENCE, seconds_left, silent_nodes, state_of
from launchers.cluster.lives import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    MISTAKE,
    Cause,
    Decision,
    Life,
    Lives,
    decide,
    judge,
    told,
)
from launchers.cluster.progress import last_step, saved_steps
from launchers.cluster.submission import Member, Submission, record_job

CONTROLLER_RETRIES = 15
"""Times that a controller which does not answer is asked again, some 20 s apart, before a run is given up."""
Answer = TypeVar("Answer")
_PORTS = range(20000, 32000)
"""Below those that Linux hands out by itself."""


def main() -> int:
    verb, folder = sys.argv[1], Path(sys.argv[2])
    allocation = allocation_from_environment()
    if verb == "meet":
        _print_settings(allocation, free_ports(allocation.number, allocation.restarts), {})
        return 0
    submission = Submission.read(folder)
    member = submission.members[allocation.member]
    if verb == "begin":
        return begin(folder, submission, member, allocation)
    return end(folder, submission, member, allocation, int(sys.argv[3]))


def begin(folder: Path, submission: Submission, member: Member, allocation: Allocation) -> int:
    """Start a life: print what its ranks need as shell code, or why there may be none."""
    lives = Lives(Path(member.run_dir))
    _settle_lost(lives, folder, member, allocation)
    earlier = _of(lives, folder)
    if earlier:
        decision = decide(earlier, submission.max_requeues, submission.max_restarts)
        if not decision.again and earlier[-1].outcome != FINISHED:
            _say(f"{member.name} is not started again: {decision.reason}")
            return EXIT_FAILED
    _bring_pickle(folder, allocation)
    ports = free_ports(allocation.number, len(lives.all()))
    left = seconds_left(allocation.number)
    limit = None if left is None else time.time() + left
    life = lives.begin(allocation.job, str(folder), allocation.restarts, allocation.nodes, ports, limit)
    _say(_headline(life, member))
    _print_settings(allocation, ports, {LIFE: str(life.number)})
    return 0


def _print_settings(allocation: Allocation, ports: list[int], more: dict[str, str]) -> None:
    settings = {"MASTER_ADDR": allocation.nodes[0], "MASTER_PORT": str(ports[0]), **more}
    print("\n".join(f"export {name}={shlex.quote(value)}" for name, value in settings.items()))


def _headline(life: Life, member: Member) -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(life.started))
    nodes = ", ".join(life.nodes[:4]) + (f" and {len(life.nodes) - 4} more" if len(life.nodes) > 4 else "")
    step = max(saved_steps(Path(member.run_dir)), default=0)
    return f"=== life {life.number} of {member.name}, job {life.job}, {now}, on {nodes}, from step {step}"


def _settle_lost(lives: Lives, folder: Path, member: Member, allocation: Allocation) -> None:
    """End the lives of which nobody could say the end: their batch script went away with its node."""
    for life in _of(lives, folder):
        if life.outcome is None:
            said = lives.said(life.number, "outcome").get("outcome")
            life.outcome = said or FAILED
            life.cause = (
                None if said else Cause("lost", f"its first node, {life.nodes[0]}, or its batch script was lost")
            )
            life.step, life.ended, life.next = (
                last_step(Path(member.run_dir)),
                time.time(),
                "SLURM started the job again",
            )
            lives.end(life)
            _say(f"life {life.number} ended without a word: {life.cause or life.outcome}")


def _of(lives: Lives, folder: Path) -> list[Life]:
    return [life for life in lives.all() if life.submission == str(folder)]


def _bring_pickle(folder: Path, allocation: Allocation) -> None:
    """Give submitit what it looks for under this job's number, and take away what an earlier life left there."""
    for old in folder.glob(f"{allocation.job}_*_result.pkl*"):
        old.unlink(missing_ok=True)
    wanted = folder / f"{allocation.job}_submitted.pkl"
    # It is moved into place only after sbatch has returned, which may be after the job has started.
    suffix = f"_{allocation.member}_submitted.pkl" if "_" in allocation.job else "_submitted.pkl"
    others = [path for path in folder.glob(f"*{suffix}") if path != wanted]
    if not wanted.exists() and others:
        shutil.copyfile(others[0], wanted)


def free_ports(job: str, life: int, count: int = 2) -> list[int]:
    """Return ports of this node that nobody listens at, other ones for every job and life.

    Jobs that start together on a node would both find the same port free, so each begins to look elsewhere.
    """
    start = (int(job) * 64 + life * 4) % len(_PORTS)
    found: list[int] = []
    for offset in range(len(_PORTS)):
        port = _PORTS[(start + offset) % len(_PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise RuntimeError(f"no free port between {_PORTS[0]} and {_PORTS[-1]} on {node_name()}")


def end(folder: Path, submission: Submission, member: Member, allocation: Allocation, code: int) -> int:
    """End a life and decide: done, again (requeued here, unless SLURM does it by itself), or stopped."""
    lives, run_dir = Lives(Path(member.run_dir)), Path(member.run_dir)
    mine = [life for life in _of(lives, folder) if life.job == allocation.job and life.restarts == allocation.restarts]
    life = mine[-1]
    if lives.latest() != life.number:
        _say(f"life {life.number} is over: life {lives.latest()} has taken the run; this script leaves it alone")
        return EXIT_FAILED
    failures = lives.failures(life.number)
    said = lives.said(life.number, "outcome").get("outcome")
    life.outcome, life.cause = judge(code, said, failures, _log_of(folder, allocation, life))
    if life.cause is not None and life.cause.kind == "exit":
        life.cause = _last_word(folder, allocation, life) or life.cause
    state = _patiently(lambda: state_of(allocation.number))
    if life.cause is None and life.outcome != FINISHED and (silent := _patiently(lambda: silent_nodes(life.nodes))):
        life.cause = Cause("node", f"{', '.join(silent)} does not respond", node=silent[0])
    life.step, life.ended = last_step(run_dir), time.time()
    decision = decide([*_of(lives, folder)[:-1], life], submission.max_requeues, submission.max_restarts)
    # SLURM starts a job again after a preemption, a requeue and a lost node, but not after its time limit.
    out_of_time = life.cause is not None and "time limit" in life.cause.what
    if not decision.again:
        life.next = "nothing"
    else:
        life.next = "requeued" if state == "RUNNING" or out_of_time else "SLURM decides"
    _report(life, folder, allocation, run_dir, decision, state)
    # Before the requeue: SLURM may end this script with it.
    lives.end(life)
    if life.next == "requeued":
        bad = life.cause.nodes if life.cause and submission.preflight == "exclude" else ()
        return 0 if _start_again(folder, allocation, run_dir, bad) else EXIT_FAILED
    return {FINISHED: 0, INTERRUPTED: 0, MISTAKE: EXIT_USER_ERROR}.get(life.outcome or FAILED, EXIT_FAILED)


def _patiently(question: Callable[[], Answer]) -> Answer:
    """Return SLURM's answer, waiting for a controller that is away for some minutes: a run hangs on it."""
    for _ in range(CONTROLLER_RETRIES):
        try:
            return question()
        except UserError as error:
            _say(f"{error}; asking again")
            time.sleep(PATIENCE)
    return question()


def _log_of(folder: Path, allocation: Allocation, life: Life) -> str:
    """Return what the batch log holds of a life."""
    try:
        text = (folder / f"{allocation.job}_batch.log").read_text(errors="replace")
    except OSError:
        return ""
    return text.rpartition(f"=== life {life.number} of ")[2]


def _last_word(folder: Path, allocation: Allocation, life: Life) -> Cause | None:
    """Return what the rank that srun names said on stderr last, if it was an error."""
    assert life.cause is not None
    try:
        text = (folder / f"{allocation.job}_{life.cause.rank}_log.err").read_text(errors="replace")
    except OSError:
        return None
    said = text.rpartition(f"=== life {life.number} ")[2]
    errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    return told(errors[-1], life.cause.rank) if errors else None


def _report(life: Life, folder: Path, allocation: Allocation, run_dir: Path, decision: Decision, state: str) -> None:
    assert life.ended is not None
    lasted = f"{life.ended - life.started:.0f} s"
    if life.cause is None:
        _say(f"life {life.number}: {life.outcome} at step {life.step} after {lasted}")
    else:
        _say(f"life {life.number}: {life.outcome} at step {life.step} after {lasted}: {life.cause}")
        if life.cause.rank is not None and life.outcome != INTERRUPTED:
            rank = life.cause.rank
            output = folder / f"{allocation.job}_{rank}_log.err"
            _say(f"failed first: rank {rank}; see {run_dir / 'logs' / f'rank_{rank}.log'} and {output}")
    for node, why in Lives(run_dir).slow_nodes(life.number).items():
        _say(f"the pre-flight found {node} slow: {why}")
    if life.outcome != FINISHED:
        _say(
            {"requeued": "the job is requeued: ", "nothing": "the run stops: "}.get(life.next or "", "")
            + decision.reason
        )
    if life.next == "SLURM decides":
        _say(f"SLURM has the job as {state}: it starts it again, unless it was cancelled")


def _start_again(folder: Path, allocation: Allocation, run_dir: Path, bad_nodes: tuple[str, ...]) -> bool:
    """Requeue this job, without ``bad_nodes``; where the cluster does not allow it, submit the same script anew."""
    job = allocation.number
    # Before the requeue, which changes what `scontrol show` says.
    excluded = ",".join(dict.fromkeys([*_excluded(job), *bad_nodes]))
    if _scontrol("requeue", job):
        if bad_nodes and not _scontrol("update", f"JobId={job}", f"ExcNodeList={excluded}"):
            _say(f"SLURM does not let the job leave out {', '.join(bad_nodes)}; it may meet them again")
        return True
    command = ["sbatch", *([f"--exclude={excluded}"] if bad_nodes else [])]
    if "_" in allocation.job:
        command.append(f"--array={allocation.member}")
    # One script, under the number of the job that was submitted first: this one may be a later one.
    result = _run(*command, *(str(script) for script in sorted(folder.glob("*_submission.sh"))[:1]))
    _say(" ".join((result.stdout + result.stderr).split()))
    if submitted := re.search(r"Submitted batch job (\d+)", result.stdout):
        record_job(run_dir, submitted[1] + allocation.job[len(allocation.job.partition("_")[0]) :])
    return result.returncode == 0


def _excluded(job: str) -> list[str]:
    match = re.search(r"ExcNodeList=(\S+)", _run("scontrol", "show", "job", job).stdout)
    return [] if match is None or match[1] == "(null)" else [match[1]]


def _scontrol(*arguments: str) -> bool:
    result = _run("scontrol", *arguments)
    if result.returncode:
        _say(f"scontrol {arguments[0]}: {' '.join((result.stderr or result.stdout).split())}")
    return result.returncode == 0


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, EXIT_FAILED, "", str(error))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
