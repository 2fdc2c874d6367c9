#!/usr/bin/env python
"""Pretrain on this machine: its CPU, one GPU, or several.

    python launchers/local.py --config configs/debug.yaml
    python launchers/local.py --config configs/vits14.yaml --nproc 4 data.train=folder:/my/images

The same command continues an interrupted run. Every key of the config can be overridden by key=value;
--keys lists them. Works under torchrun too: torchrun --standalone --nproc-per-node 4 launchers/local.py --config …
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dinov2_fsdp.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_USER_ERROR,
    Parser,
    RunFailed,
    UserError,
    run_cli,
    show,
)
from dinov2_fsdp.memory import machine_memory
from dinov2_fsdp.parallel.place import (
    Place,
    available_cores,
    check_devices,
    place_from_environment,
    started_by_launcher,
    visible_gpus,
)

if TYPE_CHECKING:
    from dinov2_fsdp.config import Config
    from dinov2_fsdp.planner import Gpu

LOCK = ".lock"
"""File in a run directory that whoever trains there holds locked."""
GRACE = 10.0
"""Seconds that the other ranks get to end by themselves after one has failed."""
SECONDS_FOR_FIRST = 3.0
"""How long a machine's first rank may take to say what is wrong before its other ranks say it too."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="launchers/local.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file; without one, all defaults")
    parser.add_argument("--nproc", type=int, help="processes on this machine; by default one per GPU, or one")
    parser.add_argument("--output-dir", help="run directory (short for output_dir=…)")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the run that is in the directory and start anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, start nothing")
    parser.add_argument(
        "--gpu", help="with --dry-run: plan for so many (--nproc) of these, as H200 or GIB,TFLOPS, present or not"
    )
    parser.add_argument("--keys", action="store_true", help="list every key of the config with its default")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    try:
        return _main()
    except UserError:
        # Under torchrun all ranks find the same mistake, and the first that ends ends the others.
        if place_from_environment().local_rank > 0:
            time.sleep(SECONDS_FOR_FIRST)
        raise


def _main() -> int:
    arguments = parse()
    if arguments.keys:
        return _print_keys()
    from dinov2_fsdp.config import load, microbatches_per_rank

    config = load(arguments.config, arguments.overrides)
    if arguments.output_dir:
        config = dataclasses.replace(config, output_dir=str(Path(arguments.output_dir).expanduser()))
    gpus, started, place = visible_gpus(), started_by_launcher(), place_from_environment()
    if started and arguments.overwrite:
        raise UserError(f"--overwrite: torchrun may start a run twice; delete {config.output_dir} yourself")
    default = max(1, 0 if config.parallel.device == "cpu" else gpus)
    processes = place.world_size if started else default if arguments.nproc is None else arguments.nproc
    if processes < 1:
        raise UserError(f"--nproc {processes} is impossible; valid: 1 or more")
    gpu = _planned_gpu(arguments)
    here = place.local_world_size if started else processes
    kind = "cuda" if gpu else check_devices(config.parallel.device, here, gpus)
    microbatches_per_rank(config, processes)
    _check_parallel(config, processes, kind)
    with contextlib.ExitStack() as held:
        # Where there are other ranks already, they wait for this one when they meet.
        if place.rank == 0:
            images = check_data(config)
            if arguments.dry_run:
                from dinov2_fsdp.planner import plan

                if gpu is None:  # else it is a plan for other machines
                    check_start(config, arguments.overwrite)
                    check_run_directory(config, arguments.overwrite, look_only=True)
                memory = None if kind == "cuda" else machine_memory() / here
                print(plan(config, processes, kind, images, gpu, memory))
            elif place.launcher is None:
                check_start(config, arguments.overwrite)
                check_run_directory(config, arguments.overwrite)
                if place.life is None:
                    held.enter_context(_lock(Path(config.output_dir)))
        if arguments.dry_run:
            return 0
        if started or processes == 1:
            return _work(config)
        return _start_processes(processes, config.parallel.threads)


