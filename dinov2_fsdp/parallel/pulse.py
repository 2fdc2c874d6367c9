"""Every rank's pulse: who has died, who hangs, and where; so that no run waits for ever and the right rank is named."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch.distributed as dist

from dinov2_fsdp.errors import EXIT_FAILED, FILE_ONLY
from dinov2_fsdp.parallel.world import World

logger = logging.getLogger(__name__)

INTERVAL = 1.0
"""Seconds between two beats."""
SILENCE = 5.0
"""Seconds without a beat after which a process counts as dead (or stopped, or its node as cut off)."""
DEAD = 30.0
"""Seconds without a beat after which a rank's neighbour ends the run, if no communication has failed by then."""
GRACE = 5.0
"""Seconds in which a rank may end by itself once another one has said why the run is over."""
LINGER = 5.0
"""Seconds that rank 0 waits for the others before it takes the store with it, if it fails or they do not leave."""
ANSWER = 3.0
"""Seconds within which the store between the ranks has to answer."""
_HOST = socket.gethostname()
_LOST = (
    "connection closed", "connection reset", "connection refused", "broken pipe", "timed out", "timeout", "socket",
    "gloo", "nccl", "remote process", "recvvalue", "sendbytes",
)  # fmt: skip


def is_loss_of_another(error: BaseException) -> bool:
    """Return whether an error only says that another rank has gone, which is then the one to name."""
    text = str(error).lower()
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _LOST)
    )


