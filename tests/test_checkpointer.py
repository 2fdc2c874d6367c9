"""A checkpoint is whole or it is not used: aside first, hashed, verified, and the one before is there until then."""

from __future__ import annotations

import json
import logging
import os
import pickle
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from training import differing, saved_steps, this_world

import dinov2_fsdp.checkpoint.checkpointer as checkpointer_module
from dinov2_fsdp.checkpoint import (
    Checkpointer,
    DamagedCheckpoints,
    SavedCheckpoint,
    SaveFailed,
    begin_life,
    damage,
    find_checkpoint,
    list_checkpoints,
)
from dinov2_fsdp.config import ParallelConfig
from dinov2_fsdp.errors import RunFailed, UserError
from dinov2_fsdp.parallel.place import Place
from dinov2_fsdp.parallel.pulse import is_loss_of_another
from dinov2_fsdp.parallel.world import World, end_world, start_world


@pytest.fixture
def world() -> Iterator[World]:
    threads = torch.get_num_threads()
    yield start_world(ParallelConfig(device="cpu", threads=1), Place())
    end_world()
    torch.set_num_threads(threads)


@pytest.fixture
def saver(world: World, tmp_path: Path) -> Checkpointer:
    return Checkpointer(tmp_path, world, keep=3, keep_every=0, asynchronous=False)


def tensors(value: float = 0.0) -> dict[str, Tensor]:
    return {"matrix": torch.full((4, 3), value), "row": torch.full((5,), value), "number": torch.tensor(value)}


def save(saver: Checkpointer, step: int, value: float | None = None) -> None:
    saver.save(step, tensors(step if value is None else value), {}, {})


def newest(saver: Checkpointer) -> SavedCheckpoint:
    found = saver.newest()
    assert found is not None
    return found


def content(saver: Checkpointer, checkpoint: SavedCheckpoint) -> float:
    loaded = tensors()
    saver.load(checkpoint, loaded)
    assert differing(loaded, tensors(loaded["number"].item())) == []
    return loaded["number"].item()


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def test_a_checkpoint_gives_back_tensors_and_state(saver: Checkpointer) -> None:
    late, early = tensors(2.5), {"early": torch.arange(3)}
    saver.save(7, late, early, {"colour": "green"})
    loaded = {**tensors(), "early": torch.zeros(3, dtype=torch.int64)}
    state = saver.load(newest(saver), loaded)
    assert differing(loaded, {**late, **early}) == []
    assert (state["step"], state["colour"]) == (7, "green")


def test_the_newest_checkpoints_and_multiples_of_keep_every_stay(world: World, tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, world, keep=2, keep_every=3)
    for step in range(1, 9):
        save(saver, step)
    saver.finish()
    assert saved_steps(tmp_path) == [3, 6, 7, 8]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 4


