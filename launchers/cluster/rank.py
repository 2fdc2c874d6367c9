"""What each rank of a job does: it finds its place, meets the others, trains, and says how it ended."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dinov2_fsdp.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USER_ERROR, RunFailed, UserError, show
from dinov2_fsdp.parallel.place import Place
from launchers.cluster.allocation import (
    allocation_from_environment,
    life_from_environment,
    meeting_point,
    node_name,
    place_in_job,
)
from launchers.cluster.lives import FINISHED, INTERRUPTED, Cause, Life, Lives, told
from launchers.cluster.progress import signal_seconds
from launchers.cluster.submission import Submission

if TYPE_CHECKING:
    from dinov2_fsdp.config import Config

_STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class TrainingRank:
    """The callable that submitit starts on every rank."""

    submission: str

    def __call__(self) -> None:
        # Until the training listens to them, a request to stop ends the rank: there is nothing to save yet.
        _on_signals(signal.SIG_DFL)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)  # submitit would log it, in the middle of the progress
        submission = Submission.read(Path(self.submission))
        member = submission.members[allocation_from_environment().member]
        lives = Lives(Path(member.run_dir))
        number, (address, port) = life_from_environment(), meeting_point()
        life = next(life for life in lives.all() if life.number == number)
        place = place_in_job(address, port, number)
        os.environ.update(place.to_environment(address, port))
        if Path(submission.folder).is_dir():
            os.chdir(submission.folder)
        print(f"=== life {number} of rank {place.rank}, on {node_name()}", file=sys.stderr, flush=True)
        with _Failure(lambda cause: lives.rank_failed(number, cause), place.rank) as failure:
            code = failure.guard(lambda: _train(submission, member.config, place, lives, life))
        _on_signals(signal.SIG_IGN)
        if code not in (0, EXIT_INTERRUPTED):
            logging.shutdown()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # without waiting for threads that wait for ranks that are gone
        if place.rank == 0:
            lives.say(number, "outcome", {"outcome": INTERRUPTED if code else FINISHED})
        # Code 0 also where the run goes on in another life: with any other, srun would end the ranks that are still
        # closing their files.
        if code:
            raise SystemExit(0)


def _on_signals(action: signal.Handlers) -> None:
    for number in _STOPPING:
        signal.signal(number, action)


class _Failure(logging.Handler):
    """Hands on why this rank failed, at once: a rank that waits for others may be ended in the middle of it."""

    def __init__(self, tell: Callable[[Cause], None], rank: int) -> None:
        super().__init__(logging.ERROR)
        self.tell, self.rank = tell, rank

    def __enter__(self) -> _Failure:
        logging.getLogger().addHandler(self)
        return self

    def __exit__(self, *error: object) -> None:
        logging.getLogger().removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None:
            self._tell(_text(record.exc_info[1]))
        else:
            self._tell(record.getMessage().removeprefix("this rank ends because of another: "))

    def guard(self, action: Callable[[], int]) -> int:
        """Return the exit code of ``action``, having told and shown what it raised."""
        try:
            return action()
        except (UserError, RunFailed) as error:
            code = show(error)
            if not error.silent:
                self._tell(_text(error), code, getattr(error, "nodes", None))
            return code
        except BaseException as error:
            traceback.print_exc()
            self._tell(_text(error))
            return EXIT_FAILED

    def _tell(self, text: str, code: int = EXIT_FAILED, nodes: tuple[str, ...] | None = None) -> None:
        kind = "mistake" if code == EXIT_USER_ERROR else "exception" if nodes is None else "preflight"
        self.tell(told(text, self.rank, kind, nodes or ()))


def _text(error: BaseException) -> str:
    return str(error) if isinstance(error, (UserError, RunFailed)) else f"{type(error).__name__}: {error}"


def stop_in_time(
    run_dir: Path, batch: int, life: Life, stop: Callable[[], None], ended: threading.Event, every: float = 5.0
) -> None:
    """Call ``stop`` when what is left of the job is what a step and a save take, as measured until then.

    SLURM's own signal comes at a time that was settled when the job was submitted, maybe before anything was measured.
    """
    if life.limit is None:
        return
    minutes = round((life.limit - life.started) / 60)
    while not ended.wait(every):
        left = life.limit - time.time()
        needed = signal_seconds(run_dir, batch, minutes, default=0)
        if left <= needed and not ended.is_set():
            print(f"the job has {max(0.0, left):.0f} s left, and a save may need {needed} s: stopping", flush=True)
            stop()
            return


def _train(submission: Submission, config_file: str, place: Place, lives: Lives, life: Life) -> int:
    from dinov2_fsdp.config import load
    from dinov2_fsdp.timetable import lengths
    from launchers import local

    config = load(config_file)
    if place.rank == 0:
        images = local.check_data(config)
        local.check_start(config)
        local.check_run_directory(config, overwrite=False)
        assert place.life is not None
        lives.say(place.life, "plan", {"steps": lengths(config, images).total})
    if submission.preflight != "off" and place.world_size > 1:
        _check_nodes(submission, config, place, lives, life.ports[1])
    from dinov2_fsdp.train import train
    from eval.online import online_evaluations

    ended = threading.Event()
    if place.rank == 0 and submission.watches_clock:
        watched = (Path(config.output_dir), config.train.batch, life)
        me = os.getpid()
        threading.Thread(
            target=stop_in_time, args=(*watched, lambda: os.kill(me, signal.SIGUSR2), ended), daemon=True
        ).start()
    try:
        return 0 if train(config, online_evaluations()) else EXIT_INTERRUPTED
    finally:
        ended.set()


def _check_nodes(submission: Submission, config: Config, place: Place, lives: Lives, port: int) -> None:
    """Time all nodes before the run.

    Raises:
        BadNodes: a node does not answer; or is slow, and slow ones are to be left out.
    """
    import torch

    from dinov2_fsdp.parallel.preflight import BadNodes, preflight

    torch.set_num_threads(config.parallel.threads or 1)
    nodes = allocation_from_environment().nodes
    report = preflight(config.parallel.device, place, port, node_name(), nodes, submission.meet_seconds)
    if place.rank == 0:
        print(report, flush=True)
        assert place.life is not None
        lives.say(place.life, "preflight", report.to_dict())
    if report.slow and submission.preflight == "exclude":
        raise BadNodes("; ".join(f"{node} is slow: {why}" for node, why in report.slow.items()), list(report.slow))
