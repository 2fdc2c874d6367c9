"""What the loader holds in memory over many images, and what a tar gives from a cold cache.

    python benchmarks/data_memory.py flat --images tar:cifar10-train.tar --config configs/cifar10.yaml
    python benchmarks/data_memory.py index --listed 2000000
    python benchmarks/data_memory.py cold --images tar:imagenet-sample.tar

``flat`` runs the loader and looks at its processes from time to time. ``index`` does so with a long listing of few
images and with a short one. ``cold`` reads a tar with its pages dropped from the page cache, and again without.
Memory is proportional (PSS: a page shared by three processes counts a third in each) and private, in MiB; Linux only.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from dinov2_fsdp.config import Config, load
from dinov2_fsdp.data.loader import build_loader
from dinov2_fsdp.data.sources import Source, TarSource, open_source
from dinov2_fsdp.data.sources.listing import Listing, Strings
from dinov2_fsdp.errors import UserError, run_cli

DISTINCT = 64
"""Images in the tar that a long listing lists over and over."""


def memory(pid: int) -> dict[str, float]:
    """Return a process's proportional and private memory, MiB; ``anonymous`` is the former without files."""
    found: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split()[:2]
        found[name.rstrip(":")] = int(value)
    private = found["Private_Clean"] + found["Private_Dirty"]
    return {"PSS": found["Pss"] / 1024, "anonymous": found["Pss_Anon"] / 1024, "private": private / 1024}


def row(label: str) -> str:
    """Return a line of a table with the memory of this process and the mean over its workers."""
    workers = [memory(child.pid) for child in multiprocessing.active_children() if child.pid]
    parent = memory(os.getpid())
    cells = [f"{parent[key]:.1f}" for key in ("PSS", "anonymous")]
    cells += [f"{np.mean([worker[key] for worker in workers]):.1f}" for key in ("PSS", "anonymous", "private")]
    return f"| {label} | " + " | ".join(cells) + " |"


def header(first: str) -> str:
    """Return the head of the table that :func:`row` fills."""
    cells = (first, "parent: PSS", "anonymous", "each worker: PSS", "anonymous", "private")
    return "| " + " | ".join(cells) + " |\n|" + "---:|" * len(cells)


