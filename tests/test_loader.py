"""Loader processes: the same microbatches in the same order, whatever becomes of one of the processes."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_config
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.augment import MultiCrop
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.data.loader import Loader, Microbatches, build_loader
from dinov2_fsdp.data.sources import BadImage
from dinov2_fsdp.data.sources.embedded import ScenesSource
from dinov2_fsdp.errors import RunFailed

ROOT = Path(__file__).resolve().parent.parent
SPEC = "scenes:n=24,size=32"
PER_STEP = 8
IN_A_ROW = [(step, index) for step in range(100) for index in range(PER_STEP)]


class Scenes(ScenesSource):
    """Scenes that take so long to draw in worker 0, and for image ``long``."""

    def __init__(self, spec: str = SPEC, slow: float = 0.0, long: int = -1, seconds: float = 0.0) -> None:
        super().__init__(spec)
        self.slow, self.long, self.seconds = slow, long, seconds

    def image(self, index: int) -> Image.Image:
        worker = get_worker_info()
        if worker is not None and worker.id == 0:
            time.sleep(self.slow)
        if index == self.long:
            time.sleep(self.seconds)
        return super().image(index)


class Failing(Scenes):
    """The last two images cannot be read; ``error`` says why."""

    error: Exception = BadImage("x.jpg", "gone")

    def image(self, index: int) -> Image.Image:
        if index >= 22:
            raise self.error
        return super().image(index)


class Unopenable(Failing):
    error = OSError(24, "Too many open files")


def one_image_each(workers: int = 2, prefetch: int = 2, **overrides: Any) -> Config:
    return tiny_config(
        train__microbatch=1, loss__koleo=0.0, data__workers=workers, data__prefetch=prefetch, **overrides
    )


def load(config: Config, source: ScenesSource, end: int, start: int = 0, pin: bool = False) -> Loader:
    return build_loader(config, source, start, end, 0, PER_STEP, pin)


def same(a: Microbatch, b: Microbatch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def places(batches: list[Microbatch]) -> list[tuple[int, int]]:
    return [(batch.step, batch.index) for batch in batches]


def dealt_out(config: Config, source: ScenesSource, end: int) -> Iterator[Microbatch]:
    """The microbatches by torch's loader alone, which deals them out to its workers in turn."""
    loader: DataLoader[Any] = DataLoader(
        Microbatches(config, source), batch_size=None, sampler=IN_A_ROW[: end * PER_STEP],
        num_workers=config.data.workers, prefetch_factor=config.data.prefetch,
    )  # fmt: skip
    return iter(loader)


def test_a_slow_worker_changes_no_bit_and_no_order() -> None:
    alone = list(load(one_image_each(workers=0), Scenes(), 3))
    helped = list(load(one_image_each(workers=3), Scenes(slow=0.03), 3))
    assert places(helped) == places(alone) == IN_A_ROW[: 3 * PER_STEP]
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


class Holed(Scenes):
    """Some images cannot be read."""

    def image(self, index: int) -> Image.Image:
        if index % 5 == 3:
            raise BadImage(self.name(index), "a hole")
        return super().image(index)