def _planned_gpu(arguments: argparse.Namespace) -> Gpu | None:
    if arguments.gpu is None:
        return None
    if not arguments.dry_run:
        raise UserError(f"--gpu {arguments.gpu} is what a plan is for; add --dry-run")
    from dinov2_fsdp.planner import gpu_of

    return gpu_of(arguments.gpu)


def _print_keys() -> int:
    from dinov2_fsdp.config import describe_keys

    for key, kind, default, text in describe_keys():
        print(f"{key}={default}\n    {kind}. {text}")
    return 0


def check_data(config: Config) -> int:
    from dinov2_fsdp.data.sources import open_source
    from dinov2_fsdp.timetable import lengths, schedules
    from eval.online import check_evaluations

    images = len(open_source(config.data.train, config.data.cache))
    if config.train.batch > images:
        fitting = images // config.train.microbatch * config.train.microbatch
        way_out = f"train.batch={fitting} or less" if fitting else f"train.batch={images} train.microbatch={images}"
        raise UserError(
            f"train.batch={config.train.batch} is larger than the data set: {config.data.train} holds {images} "
            f"images; use {way_out}"
        )
    length = lengths(config, images)
    schedules(config, length)
    check_evaluations(config)
    return images


def check_start(config: Config, overwrite: bool = False) -> None:
    """Refuse a backbone to start from that is not there or of another model; a run that goes on needs none."""
    from dinov2_fsdp.checkpoint.folder import list_checkpoints

    check_start_apart(config, overwrite)
    if config.init.backbone is None or (not overwrite and list_checkpoints(Path(config.output_dir))):
        return
    from dinov2_fsdp.weights.initial import check_backbone

    check_backbone(config.init.backbone, config.model)


def check_start_apart(config: Config, overwrite: bool) -> None:
    """Refuse to overwrite what the run is to start from."""
    start, directory = config.init.backbone, Path(config.output_dir).resolve()
    if overwrite and start is not None and directory in (Path(start).resolve(), *Path(start).resolve().parents):
        raise UserError(
            f"init.backbone={start} lies in {directory}, which --overwrite would delete; choose another --output-dir"
        )


def check_run_directory(config: Config, overwrite: bool, look_only: bool = False) -> None:
    """Refuse a directory with something else in it; a directory with this very run is one to resume.

    ``look_only``: change nothing.
    """
    from dinov2_fsdp.config import load

    directory = Path(config.output_dir)
    saved = directory / "config.yaml"
    # A directory of something else may hold a config.yaml too; only a run has logs beside it.
    if overwrite and saved.is_file() and (directory / "logs").is_dir():
        if look_only:
            return
        _lock(directory).close()
        shutil.rmtree(directory)
    content = {path.name for path in directory.iterdir()} - {LOCK} if directory.is_dir() else set()
    if content and not saved.is_file() and not (directory / "logs").is_dir():
        raise UserError(f"{directory} is not empty and holds no run; choose another output_dir")
    if saved.is_file() and (found := differences(load(saved), config)):
        raise UserError(
            f"{directory} holds another run, which differs in {', '.join(found[:6])}\n"
            f"resume it: --config {saved}; start anew: --overwrite; or choose another --output-dir"
        )
    if look_only:
        there = next(path for path in (directory.absolute(), *directory.absolute().parents) if path.exists())
        if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"output_dir={directory} cannot be written: {there} is no directory that can be written to")
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".writable").touch()
        (directory / ".writable").unlink()
    except OSError as error:
        raise UserError(f"output_dir={directory} cannot be written: {error.strerror}") from None


def _check_parallel(config: Config, processes: int, kind: str) -> None:
    replicate, attention = config.parallel.replicate, config.parallel.attention
    if processes % replicate:
        valid = [n for n in range(1, processes + 1) if processes % n == 0]
        raise UserError(f"parallel.replicate={replicate} does not divide {processes} processes; valid: {valid}")
    if kind != "cuda" and attention in ("xformers", "varlen"):
        raise UserError(f"parallel.attention={attention} runs on CUDA only; use auto, math or sdpa on {kind}")


