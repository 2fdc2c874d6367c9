"""Saving and resuming: all ranks together, in the background, aside first, hashed, and verified on the way back."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dinov2_fsdp.checkpoint.folder import (
    DAMAGED,
    FORMAT,
    MANIFEST_FILE,
    STATE_FILE,
    SavedCheckpoint,
    check_life,
    checkpoint_folder,
    damage,
    digest,
    list_checkpoints,
    sync_folder,
    write_durably,
    write_manifest,
)
from dinov2_fsdp.checkpoint.staging import Staging
from dinov2_fsdp.checkpoint.tensors import load_tensors, one_row
from dinov2_fsdp.errors import RunFailed
from dinov2_fsdp.parallel.pulse import is_loss_of_another
from dinov2_fsdp.parallel.world import World, cpu_group

logger = logging.getLogger(__name__)


class SaveFailed(RunFailed):
    """A checkpoint could not be written; the one before it is whole."""


class DamagedCheckpoints(RunFailed):
    """A run has checkpoints, and not one of them is whole."""


@dataclass(frozen=True)
class SaveReport:
    """What one save cost. Seconds; ``stall`` is the time for which training stood still."""

    step: int
    stall: float
    writing: float
    gib: float

    def metrics(self) -> dict[str, float]:
        """Return the figures by the names under which the monitor writes them."""
        return {"checkpoint/stall_s": self.stall, "checkpoint/writing_s": self.writing, "checkpoint/gib": self.gib}


class Checkpointer:
    """Saves and restores named tensors and a dictionary of plain numbers and text. Every call is collective.

    A save copies the tensors, then writes them from a thread that talks to the other ranks over a process group of
    its own: on the training's group its messages would mix with the step's. At most one save is under way.

    Args:
        run_dir: the run directory.
        world: all ranks take part in every call.
        keep: newest whole checkpoints to leave on disk.
        keep_every: checkpoints at multiples of this many steps stay for ever; 0: none does.
        asynchronous: write in the background; False waits for each save.
        life: number of this life of the run; once a later one has begun, nothing is written any more.
    """

    def __init__(
        self, run_dir: Path, world: World, keep: int, keep_every: int, asynchronous: bool = True, life: int = 0
    ) -> None:
        self.run_dir, self.world, self.keep, self.keep_every = run_dir, world, keep, keep_every
        self.asynchronous, self.life = asynchronous, life
        self._group = cpu_group(world)
        self._staging = Staging(world.device)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._saving: Future[SaveReport] | None = None
        self._reports: deque[SaveReport] = deque()

    # -- saving -------------------------------------------------------------------------------------------------------

    def save(self, step: int, late: dict[str, Tensor], early: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Begin to write a checkpoint; the one before is finished first. Older ones go only after it is complete.

        Args:
            late: tensors that only the optimizer and the EMA change; call :meth:`before_update` before they do.
            early: the other tensors.
            state: plain numbers and text, of rank 0.

        Raises:
            SaveFailed: this save, if it is not asynchronous, or the one before failed; on all ranks.
            RuntimeError: another rank was lost meanwhile.
        """
        start = time.perf_counter()
        self.finish()
        staged = one_row(self._staging.take(late, early))
        stall = time.perf_counter() - start
        self._saving = self._executor.submit(self._write, step, staged, state, stall)
        if not self.asynchronous:
            self.finish()

    def before_update(self) -> None:
        """Call before weights and optimizer state change: the copies of the last save must have been made."""
        self._staging.before_update()

    def failed(self) -> bool:
        """Return whether the save under way has failed, without waiting for it. Not collective."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def report(self) -> SaveReport | None:
        """Return what a save cost that has ended, the oldest not yet returned, if there is one. Not collective."""
        if self._saving is not None and self._saving.done() and not self.failed():
            self.finish()
        return self._reports.popleft() if self._reports else None

    def finish(self) -> None:
        """Wait until the save under way is complete.

        Raises:
            SaveFailed: it failed; on all ranks.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            self._reports.append(saving.result())

    def close(self) -> None:
        """Let go of the thread, without waiting for a save that other ranks may have left."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _write(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any], stall: float) -> SaveReport:
        start = time.perf_counter()
        final = checkpoint_folder(self.run_dir, step)
        aside = final.with_name(f"{final.name}.life{self.life}.partial")
        self._staging.wait()
        try:
            self._together(step, lambda: self._prepare(aside) if self.world.rank == 0 else None)
            writer = dcp.HuggingFaceStorageWriter(str(aside), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=self._group)
            # On a network file system a rank may not see for a while what others wrote; by its name it can be opened.
            seen = self._together(step, lambda: [path.name for path in aside.iterdir()])
            names = sorted(set().union(*seen))[self.world.rank :: self.world.size]
            digests = self._together(step, lambda: {name: digest(aside / name) for name in names})
            files = {name: found for part in digests for name, found in part.items()}
            self._together(step, partial(self._complete, aside, final, step, state, files))
        except CheckpointException as error:
            rank, (cause, _) = sorted(error.failures.items())[0]
            raise SaveFailed(_cannot_write(rank, step, cause)) from error
        except (OSError, RuntimeError) as error:
            if isinstance(error, RunFailed) or is_loss_of_another(error):
                raise  # another rank is the one to name
            raise SaveFailed(_cannot_write(self.world.rank, step, error)) from error
        gib = sum(size for size, _ in files.values()) / 2**30
        return SaveReport(step, stall, time.perf_counter() - start, gib)

    def _prepare(self, aside: Path) -> None:
        check_life(self.run_dir, self.life)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)

    def _complete(
        self, aside: Path, final: Path, step: int, state: dict[str, Any], files: dict[str, tuple[int, str]]
    ) -> None:
        if self.world.rank != 0:
            return
        write_durably(aside / STATE_FILE, json.dumps({"format": FORMAT, "step": step, **state}).encode())
        write_manifest(aside, step, self.life, {**files, STATE_FILE: digest(aside / STATE_FILE)})
        sync_folder(aside)
        check_life(self.run_dir, self.life)
        if final.exists():
            shutil.rmtree(final.rename(final.with_name(f"{final.name}.old.partial")))
        aside.rename(final)
        sync_folder(final.parent)
        self._prune()

    def _together(self, step: int, work: Any) -> list[Any]:
        """Do something on every rank; return what each rank returned, or raise on all what one of them raised."""
        try:
            mine: Any = work()
        except Exception as error:
            superseded = str(error) if isinstance(error, RunFailed) else None
            mine = _Failure(superseded or _cannot_write(self.world.rank, step, error))
        if self._group is None:
            results = [mine]
        else:
            results = [None] * self.world.size
            dist.all_gather_object(results, mine, group=self._group)
        failures = [result for result in results if isinstance(result, _Failure)]
        if failures:
            raise SaveFailed(failures[0].message)
        return results

    def _prune(self) -> None:
        saved = list_checkpoints(self.run_dir)
        try:
            for old in saved[: -self.keep]:
                if not (self.keep_every and old.step % self.keep_every == 0):
                    # Half deleted under its final name it would count as damaged.
                    shutil.rmtree(old.path.rename(old.path.with_name(f"{old.path.name}.old.partial")))
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)

    # -- resuming -----------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Delete what earlier lives left half written; what only lacked its final name gets it."""
        if self.world.rank == 0:
            for path in sorted((self.run_dir / "checkpoints").glob("step_*.partial")):
                step = path.name.split(".")[0].removeprefix("step_")
                if not step.isdecimal():
                    continue  # not written here
                whole = SavedCheckpoint(path, int(step))
                final = checkpoint_folder(self.run_dir, whole.step)
                if not final.exists() and (path / MANIFEST_FILE).is_file() and not damage(whole):
                    path.rename(final)
                else:
                    shutil.rmtree(path, ignore_errors=True)

    def newest(self) -> SavedCheckpoint | None:
        """Return the newest whole checkpoint, the same on every rank, or None if the run has none yet.

        Damaged ones are named in the log and set aside under ``….damaged``, so that none is taken for good later.

        Raises:
            DamagedCheckpoints: there are checkpoints, and all of them are damaged.
        """
        problems: list[str] = []
        bad: list[SavedCheckpoint] = []
        for checkpoint in reversed(self._same(list_checkpoints(self.run_dir))):
            parts = [damage(checkpoint, self.world.rank, self.world.size)]
            if self._group is not None:
                mine, parts = parts[0], [[]] * self.world.size
                dist.all_gather_object(parts, mine, group=self._group)
            found = [problem for part in parts for problem in part]
            if not found:
                if self.world.rank == 0:
                    _set_aside(bad)
                return checkpoint
            bad.append(checkpoint)
            problems.append(f"{checkpoint.path} is damaged: {found[0]}")
            if self.world.rank == 0:
                logger.warning("%s; trying the one before", problems[-1])
        if problems:
            raise DamagedCheckpoints(
                "\n".join([f"no checkpoint of {self.run_dir} is whole", *problems[:3]])
                + "\nrestore one from a copy, or start anew with --overwrite"
            )
        return None

    def load(self, checkpoint: SavedCheckpoint, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fill ``tensors`` in place from a checkpoint saved on any number of ranks and return its numbers and text.

        Raises:
            UserError: the checkpoint holds other tensors, or tensors of another shape; all are listed.
        """
        load_tensors(checkpoint.path, tensors, whole="")
        return checkpoint.state()

    def _same(self, saved: list[SavedCheckpoint]) -> list[SavedCheckpoint]:
        """Return rank 0's list on every rank: on a network file system they may see different ones for a while."""
        if self._group is None:
            return saved
        box = [saved]
        dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]


def _set_aside(checkpoints: list[SavedCheckpoint]) -> None:
    for checkpoint in checkpoints:
        target = checkpoint.path.with_name(checkpoint.path.name + DAMAGED)
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.path.rename(target)


@dataclass(frozen=True)
class _Failure:
    message: str


def _cannot_write(rank: int, step: int, cause: BaseException) -> str:
    reason = getattr(cause, "strerror", None) or f"{type(cause).__name__}: {cause}".splitlines()[0]
    return f"rank {rank} could not write the checkpoint of step {step}: {reason}; the one before it is whole"