@pytest.mark.parametrize("opened", [1, 5_000, 2**22])
def test_how_many_images_are_opened_ahead_changes_nothing(opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(train__microbatch=8)
    expected = next(build_loader(config, Holed(), 0, 1, 0, 1, pin=False))
    monkeypatch.setattr("dinov2_fsdp.data.loader.OPENED_BYTES", opened)
    assert same(next(build_loader(config, Holed(), 0, 1, 0, 1, pin=False)), expected)
    assert expected.bad


def test_no_more_is_opened_ahead_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of 3 KB that are there already, with and without room for two of them."""
    happened: list[str] = []

    class Noted(Scenes):
        def image(self, index: int) -> Image.Image:
            happened.append("o")
            return super().image(index)

    original = MultiCrop.fill

    def fill(*arguments: Any) -> None:
        happened.append("c")
        original(*arguments)

    monkeypatch.setattr(MultiCrop, "fill", fill)
    config = tiny_config(train__microbatch=4, crops__implementation="reference")
    for limit, expected in ((3 * 32 * 32, "oc" * 4), (3 * 32 * 32 + 1, "oocc" * 2), (2**22, "oooocccc")):
        happened.clear()
        monkeypatch.setattr("dinov2_fsdp.data.loader.OPENED_BYTES", limit)
        Microbatches(config, Noted())[0, 0]
        assert "".join(happened) == expected


@pytest.mark.slow
def test_a_slow_worker_does_not_set_the_pace() -> None:
    """Dealt out in turn, half of 24 images would wait for a worker that takes .15 s for each."""
    config, seconds = one_image_each(prefetch=4), []
    for make in (dealt_out, load):
        batches = make(config, Scenes(slow=0.15), 3)
        next(batches)
        started = time.monotonic()
        assert len(list(batches)) == 23
        seconds.append(time.monotonic() - started)
    assert seconds[0] > 11 * 0.15
    assert seconds[1] < 0.7 * seconds[0]


def test_a_single_long_microbatch_is_waited_for_and_no_other() -> None:
    config = one_image_each(workers=2, prefetch=4)
    long = int(next(itertools.islice(load(config, Scenes(), 1), 2, None)).samples)
    waits, batches, loader = [], [], load(config, Scenes(long=long, seconds=0.5), 1)
    for _ in range(PER_STEP):
        started = time.monotonic()
        batches.append(next(loader))
        waits.append(time.monotonic() - started)
    assert places(batches) == IN_A_ROW[:PER_STEP]
    assert waits[2] > 0.3
    assert sum(waits[3:]) < 0.2, "made while the long one was waited for"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow), 3])
def test_no_more_microbatches_are_made_ahead_than_may_be(workers: int, tmp_path: Path) -> None:
    """Not even while one of them keeps all others waiting."""
    config = one_image_each(workers=workers, prefetch=2)
    first = int(next(load(config, Scenes(), 1)).samples)

    class Counted(Scenes):
        def image(self, index: int) -> Image.Image:
            (tmp_path / str(time.monotonic_ns())).touch()
            return super().image(index)

    loader = load(config, Counted(long=first, seconds=0.6 if workers > 1 else 0.0), 3)
    time.sleep(0.4)
    assert len(list(tmp_path.iterdir())) <= workers * 2
    for number in range(1, 9):
        next(loader)
        time.sleep(0.05)
        assert len(list(tmp_path.iterdir())) <= number + workers * 2
    assert len(list(loader)) == 24 - 8


@pytest.mark.parametrize("workers", [0, 2])
def test_the_end_comes_after_the_last_and_stays(workers: int) -> None:
    loader = load(one_image_each(workers), Scenes(slow=0.02), 2, start=1)
    assert places(list(loader)) == IN_A_ROW[PER_STEP : 2 * PER_STEP]
    with pytest.raises(StopIteration):
        next(loader)
    assert list(load(one_image_each(workers), Scenes(), 2, start=2)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_starts_late_gets_what_comes_then(workers: int) -> None:
    whole = list(load(one_image_each(workers=0), Scenes(), 4))
    late = list(load(one_image_each(workers), Scenes(slow=0.02), 4, start=2))
    assert all(same(a, b) for a, b in zip(whole[2 * PER_STEP :], late, strict=True))


def until_it_fails(source: type[Failing], workers: int) -> tuple[list[Microbatch], type[Exception], str]:
    """What comes before the first failure, and the failure."""
    loader, batches = load(one_image_each(workers), source(slow=0.05), 3), []
    try:
        for batch in loader:
            batches.append(batch)
    except (RuntimeError, OSError) as error:
        return batches, type(error), str(error)
    raise AssertionError("nothing failed")


@pytest.mark.parametrize("source", [Failing, Unopenable])
def test_a_failure_is_reported_in_its_place(source: type[Failing], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fsdp.data.loader.REPLACEMENTS_PER_IMAGE", 1)
    alone, kind, text = until_it_fails(source, workers=0)
    helped, helped_kind, helped_text = until_it_fails(source, workers=2)
    assert 1 < len(alone) < 24
    assert places(helped) == places(alone)
    if source is Failing:
        assert kind is helped_kind is RunFailed
        assert helped_text == text
    else:
        assert kind is OSError
        first, *others = helped_text.splitlines()
        assert first == "a data worker failed: OSError: [Errno 24] Too many open files"
        assert others[0].startswith("Traceback")


def worker_pids() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid]


@pytest.mark.slow
def test_a_worker_that_dies_is_named() -> None:
    loader = load(one_image_each(workers=2), Scenes(slow=0.05), 10)
    next(loader)
    os.kill(worker_pids()[-1], signal.SIGKILL)
    with pytest.raises(RunFailed, match="a data worker died: DataLoader worker"):
        list(loader)


class Broken:
    """Iterates as torch's loader does when the connection breaks over which a worker hands on its memory."""

    def __init__(self, error: Exception, *workers: multiprocessing.Process) -> None:
        self.error, self._workers = error, workers

    def __next__(self) -> None:
        raise self.error


@pytest.mark.slow
@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(104, "reset"), FileNotFoundError(2, "gone")])
def test_a_worker_that_dies_while_it_hands_over_is_named(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection breaks first; only some time later does the worker count as dead."""
    dies, lives = (multiprocessing.Process(target=time.sleep, args=(seconds,)) for seconds in (0.3, 60))
    loader = load(one_image_each(workers=0), Scenes(), 1)
    for worker in (dies, lives):
        worker.start()
    try:
        loader._items[0] = Broken(error, lives, dies)
        with pytest.raises(RunFailed, match=rf"a data worker died: DataLoader worker \(pid {dies.pid}\) ended"):
            next(loader)
        loader._items[0] = Broken(error, lives)
        monkeypatch.setattr("dinov2_fsdp.data.loader.DYING", 0.1)
        with pytest.raises(type(error)):
            next(loader)
    finally:
        lives.kill()
        lives.join()


@pytest.mark.slow
def test_a_loader_that_nobody_needs_any_more_ends_its_workers_at_once() -> None:
    """Also those that wait because enough has been made."""
    config, others = one_image_each(workers=3), worker_pids()
    loader = load(config, Scenes(slow=0.2), 100)
    for _ in range(3):
        next(loader)
    time.sleep(0.3)
    started = time.monotonic()
    assert len(worker_pids()) == len(others) + 3
    del loader
    gc.collect()
    # Torch waits 5 s for the first worker that does not hear; a busy machine may need some of that.
    assert time.monotonic() - started < 5
    assert sorted(worker_pids()) == sorted(others)


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_too() -> None:
    others = worker_pids()
    loader = load(one_image_each(workers=1), Scenes(slow=1000), 10)
    assert len(worker_pids()) == len(others) + 1
    del loader
    gc.collect()
    assert sorted(worker_pids()) == sorted(others)


ORPHANS = """
import multiprocessing, os, sys, time
sys.path.insert(0, {tests!r})
import test_loader
loader = test_loader.load(test_loader.one_image_each(workers=2), test_loader.Scenes(slow=0.3), 100)
next(loader), next(loader)
print(*test_loader.worker_pids(), flush=True)
os.kill(os.getpid(), 9)
"""


@pytest.mark.slow
def test_workers_end_when_their_parent_is_killed() -> None:
    script = ORPHANS.format(tests=str(Path(__file__).parent))
    found = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=120, check=False)
    pids = [int(pid) for pid in found.stdout.split()]
    assert len(pids) == 2
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_is_pinned_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's pinning thread stands between the workers and the loader. Without a GPU nothing is pinned."""
    pinned = []

    def pin_memory(batch: Microbatch) -> Microbatch:
        pinned.append(batch.index)
        return batch

    monkeypatch.setattr(Microbatch, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_, **__: True)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
    alone = list(load(one_image_each(workers=0), Scenes(), 1))
    helped = list(load(one_image_each(workers=2), Scenes(slow=0.03), 1, pin=True))
    assert len(pinned) == PER_STEP
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ending", "code", "said"),
    [
        ("raise ValueError('the end')", 1, "the end"),
        ("sys.exit(3)", 3, ""),
        ("os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)\nfor _ in loader: pass", 1, "RunFailed"),
        ("signal.signal(signal.SIGALRM, stop); signal.alarm(1)\nfor _ in loader: pass", 1, "stopped"),
    ],
    ids=["exception", "exit", "a worker killed", "exception inside the wait for the next"],
)
def test_a_process_that_still_holds_its_loader_ends(ending: str, code: int, said: str) -> None:
    """Workers ignore the signal by which Python ends what is left of its children, and then waits for them."""
    script = (
        "import multiprocessing, os, signal, sys; sys.path.insert(0, 'tests')\n"
        "from tiny import tiny_config\n"
        "from dinov2_fsdp.data.loader import build_loader\n"
        "from dinov2_fsdp.data.sources import open_source\n"
        "def stop(*_): raise ValueError('stopped')\n"
        "config = tiny_config(data__workers=2)\n"
        "loader = build_loader(config, open_source(config.data.train), 0, 100000, 0, 1, False)\n"
        f"next(loader)\n{ending}\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stderr.decode()


class Watched(Scenes):
    """What the garbage collector of whoever draws the image leaves alone is the image."""

    def image(self, index: int) -> Image.Image:
        return Image.new("RGB", (32, 32), (255, 0, 0) if gc.get_freeze_count() > 10_000 else (0, 0, 0))


def test_workers_do_not_look_for_garbage_among_what_was_there_before() -> None:
    plain = {"crops__jitter": 0.0, "crops__gray": 0.0, "crops__solarize": 0.0}
    assert not gc.get_freeze_count()
    assert next(load(one_image_each(workers=1, **plain), Watched(), 1)).global_crops[:, 0].min() == 255
    assert next(load(one_image_each(workers=0, **plain), Watched(), 1)).global_crops.max() == 0
