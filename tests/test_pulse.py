"""Who has died, who hangs and where: told by the ranks' pulses. Here the ranks are objects in one process."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import dinov2_fsdp.parallel.pulse as pulse_module
from dinov2_fsdp.errors import EXIT_FAILED
from dinov2_fsdp.parallel.pulse import Pulse, is_loss_of_another
from dinov2_fsdp.parallel.world import World

LIMIT = 2.0


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"INTERVAL": 0.1, "SILENCE": 0.8, "DEAD": 3.0, "GRACE": 0.3, "LINGER": 0.0}.items():
        monkeypatch.setattr(pulse_module, name, value)


@contextmanager
def ranks(count: int, limit: float = 60.0) -> Iterator[tuple[list[Pulse], list[tuple[int, int]]]]:
    """Pulses of several ranks, and a list that gets (rank, exit code) of each that is ended."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=20))
    ended: list[tuple[int, int]] = []
    with ExitStack() as stack:
        pulses = []
        for rank in range(count):
            client = dist.TCPStore("127.0.0.1", server.port, is_master=False, timeout=timedelta(seconds=20))
            world = World(rank, count, rank, torch.device("cpu"), client)
            pulse = Pulse(world, limit, end=lambda code, rank=rank: ended.append((rank, code)))
            pulses.append(stack.enter_context(pulse))
        yield pulses, ended


def wait_until(condition: object, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.02)


def stop_beating(pulse: Pulse) -> None:
    pulse._over.set()


@pytest.mark.slow
def test_the_rank_that_others_wait_for_is_named_with_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    with ranks(3, LIMIT) as (pulses, ended):
        for rank, pulse in enumerate(pulses):
            pulse.at("data", 57)
            if rank != 1:
                pulse.at("teacher", 57)
        wait_until(lambda: len(ended) == 3)
    said = capsys.readouterr().err
    assert said.count("error:") == 1, "one message, whatever the number of ranks"
    assert "rank 1 (" in said
    assert "step 57, in data) hangs; nothing has moved for parallel.timeout=2 seconds" in said
    assert {code for _, code in ended} == {EXIT_FAILED}


@pytest.mark.slow
def test_a_rank_that_goes_on_is_never_ended() -> None:
    with ranks(2, LIMIT) as (pulses, ended):
        for step in range(30):
            for pulse in pulses:
                pulse.at("data", step)
            time.sleep(0.1)
        assert ended == []


def test_a_process_alone_that_hangs_is_ended(capsys: pytest.CaptureFixture[str]) -> None:
    ended: list[int] = []
    with Pulse(World(0, 1, 0, torch.device("cpu")), 0.5, end=ended.append) as pulse:
        pulse.at("data", 3)
        wait_until(lambda: ended)
    assert ended == [EXIT_FAILED]
    assert "rank 0 (" in capsys.readouterr().err


@pytest.mark.slow
def test_a_silent_rank_is_what_a_lost_connection_is_blamed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse_module, "DEAD", 60.0)
    with ranks(3) as (pulses, _):
        for pulse in pulses:
            pulse.at("backward", 9)
        time.sleep(0.3)
        stop_beating(pulses[2])
        text, mine = pulses[1].explain_loss()
        again, also_mine = pulses[0].explain_loss()
    assert "rank 2 (" in text
    assert "step 9, in backward) died or cannot be reached any more" in text
    assert mine
    assert (again, also_mine) == (text, False)


def test_the_cause_that_another_rank_named_explains_a_lost_connection() -> None:
    with ranks(2) as (pulses, _):
        assert pulses[1].claim("rank 1 failed: MemoryError")
        assert pulses[0].explain_loss() == ("rank 1 failed: MemoryError", False)


def test_only_the_first_cause_counts() -> None:
    with ranks(2) as (pulses, _):
        assert pulses[1].claim("the cause")
        assert not pulses[0].claim("a consequence")
        assert not pulses[0].claim("the cause"), "the same words of another rank are the second time they are said"
        assert pulses[1].claim("the cause")


