from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_files import Open, age, encode, grow, names, pack_images, values

from dinov2_fsdp.data.sources import Source, open_source
from dinov2_fsdp.data.sources.listing import Listing, Progress, default_cache_dir
from dinov2_fsdp.errors import UserError


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def opened(cache: Path) -> Open:
    return lambda spec: open_source(spec, cache)


# --------------------------------------------------------------------------------------------------- the listing cache


def count_listings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The returned list grows by one with every listing that is made rather than taken from the cache."""
    made: list[int] = []
    build: Callable[..., Listing] = Listing.build

    def counting(**facts: Any) -> Listing:
        made.append(1)
        return build(**facts)

    monkeypatch.setattr(Listing, "build", counting)
    return made


def test_an_unchanged_folder_is_listed_once(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_listings(monkeypatch)
    root = grow(tmp_path / "images", "a/0.png", "b/0.png")
    first, second = opened(f"folder:{root}"), opened(f"folder:{root}")
    assert len(made) == 1
    assert (names(first), first.classes, first.fingerprint) == (names(second), second.classes, second.fingerprint)


def test_a_file_added_deep_in_the_tree_is_seen(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a/b/0.png", "c/0.png")
    opened(f"folder:{root}")
    (root / "a/b/1.png").write_bytes(encode(9))
    source = opened(f"folder:{root}")
    assert values(source) == [0, 9, 1]


def test_a_file_removed_is_seen(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a/0.png", "c/0.png", "c/1.png")
    opened(f"folder:{root}")
    (root / "c/0.png").unlink()
    assert values(opened(f"folder:{root}")) == [0, 2]


def test_a_file_added_behind_a_link_is_seen(opened: Open, tmp_path: Path) -> None:
    outside = grow(tmp_path / "outside", "x.png")
    root = grow(tmp_path / "images", "a/0.png")
    (root / "link").symlink_to(outside)
    age(root)
    assert len(opened(f"folder:{root}")) == 2
    (outside / "y.png").write_bytes(encode())
    assert len(opened(f"folder:{root}")) == 3


def test_a_change_in_the_same_clock_tick_as_the_listing_is_seen(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "a.png")
    now = time.time_ns()
    os.utime(root, ns=(now, now))
    opened(f"folder:{root}")
    (root / "b.png").write_bytes(encode(1))
    os.utime(root, ns=(now, now))
    assert len(opened(f"folder:{root}")) == 2


def test_a_rewritten_tar_is_seen(opened: Open, tmp_path: Path) -> None:
    path = pack_images(tmp_path / "a.tar", "a.png")
    age(tmp_path)
    opened(f"tar:{path}")
    pack_images(path, "a.png", "b.png")
    assert len(opened(f"tar:{path}")) == 2


def test_an_unchanged_tar_is_scanned_once(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = count_listings(monkeypatch)
    path = pack_images(tmp_path / "tars" / "a.tar", "a.png")
    age(tmp_path / "tars")
    assert values(opened(f"tar:{path}")) == values(opened(f"tar:{path}")) == [0]
    assert len(made) == 1


def cache_file(cache: Path) -> Path:
    (path,) = cache.iterdir()
    return path


@pytest.mark.parametrize("damage", ["cut", "other", "empty", "header"])
def test_a_damaged_cache_file_is_listed_anew(opened: Open, tmp_path: Path, cache: Path, damage: str) -> None:
    root = grow(tmp_path / "images", "a/0.png", "b/0.png")
    opened(f"folder:{root}")
    whole = cache_file(cache).read_bytes()
    broken = {"cut": whole[:-1], "other": b"x" * len(whole), "empty": b"", "header": whole[:30] + b"\0" + whole[31:]}
    cache_file(cache).write_bytes(broken[damage])
    assert len(opened(f"folder:{root}")) == 2
    assert cache_file(cache).read_bytes()[:8] == whole[:8]


def test_the_cache_leaves_no_temporary_files(opened: Open, tmp_path: Path, cache: Path) -> None:
    opened(f"folder:{grow(tmp_path / 'images', 'a.png')}")
    assert cache_file(cache).suffix == ".listing"


def test_without_a_writable_cache_the_source_works_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = grow(tmp_path / "images", "a.png")
    (tmp_path / "file").write_text("a file where the cache should be")
    source = open_source(f"folder:{root}", tmp_path / "file" / "cache")
    assert values(source) == [0]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(tmp_path / "file" / "cache") in caplog.text
    assert values(pickle.loads(pickle.dumps(source))) == [0]
    assert len(caplog.records) == 1


def test_the_default_cache_is_in_the_users_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_cache_dir() == tmp_path / "xdg/dinov2_fsdp/listings"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache/dinov2_fsdp/listings"


def _open_and_read(spec: str, cache: Path, results: multiprocessing.Queue) -> None:
    results.put(values(open_source(spec, cache)))


def test_several_processes_may_list_at_the_same_time(tmp_path: Path, cache: Path) -> None:
    root = grow(tmp_path / "images", *(f"{i}.png" for i in range(10)))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_open_and_read, args=(f"folder:{root}", cache, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=20) for _ in processes] == [list(range(10))] * 4
    for process in processes:
        process.join()
    assert cache_file(cache).suffix == ".listing"


def test_a_long_listing_reports_progress(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    Progress("folder:/x", "directories", interval=0).update(1234, 5)
    Progress("folder:/x", "directories", interval=60).update(9999, 5)
    assert "1,234 images in 5 directories" in caplog.text
    assert "9,999" not in caplog.text


# ------------------------------------------------------------------------------------------------------------ pickling


def _read_elsewhere(source: Source, results: multiprocessing.Queue) -> None:
    results.put((values(source), names(source), None if source.labels is None else source.labels.tolist()))


def read_in_another_process(source: Source, method: str) -> tuple[list[int], list[str], list[int] | None]:
    context: Any = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_read_elsewhere, args=(source, results))
    process.start()
    try:
        return results.get(timeout=30)
    finally:
        process.join()


@pytest.mark.parametrize("kind", ["folder", "tar", "scenes"])
def test_a_source_reads_the_same_in_a_spawned_process(opened: Open, tmp_path: Path, kind: str) -> None:
    grow(tmp_path / "images", "a/0.png", "b/0.png")
    pack_images(tmp_path / "a.tar", "a/0.png", "b/0.png")
    places = {"folder": f"folder:{tmp_path}/images", "tar": f"tar:{tmp_path}/a.tar", "scenes": "scenes:n=2,size=16"}
    source = opened(places[kind])
    assert source.labels is not None
    assert read_in_another_process(source, "spawn") == (values(source), names(source), source.labels.tolist())


def test_a_tar_that_is_already_open_reads_the_same_in_a_forked_process(opened: Open, tmp_path: Path) -> None:
    source = opened(f"tar:{pack_images(tmp_path / 'a.tar', *(f'{i}.png' for i in range(20)))}")
    expected = values(source)
    assert read_in_another_process(source, "fork")[0] == expected == values(source)


@pytest.mark.parametrize("kind", ["folder", "tar"])
def test_a_pickled_source_is_small_however_much_it_lists(opened: Open, tmp_path: Path, kind: str) -> None:
    files = [f"class_{i % 7}/{i:050}.png" for i in range(500)]
    grow(tmp_path / "images", *files)
    for shard in range(40):
        pack_images(tmp_path / f"shard-{shard:03}.tar", *files[shard::40])
    source = opened(f"folder:{tmp_path}/images" if kind == "folder" else f"tar:{tmp_path}/shard-{{000..039}}.tar")
    assert len(source) == 500
    assert len(pickle.dumps(source)) < 2000


def test_unpickling_does_not_list_again(opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = opened(f"folder:{grow(tmp_path / 'images', 'a.png')}")
    pickled = pickle.dumps(source)
    made = count_listings(monkeypatch)
    assert names(pickle.loads(pickled)) == names(source)
    assert not made


def test_unpickling_gives_the_images_of_the_pickling_process_even_when_the_folder_changed(
    opened: Open, tmp_path: Path
) -> None:
    root = grow(tmp_path / "images", "b.png")
    pickled = pickle.dumps(opened(f"folder:{root}"))
    (root / "a.png").write_bytes(encode())
    assert names(pickle.loads(pickled)) == [str(root / "b.png")]


def test_unpickling_other_images_than_were_pickled_is_refused(opened: Open, tmp_path: Path) -> None:
    root = grow(tmp_path / "images", "b.png")
    pickled = pickle.dumps(opened(f"folder:{root}"))
    (root / "a.png").write_bytes(encode())
    opened(f"folder:{root}")
    with pytest.raises(UserError, match="added, removed or renamed"):
        pickle.loads(pickled)


def test_the_fingerprint_depends_on_what_is_listed_not_on_where(opened: Open, tmp_path: Path) -> None:
    here = opened(f"folder:{grow(tmp_path / 'here', 'a/0.png', 'b/0.png')}")
    there = opened(f"folder:{grow(tmp_path / 'there', 'a/0.png', 'b/0.png')}")
    other = opened(f"folder:{grow(tmp_path / 'other', 'a/0.png', 'b/1.png')}")
    assert here.fingerprint == there.fingerprint != other.fingerprint