class Pulse(AbstractContextManager["Pulse"]):
    """Two threads on every rank: one tells the others where this rank is, one ends it when nothing moves any more.

    Args:
        world: the processes; without a store between them, a rank knows only itself.
        limit: seconds without progress after which this rank ends: it hangs, or waits for one that does.
        key: the pulses of one life of the run share it.
        end: how the process is ended, given the exit code.
    """

    def __init__(self, world: World, limit: float, key: str = "", end: Callable[[int], Any] = os._exit) -> None:
        self.world, self.limit, self.end = world, limit, end
        self.interval = min(INTERVAL, limit / 5)
        self._store = dist.PrefixStore(f"pulse/{key}", world.store) if world.store is not None else None
        self._phase, self._step, self._count = "start", 0, 0
        self._moved = time.monotonic()
        self._heard: str | None = None
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"pulse-{work.__name__}", daemon=True)
            for work in (self._beat, self._watch)
        ]

    def __enter__(self) -> Pulse:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.world.rank == 0 and self._store is not None and error[0] is not None:
            self._leave()  # rank 0 keeps the store in which the others read why the run is over
        self._over.set()
        for thread in self._threads:
            thread.join(2 * self.interval)
        if error[0] is None:
            self._leave()

    def _leave(self) -> None:
        """Leave; rank 0, which keeps the store, does so last: nobody's last beat or question finds the store gone."""
        if self._store is None:
            return
        self._ask(lambda store: store.set(f"left/{self.world.rank}", ""))
        everybody = [f"left/{rank}" for rank in range(self.world.size)]
        deadline = time.monotonic() + LINGER
        while self.world.rank == 0 and time.monotonic() < deadline:
            if self._ask(lambda store: store.check(everybody)):
                return
            time.sleep(0.02)

    def at(self, phase: str, step: int) -> None:
        """Say where this rank is; costs nothing. Every call is progress, and all ranks make the same calls."""
        self._phase, self._step = phase, step
        self._count += 1
        self._moved = time.monotonic()

    def place(self) -> str:
        """Return where this rank is, in words."""
        return f"step {self._step}, in {self._phase}"

    # -- what ended the run -------------------------------------------------------------------------------------------

    def claim(self, text: str) -> bool:
        """Say what ended the run; return False if another rank has said so before, which is then the cause."""
        if self._store is None:
            return True
        # With the rank in front: when all ranks raise the same error, one of them says so.
        signed = f"{self.world.rank}\n{text}"
        answer = self._ask(lambda store: store.compare_set("cause", "", signed))
        return self._heard is None if answer is None else answer.decode() == signed

    def explain_loss(self, patience: float = SILENCE + 5) -> tuple[str, bool]:
        """Return which rank this one has lost, and whether it falls to this rank to say so.

        Waits until another rank has named the cause or one has fallen silent, ``patience`` seconds at most.
        """
        beats: dict[int, tuple[int, float]] = {}
        deadline = time.monotonic() + patience
        text = "the connection to another rank was lost, though every process still answers"
        while time.monotonic() < deadline:
            if (cause := self._cause()) is not None:
                return cause, False
            said = self._said()
            if said is None:
                text = "rank 0 died or cannot be reached any more"
                # Without rank 0 there is no store to settle who says so.
                return text, self.world.rank == 1
            silent = _silent(said, beats)
            if silent:
                text = f"{_listing(said, silent)} died or cannot be reached any more"
                break
            time.sleep(self.interval)
        return text, self.claim(text)

    def _cause(self) -> str | None:
        """Return what another rank said of why the run is over, or None. Rank 0 may be gone once it was heard."""
        if self._heard is None and self._store is not None and self._ask(lambda store: store.check(["cause"])):
            said = self._ask(lambda store: store.get("cause"))
            if said is not None:
                self._heard = said.decode().partition("\n")[2]
        return self._heard

    # -- the threads --------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        beat = 0
        while self._store is not None and self._heard is None:
            said = {"beat": beat, "phase": self._phase, "step": self._step, "count": self._count, "host": _HOST}
            try:
                self._store.set(str(self.world.rank), json.dumps(said))
            except RuntimeError:
                return  # rank 0, which keeps the store, is gone; the step's own communication will say so
            beat += 1
            if self._over.wait(self.interval):
                return

    def _watch(self) -> None:
        beats: dict[int, tuple[int, float]] = {}
        ring: dict[int, tuple[int, float]] = {}
        answered = time.monotonic()
        while not self._over.wait(self.interval):
            still = time.monotonic() - self._moved
            if self._store is not None:
                neighbour = str((self.world.rank + 1) % self.world.size)
                found = self._ask(partial(_cause_and_beat, neighbour))
                if found is not None:
                    answered = time.monotonic()
                    if found[0]:
                        self._end_quietly()
                        return
                    said = {int(neighbour): json.loads(found[1])} if found[1] else {}
                    if silent := _silent(said, ring, DEAD):
                        self._end(f"{_listing(said, silent)} died or cannot be reached any more")
                        return
                elif time.monotonic() - answered > DEAD:
                    self._end("rank 0 died or cannot be reached any more", mine=self.world.rank == 1)
                    return
                if self.limit - SILENCE - 2 < still <= self.limit and (places := self._said()) is not None:
                    _silent(places, beats)  # time to see whose beat has stopped, before the limit is reached
            if still > self.limit:
                self._hang(beats)
                return

    def _end_quietly(self) -> None:
        """End this process, because another one has said why the run is over, unless it is ending by itself."""
        text = self._cause() or "another rank failed"
        self._leave()
        if not self._over.wait(GRACE):
            logger.error("this rank ends because of another: %s", text, extra=FILE_ONLY)
            self.end(EXIT_FAILED)

    def _end(self, text: str, mine: bool | None = None) -> None:
        if self.claim(text) if mine is None else mine:
            print(f"error: {text}", file=sys.stderr, flush=True)
        logger.error("%s", text, extra=FILE_ONLY)
        # Others may have come to the same end at the same moment: they have to find here that it is said.
        self._leave()
        self.end(EXIT_FAILED)

    def _hang(self, beats: dict[int, tuple[int, float]]) -> None:
        said = self._said()
        if said is None:
            text = "rank 0 does not answer"
        elif silent := _silent(said, beats):
            text = f"{_listing(said, silent)} does not answer"
        else:
            # All ranks pass the same places, so the one that has passed fewest is the one that the others wait for.
            fewest = min(place["count"] for place in said.values())
            text = f"{_listing(said, [rank for rank, place in said.items() if place['count'] == fewest])} hangs"
        self._end(f"{text}; nothing has moved for parallel.timeout={self.limit:g} seconds")

    def _said(self) -> dict[int, dict[str, Any]] | None:
        """Return where every rank said it was, or None if rank 0, which keeps the store, does not answer."""
        own = {"beat": 0, "phase": self._phase, "step": self._step, "count": self._count, "host": _HOST}
        if self._store is None:
            return {self.world.rank: own}
        keys = [str(rank) for rank in range(self.world.size)]

        def read(store: dist.Store) -> dict[int, dict[str, Any]]:
            known = keys if store.check(keys) else [key for key in keys if store.check([key])]
            return {int(key): json.loads(value) for key, value in zip(known, store.multi_get(known), strict=True)}

        return self._ask(read)

    def _ask(self, question: Callable[[dist.Store], Any]) -> Any:
        """Return the store's answer, or None if there is none within ANSWER seconds."""
        answer: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answer.append(question(self._store))  # type: ignore[arg-type]

        # A store whose process is stopped accepts a question and never answers it.
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(ANSWER)
        return answer[0] if answer else None


def _cause_and_beat(key: str, store: dist.Store) -> tuple[bool, bytes]:
    return store.check(["cause"]), store.get(key) if store.check([key]) else b""


def _silent(
    said: dict[int, dict[str, Any]], beats: dict[int, tuple[int, float]], seconds: float = SILENCE
) -> list[int]:
    """Return the ranks whose beat has not changed for so many seconds; ``beats`` remembers when which was seen first.

    Clocks of different hosts are never compared.
    """
    now = time.monotonic()
    for rank, place in said.items():
        if beats.get(rank, (-1, 0.0))[0] != place["beat"]:
            beats[rank] = place["beat"], now
    return [rank for rank in sorted(said) if now - beats[rank][1] > seconds]


def _listing(said: dict[int, dict[str, Any]], ranks: list[int]) -> str:
    named = [f"rank {r} ({said[r]['host']}, step {said[r]['step']}, in {said[r]['phase']})" for r in ranks[:4]]
    return ", ".join(named) + (f" and {len(ranks) - 4} more" if len(ranks) > 4 else "")