def test_a_named_cause_ends_ranks_that_wait_for_ever(capsys: pytest.CaptureFixture[str]) -> None:
    """NCCL does not notice that a peer is gone; without this a rank's exception would hold the others to the limit."""
    with ranks(3) as (pulses, ended):
        pulses[0].claim("rank 0 failed: an exception")
        wait_until(lambda: len(ended) == 3)
    assert capsys.readouterr().err == ""


def test_a_cause_that_was_heard_is_remembered_when_rank_0_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 fails, says why and ends, and takes the store with it: the others lose it a moment later."""
    monkeypatch.setattr(pulse_module, "GRACE", 60.0)
    with ranks(2) as (pulses, ended):
        assert pulses[0].claim("rank 0 failed: MemoryError")
        wait_until(lambda: pulses[1]._heard is not None)
        pulses[1]._ask = lambda question: None  # type: ignore[method-assign]
        assert pulses[1].explain_loss() == ("rank 0 failed: MemoryError", False)
        assert not pulses[1].claim("a consequence of it")
        assert ended == []


def test_rank_0_leaves_when_the_others_have_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat that finds the store gone would fill the terminal with torch's warnings, though all went well."""
    monkeypatch.setattr(pulse_module, "LINGER", 60.0)
    with ranks(2) as (pulses, _):
        gone: list[int] = []
        leaving = threading.Thread(target=lambda: (pulses[0].__exit__(None, None, None), gone.append(0)))
        leaving.start()
        leaving.join(1.0)
        assert gone == [], "rank 1 is still there"
        pulses[1].__exit__(None, None, None)
        leaving.join(20.0)
        assert gone == [0]


def test_rank_0_does_not_wait_for_ever_for_one_that_never_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse_module, "LINGER", 0.3)
    with ranks(2) as (pulses, _):
        start = time.monotonic()
        pulses[0].__exit__(None, None, None)
        assert 0.3 <= time.monotonic() - start < 10


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_though_no_communication_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with ranks(3) as (pulses, ended):
        for pulse in pulses:
            pulse.at("student", 4)
        time.sleep(0.3)
        stop_beating(pulses[1])
        wait_until(lambda: {rank for rank, _ in ended} >= {0, 2})
    said = capsys.readouterr().err
    assert said.count("error:") == 1
    assert "rank 1 (" in said
    assert "died or cannot be reached any more" in said


def test_a_store_that_does_not_answer_is_rank_0s_end() -> None:
    with ranks(2) as (pulses, _):
        pulses[1]._ask = lambda question: None  # type: ignore[method-assign]
        assert pulses[1].explain_loss() == ("rank 0 died or cannot be reached any more", True)


@pytest.mark.parametrize(
    ("error", "loss"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:12345"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), True),
        (ValueError("connection closed"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (MemoryError(), False),
    ],
)
def test_errors_that_only_say_that_another_rank_is_gone_are_told_from_causes(error: Exception, loss: bool) -> None:
    assert is_loss_of_another(error) is loss


def test_ranks_that_reach_their_limit_together_leave_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    """Rank 0 keeps the store in which the other one finds that all is said, so it must not be gone at once."""
    with ranks(2, limit=1.0) as (pulses, ended):
        for pulse in pulses:
            pulse.at("data", 3)
        wait_until(lambda: len(ended) == 2)
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(said) == 1, said


def test_rank_0_ends_after_the_others_have_read_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse_module, "LINGER", 60.0)
    with ranks(2) as (pulses, _):
        store, had_left = pulses[0]._store, []
        assert store is not None
        pulses[0].end = lambda code: had_left.append(store.check(["left/1"]))
        pulses[0]._end("no space left")
        assert had_left == [True]
        assert pulses[1]._cause() == "no space left"