def _lock(directory: Path) -> TextIO:
    """Return an open file that keeps other launchers out of the directory until this process ends.

    Jobs of a scheduler have the number of their life instead: one that is cut off from the others could hold a lock
    for ever.
    """
    file = (directory / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.seek(0)
        raise UserError(
            f"{directory} is in use: {file.read().strip() or 'another process'} trains there\n"
            "wait for it, stop it, or choose another --output-dir"
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file


def differences(old: Config, new: Config) -> list[str]:
    """Return the keys in which two configs describe different runs; where and how fast it runs may change."""
    from dinov2_fsdp.config import describe_keys

    free = (
        "output_dir", "parallel.", "data.workers", "data.prefetch", "data.cache", "data.max_bad_images",
        "data.allow_change", "train.max_nonfinite", "log.", "checkpoint.", "eval.",
    )  # fmt: skip
    numerical = ("parallel.reduce_precision", "parallel.heads_precision")
    keys = [key for key, *_ in describe_keys() if key in numerical or not key.startswith(free)]

    def value(config: Any, key: str) -> Any:
        for part in key.split("."):
            config = getattr(config, part)
        return config

    return [f"{key} ({value(old, key)} there)" for key in keys if value(old, key) != value(new, key)]


def _work(config: Config) -> int:
    """Be one process of the run and return its exit code."""
    from dinov2_fsdp.train import train
    from eval.online import online_evaluations

    try:
        return 0 if train(config, online_evaluations()) else EXIT_INTERRUPTED
    except (UserError, RunFailed) as error:
        code = show(error)
    # A thread that waits for a rank that is gone would keep a failed process alive.
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)


def _start_processes(count: int, threads: int) -> int:
    """Start one process per rank and wait; when one fails, end the others and say which one it was."""
    address, port = "127.0.0.1", _free_port()
    cores = threads or max(1, available_cores() // count)
    children = []
    for rank in range(count):
        place = Place(rank, count, rank, count, launcher=os.getpid()).to_environment(address, port)
        environment = {**os.environ, **place, "OMP_NUM_THREADS": str(cores)}
        command = [sys.executable, *(argument for argument in sys.argv if argument != "--overwrite")]
        children.append(subprocess.Popen(command, env=environment, preexec_fn=end_with_parent))

    def forward(number: int, _frame: object) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    # A terminal sends Ctrl-C to the ranks as well; the launcher waits for them.
    signal.signal(signal.SIGINT, signal.SIG_IGN if sys.stdin and sys.stdin.isatty() else forward)
    while all(child.poll() in (None, 0, EXIT_INTERRUPTED) for child in children):
        if all(child.poll() is not None for child in children):
            return max(child.returncode for child in children)
        time.sleep(0.1)
    return _end_after_failure(children)


def end_with_parent() -> None:
    """Let the kernel send SIGTERM to this process when its launcher dies, so that the ranks save and end (Linux)."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _end_after_failure(children: list[subprocess.Popen[bytes]]) -> int:
    """End the other ranks after one has failed; say which one, unless its process has said it by itself."""
    failed = [(rank, child.returncode) for rank, child in enumerate(children) if child.poll()]
    killed = [(rank, code) for rank, code in failed if code < 0]
    # A rank that a signal ended could say nothing, and the others have nothing to add.
    deadline = time.monotonic() + (0 if killed else GRACE)
    while time.monotonic() < deadline and any(child.poll() is None for child in children):
        time.sleep(0.1)
    for child in children:
        if child.poll() is None:
            child.kill()
            child.wait()
    if killed:
        rank, code = killed[0]
        name = signal.Signals(-code).name
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"error: rank {rank} was ended by {name}{hint}; its log is logs/rank_{rank}.log", file=sys.stderr)
        return EXIT_FAILED
    return EXIT_USER_ERROR if any(code == EXIT_USER_ERROR for _, code in failed) else EXIT_FAILED


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    run_cli(main)