def test_an_asynchronous_save_holds_what_was_there_when_it_began(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Checkpointer(tmp_path, world, keep=3, keep_every=0)
    may_write, original = threading.Event(), checkpointer_module.dcp.save

    def wait_and_save(*args: Any, **kwargs: Any) -> Any:
        assert may_write.wait(60)
        return original(*args, **kwargs)

    monkeypatch.setattr(checkpointer_module.dcp, "save", wait_and_save)
    held = tensors(1.0)
    saver.save(1, held, {}, {})
    assert saver.report() is None, "the save waits in the background"
    for tensor in held.values():
        tensor.fill_(9.0)
    may_write.set()
    saver.finish()
    assert content(saver, newest(saver)) == 1.0


def test_a_save_is_reported_once_with_what_it_cost(world: World, tmp_path: Path) -> None:
    saver = Checkpointer(tmp_path, world, keep=3, keep_every=0)
    save(saver, 4)
    saver._executor.shutdown(wait=True)
    report = saver.report()
    assert report is not None
    size = sum(path.stat().st_size for path in newest(saver).path.glob("*.safetensors"))
    assert report.gib == pytest.approx(size / 2**30)
    assert report.step == 4
    assert report.stall > 0
    assert report.writing > 0
    assert saver.report() is None


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_was_waited_for_is_reported_too(world: World, tmp_path: Path, asynchronous: bool) -> None:
    saver = Checkpointer(tmp_path, world, keep=3, keep_every=0, asynchronous=asynchronous)
    for step in (4, 5):
        save(saver, step)
    saver.finish()
    reports = [saver.report(), saver.report()]
    assert [report.step for report in reports if report is not None] == [4, 5]
    assert saver.report() is None


def disk_full(_: Any, storage_writer: Any, **__: Any) -> None:
    Path(storage_writer.path, "half.safetensors").write_bytes(b"half")
    raise OSError(28, "No space left on device")


def test_a_failed_save_names_rank_and_cause_and_leaves_the_one_before(
    saver: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.keep = 1
    save(saver, 3)
    with monkeypatch.context() as patch:
        patch.setattr(checkpointer_module.dcp, "save", disk_full)
        with pytest.raises(
            SaveFailed, match="rank 0 could not write the checkpoint of step 4: No space left on device"
        ):
            save(saver, 4)
    assert saved_steps(tmp_path) == [3]
    save(saver, 4)
    assert content(saver, newest(saver)) == 4.0


def test_a_failed_asynchronous_save_is_noticed_without_waiting_and_raised_when_asked(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver = Checkpointer(tmp_path, world, keep=3, keep_every=0)
    monkeypatch.setattr(checkpointer_module.dcp, "save", disk_full)
    save(saver, 4)
    saver._executor.shutdown(wait=True)
    assert saver.failed()
    assert saver.report() is None
    with pytest.raises(SaveFailed, match="No space left"):
        saver.finish()


def lost_connection(*_: Any, **__: Any) -> None:
    raise RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:12345")


def test_a_rank_that_lost_another_does_not_blame_its_own_disk(
    saver: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pulses know who is gone; this one wrote what it had to."""
    monkeypatch.setattr(checkpointer_module.dcp, "save", lost_connection)
    with pytest.raises(RuntimeError, match="Connection closed by peer") as caught:
        save(saver, 4)
    assert not isinstance(caught.value, SaveFailed)
    assert is_loss_of_another(caught.value)


def test_an_old_checkpoint_goes_only_after_the_new_one_is_whole(
    saver: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.keep, seen = 1, []
    save(saver, 1)
    original = checkpointer_module.shutil.rmtree

    def look_and_delete(path: Path, **kwargs: Any) -> None:
        if path.is_dir():
            seen.append([damage(found) for found in list_checkpoints(tmp_path)])
        original(path, **kwargs)

    monkeypatch.setattr(checkpointer_module.shutil, "rmtree", look_and_delete)
    save(saver, 2)
    assert seen == [[[]]], "one whole checkpoint, the new one, while the old one is deleted"
    assert saved_steps(tmp_path) == [2]


def test_a_prune_that_was_interrupted_leaves_nothing_that_looks_whole(
    saver: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver.keep = 1
    save(saver, 1)

    def die(path: Path, **_: Any) -> None:
        if path.is_dir():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpointer_module.shutil, "rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        save(saver, 2)
    assert saved_steps(tmp_path) == [2]


# ---------------------------------------------------------------------------------------------------------------------
# What has become of it since


def shard(checkpoint: Path) -> Path:
    return next(checkpoint.glob("*.safetensors"))


def flip_a_bit(checkpoint: Path) -> None:
    data = bytearray(shard(checkpoint).read_bytes())
    data[-5] ^= 4
    shard(checkpoint).write_bytes(data)


def truncate(checkpoint: Path) -> None:
    os.truncate(shard(checkpoint), shard(checkpoint).stat().st_size - 1)


def change_the_state(checkpoint: Path) -> None:
    text = (checkpoint / "state.json").read_text()
    (checkpoint / "state.json").write_text(text.replace('"step": 3', '"step": 9'))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bit flipped": (flip_a_bit, r"safetensors does not hold what was written to it \(SHA-256 differs\)"),
    "truncated": (truncate, r"safetensors has \d+ bytes instead of \d+"),
    "file lost": (lambda path: shard(path).unlink(), "safetensors cannot be read"),
    "state changed": (change_the_state, "state.json does not hold"),
    "state lost": (lambda path: (path / "state.json").unlink(), "state.json cannot be read"),
    "manifest lost": (lambda path: (path / "manifest.json").unlink(), "manifest.json cannot be read"),
    "manifest cut": (lambda path: os.truncate(path / "manifest.json", 40), "manifest.json is not readable"),
    "file of others beside it": (
        lambda path: shutil.copy(shard(path), path / "zzz.safetensors"),
        "zzz.safetensors is no part of it",
    ),
    "manifest of another step": (
        lambda path: shutil.copy(path.parent / "step_00000002" / "manifest.json", path),
        "manifest.json is that of step 2",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    saver: Checkpointer, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    for step in (1, 2, 3):
        save(saver, step)
    path = tmp_path / "checkpoints" / "step_00000003"
    spoil, complaint = DAMAGES[kind]
    spoil(path)
    with pytest.raises(UserError, match=f"step_00000003 is damaged: .*{complaint}"):
        find_checkpoint(tmp_path, 3)
    with caplog.at_level(logging.WARNING):
        assert find_checkpoint(tmp_path).step == 2
        found = newest(saver)
    assert (found.step, content(saver, found)) == (2, 2.0)
    assert any("step_00000003 is damaged" in message for message in caplog.messages)
    assert saved_steps(tmp_path) == [1, 2], "what is damaged is set aside"
    assert path.with_name("step_00000003.damaged").is_dir()


def test_if_all_checkpoints_are_damaged_the_run_does_not_silently_begin_anew(
    saver: Checkpointer, tmp_path: Path
) -> None:
    for step in (1, 2):
        save(saver, step)
        flip_a_bit(tmp_path / "checkpoints" / f"step_{step:08d}")
    with pytest.raises(DamagedCheckpoints, match=r"no checkpoint of .* is whole"):
        saver.newest()
    assert saved_steps(tmp_path) == [1, 2], "nothing is renamed as long as there is nothing better"


def test_a_run_without_checkpoints_has_no_newest(saver: Checkpointer) -> None:
    assert saver.newest() is None


def test_what_was_left_half_written_is_neither_listed_nor_kept(saver: Checkpointer, tmp_path: Path) -> None:
    save(saver, 3)
    half = tmp_path / "checkpoints" / "step_00000004.life1.partial"
    shutil.copytree(tmp_path / "checkpoints" / "step_00000003", half)
    (half / "manifest.json").unlink()
    assert saved_steps(tmp_path) == [3]
    saver.sweep()
    assert not half.exists()


def test_what_lacked_only_its_name_is_kept(saver: Checkpointer, tmp_path: Path) -> None:
    """A crash between the last two renames of a save that replaces a checkpoint of the same step."""
    save(saver, 3)
    final = tmp_path / "checkpoints" / "step_00000003"
    final.rename(final.with_name("step_00000003.life1.partial"))
    saver.sweep()
    assert content(saver, newest(saver)) == 3.0


def test_what_nobody_here_wrote_is_not_swept(saver: Checkpointer, tmp_path: Path) -> None:
    save(saver, 3)
    foreign = tmp_path / "checkpoints" / "step_of_mine.partial"
    foreign.mkdir()
    saver.sweep()
    assert foreign.is_dir()
    assert saved_steps(tmp_path) == [3]


def test_another_format_is_refused_and_not_called_damaged(saver: Checkpointer, tmp_path: Path) -> None:
    save(saver, 1)
    path = tmp_path / "checkpoints" / "step_00000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(UserError, match="has checkpoint format 99; this version reads"):
        saver.newest()


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit


def test_missing_unexpected_and_misshapen_tensors_are_listed(saver: Checkpointer) -> None:
    saver.save(1, {**tensors(1.0), "old": torch.zeros(2)}, {}, {})
    needed = {**tensors(), "new": torch.zeros(2), "matrix": torch.zeros(4, 4)}
    with pytest.raises(UserError) as caught:
        saver.load(newest(saver), needed)
    message = str(caught.value)
    assert "missing (1): new" in message
    assert "unexpected (1): old" in message
    assert "matrix: (4, 3) saved, (4, 4) needed" in message
    assert len(message.splitlines()) <= 5
    assert not needed["row"].any(), "nothing may be loaded by halves"


def test_a_missing_tensor_alone_is_refused(saver: Checkpointer) -> None:
    saver.save(1, tensors(1.0), {}, {})
    with pytest.raises(UserError, match=r"missing \(1\): new"):
        saver.load(newest(saver), {**tensors(), "new": torch.zeros(2)})


@pytest.mark.parametrize("shape", [(2, 3), (4, 4), (12,), (3, 4)])
def test_a_tensor_of_another_shape_alone_is_refused(saver: Checkpointer, shape: tuple[int, ...]) -> None:
    saver.save(1, tensors(1.0), {}, {})
    needed = {**tensors(), "matrix": torch.zeros(shape)}
    with pytest.raises(UserError, match=r"other shape \(1\): matrix: \(4, 3\) saved"):
        saver.load(newest(saver), needed)
    assert not needed["matrix"].any()


def test_an_unexpected_tensor_alone_is_refused(saver: Checkpointer) -> None:
    saver.save(1, {**tensors(), "old": torch.zeros(2)}, {}, {})
    with pytest.raises(UserError, match=r"unexpected \(1\): old"):
        saver.load(newest(saver), tensors())


def test_a_checkpoint_that_cannot_be_read_after_all_ends_in_one_message(
    saver: Checkpointer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What torch raises then derives from BaseException: nobody would catch it."""
    save(saver, 1)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(dcp.HuggingFaceStorageReader, "read_data", fail)
    with pytest.raises(
        RunFailed, match=r"rank 0 could not read the checkpoint .*step_00000001: OSError: .*Input/output"
    ):
        saver.load(newest(saver), tensors())


def test_nothing_is_unpickled(saver: Checkpointer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the file in which torch's own format keeps a pickle."""
    save(saver, 1)
    (tmp_path / "checkpoints" / "step_00000001" / ".metadata").write_bytes(b"cos\nabort\n(tR.")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something is unpickled")

    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    assert content(saver, newest(saver)) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Two ranks


def save_and_lose_sight(run_dir: Path) -> list[str]:
    """Return the files that a manifest lists if each rank sees only its own, as on a network file system."""
    world = this_world()
    hidden = f"shard-0000{2 - world.rank}"
    original = Path.iterdir
    saver = Checkpointer(run_dir, world, keep=3, keep_every=0, asynchronous=False)
    Path.iterdir = lambda self: (path for path in original(self) if not path.name.startswith(hidden))  # type: ignore
    try:
        save_sharded(saver, 1)
    finally:
        Path.iterdir = original  # type: ignore[method-assign]
    return sorted(json.loads((run_dir / "checkpoints" / "step_00000001" / "manifest.json").read_text())["files"])


def save_sharded(saver: Checkpointer, step: int) -> None:
    mesh = init_device_mesh("cpu", (2,))
    saver.save(step, {"matrix": distribute_tensor(torch.full((4, 3), float(step)), mesh, [Shard(0)])}, {}, {})


def damage_what_rank_1_verifies(run_dir: Path) -> int:
    """Return the step that this rank takes for the newest whole one."""
    world = this_world()
    saver = Checkpointer(run_dir, world, keep=3, keep_every=0, asynchronous=False)
    for step in (1, 2):
        save_sharded(saver, step)
    if world.rank == 0:
        second = sorted((run_dir / "checkpoints" / "step_00000002").glob("*.safetensors"))[1]
        second.write_bytes(second.read_bytes()[:-1] + b"?")
    world.barrier()
    return newest(saver).step


def do_both(folder: Path) -> dict[str, Any]:
    return {"listed": save_and_lose_sight(folder / "sight"), "taken": damage_what_rank_1_verifies(folder / "damage")}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(do_both, 2, tmp_path_factory.mktemp("two_ranks"))


@pytest.mark.distributed
def test_a_manifest_lists_the_files_of_all_ranks_whoever_sees_them(two_ranks: list[dict[str, Any]]) -> None:
    listed = two_ranks[0]["listed"]
    assert len([name for name in listed if name.endswith(".safetensors")]) == 2
    assert "state.json" in listed


@pytest.mark.distributed
def test_what_one_rank_finds_damaged_no_rank_takes(two_ranks: list[dict[str, Any]]) -> None:
    assert [rank["taken"] for rank in two_ranks] == [1, 1]


# ---------------------------------------------------------------------------------------------------------------------
# Lives: an orphan of an earlier one cannot touch the run


def test_an_orphan_cannot_save_once_the_next_life_has_begun(world: World, tmp_path: Path) -> None:
    orphan = Checkpointer(tmp_path, world, 3, 0, asynchronous=False, life=begin_life(tmp_path, None))
    save(orphan, 1)
    successor = Checkpointer(tmp_path, world, 3, 0, asynchronous=False, life=begin_life(tmp_path, None))
    with pytest.raises(SaveFailed, match="life 2 has begun"):
        save(orphan, 2)
    assert saved_steps(tmp_path) == [1]
    save(successor, 2, value=22.0)
    assert content(successor, newest(successor)) == 22.0


def test_an_orphan_that_began_to_write_cannot_finish(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orphan = Checkpointer(tmp_path, world, 3, 0, asynchronous=False, life=begin_life(tmp_path, None))
    original = checkpointer_module.dcp.save

    def save_and_be_superseded(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        begin_life(tmp_path, None)
        return result

    monkeypatch.setattr(checkpointer_module.dcp, "save", save_and_be_superseded)
    with pytest.raises(SaveFailed, match="life 2 has begun"):
        save(orphan, 1)
    assert saved_steps(tmp_path) == []