def steps_for(config: Config, images: int) -> int:
    """Return the steps that so many images take."""
    return -(-images // config.train.batch)


def run_loader(config: Config, source: Source, images: int) -> Iterator[int]:
    """Load so many images and say after every step how many there were."""
    per_rank = config.train.batch // config.train.microbatch
    loader = build_loader(config, source, 0, steps_for(config, images), 0, per_rank, pin=False)
    for number, batch in enumerate(loader, 1):
        if number % per_rank == 0:
            yield number * batch.images


def flat(config: Config, count: int, points: int) -> None:
    """Print memory at equal distances over ``count`` images, and first after a hundredth of them."""
    source = open_source(config.data.train, config.data.cache)
    due = [count // 100, *[count * point // points for point in range(1, points + 1)]]
    print(header("images"))
    started = time.monotonic()
    for images in run_loader(config, source, count):
        if due and images >= due[0]:
            print(row(f"{images:,}"), flush=True)
            due = [point for point in due if point > images]
    print(f"\n{count / (time.monotonic() - started):.0f} img/s, {config.data.workers} workers")


def write_listing(path: Path, entries: int) -> None:
    """Write a listing with ``entries`` entries for the photographs of a small tar, written beside it."""
    tar, pictures = path.with_suffix(".tar"), np.random.default_rng(0)
    with tarfile.open(tar, "w") as archive:
        for number in range(DISTINCT):
            buffer = io.BytesIO()
            Image.fromarray(pictures.integers(0, 256, (8, 8, 3), np.uint8)).resize((64, 64)).save(buffer, "JPEG")
            info = tarfile.TarInfo(f"{number:08d}.jpg")
            info.size = buffer.tell()
            archive.addfile(info, io.BytesIO(buffer.getvalue()))
    few = open_source(f"tar:{tar}", path.parent / "cache")
    assert isinstance(few, TarSource)
    arrays, repeated = few.listing.arrays, np.arange(entries) % DISTINCT
    Listing.build(
        root=few.listing.root,
        started_ns=few.listing.started_ns,
        names=Strings.pack(f"n{number % 1000:08d}/image_{number:08d}.jpg".encode() for number in range(entries)),
        classes=[f"n{number:08d}".encode() for number in range(1000)],
        labels=(np.arange(entries) % 1000).astype(np.int32),
        watched=few.listing.strings("watched"),
        stamps=arrays["stamps"],
        extra={key: arrays[key][repeated] for key in ("shard", "offset", "size")},
    ).save(path)


def index(config: Config, entries: int, count: int) -> None:
    """Print memory after ``count`` images of a short and of a long listing."""
    print(header("listed images"))
    with tempfile.TemporaryDirectory() as folder:
        for listed in (DISTINCT, entries):
            path = Path(folder, f"{listed}.listing")
            # In a process of its own, so that no memory of the writing is left in the one that is measured.
            writer = multiprocessing.Process(target=write_listing, args=(path, listed))
            writer.start()
            writer.join()
            source = TarSource("tar:few.tar", Listing.load(path))
            for images in run_loader(config, source, count + config.train.batch * config.data.workers):
                if images >= count:
                    print(row(f"{listed:,}"), flush=True)
                    break
        print(f"\nthe long listing is a file of {path.stat().st_size / 2**20:.0f} MiB")


def drop(paths: list[str]) -> None:
    """Drop a file's pages from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_from_disk() -> int:
    """Return the bytes that this process and those it waited for had to fetch from a disk."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(dict(line.split(": ") for line in lines)["read_bytes"])


def cold(config: Config, count: int, rounds: int) -> None:
    """Print images a second from a tar, read only and as crops, with and without its pages in the page cache."""
    source = open_source(config.data.train, config.data.cache)
    if not isinstance(source, TarSource):
        raise UserError(f"cold wants images in tars (tar:PATH), got {config.data.train}")
    shards = source.listing.strings("watched")
    paths = [os.fsdecode(shards[number]) for number in range(len(shards))]
    count = min(count, len(source))
    order = np.random.default_rng(0).permutation(len(source))[:count].tolist()
    alone = replace(config, data=replace(config.data, workers=0))
    print("| | cold, img/s | warm, img/s | cold, MiB from disk | warm |\n|---|---:|---:|---:|---:|")
    cases = {
        "read in any order, one process": lambda: sum(len(source.encoded(number)) for number in order),
        "crops, in one process": lambda: sum(1 for _ in run_loader(alone, source, count)),
        f"crops, {config.data.workers} workers": lambda: sum(1 for _ in run_loader(config, source, count)),
    }
    for name, run in cases.items():
        best, fetched = {True: float("inf"), False: float("inf")}, {}
        for _ in range(rounds):
            for is_cold in (True, False):
                if is_cold:
                    drop(paths)
                before, started = read_from_disk(), time.monotonic()
                run()
                best[is_cold] = min(best[is_cold], time.monotonic() - started)
                fetched[is_cold] = (read_from_disk() - before) / 2**20
        images = count if name.startswith("read") else steps_for(config, count) * config.train.batch
        rates = [f"{images / best[is_cold]:,.0f}" for is_cold in (True, False)]
        print(f"| {name} | {rates[0]} | {rates[1]} | {fetched[True]:.1f} | {fetched[False]:.1f} |", flush=True)


def main() -> None:
    """Measure one of the three and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("flat", "index", "cold"))
    parser.add_argument("--images", help="as data.train: tar:PATH, folder:PATH, … (flat, cold)")
    parser.add_argument("--config", help="whose crops and batch; by default the framework's")
    parser.add_argument("--count", type=int, help="images (default: flat 100,000, index 20,000, cold 300)")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    parser.add_argument("--points", type=int, default=10, help="of flat's table (default: %(default)s)")
    parser.add_argument("--listed", type=int, default=2_000_000, help="images that index lists (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of cold, the best counts (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(1)
    if arguments.what != "index" and not arguments.images:
        raise UserError(f"{arguments.what} needs --images, such as tar:PATH")
    small = ["crops.global_size=28", "crops.local_size=14"] if arguments.what == "index" else []
    workers = f"data.workers={arguments.workers}"
    images = [f"data.train={arguments.images}"] if arguments.images else []
    config = load(
        arguments.config,
        [*images, *small, "train.batch=20", "train.microbatch=20", *arguments.overrides, workers],
    )
    if arguments.what == "flat":
        flat(config, arguments.count or 100_000, arguments.points)
    elif arguments.what == "index":
        index(config, arguments.listed, arguments.count or 20_000)
    else:
        cold(config, arguments.count or 300, arguments.rounds)


if __name__ == "__main__":
    run_cli(main)
