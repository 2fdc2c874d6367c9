"""What many ranks hold and send, and how a step's time grows with them: the section "Scale" of docs/performance.md.

    python benchmarks/scale.py trace --config configs/vitg14.yaml --ranks 128 data.train=scenes:n=4000
    python benchmarks/scale.py measure --ranks 2
    python benchmarks/scale.py weak --ranks 1 2 4

trace     the plan's formulas against a whole step of rank 0, the other ranks being made up; takes no memory
measure   the same for a small model, and both against the step on real ranks of this machine
weak      the trainer with as many images per rank on more and more ranks: seconds a step, and the share of waiting
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
from ledger import Ledger, Page, record_step, trace_step

from dinov2_fsdp.config import Config, load
from dinov2_fsdp.errors import Parser, UserError, run_cli
from dinov2_fsdp.footprint import footprint
from dinov2_fsdp.models import frugal
from dinov2_fsdp.parallel.place import Place, place_from_environment
from dinov2_fsdp.parallel.world import end_world, start_world
from dinov2_fsdp.ssl import losses
from dinov2_fsdp.train import train
from dinov2_fsdp.units import state_shares, traffic

ROOT = Path(__file__).resolve().parent.parent
SMALL = [
    "crops.global_size=112", "crops.local_size=56", "model.dim=192", "model.heads=3", "model.depth=12",
    "dino_head.prototypes=8192", "ibot_head.prototypes=8192", "model.drop_path=0.1", "train.precision=fp32",
    "parallel.device=cpu", "parallel.threads=1",
]  # fmt: skip
"""A model for one core: 2.7 M parameters in its backbone, a gigabyte or so in a step of eight images."""
GATHERING = ("FSDP::all_gather", "FSDP::post_backward_reduce", "FSDP::all_gather_copy_out")
"""What FSDP calls the parts of a step in which it waits for other ranks."""
MIB = 2**20

Rows = list[tuple[str, float, float]]


def compare_memory(config: Config, ranks: int, kind: str, pages: list[Page]) -> Rows:
    """Return (kind, formula, traced) in bytes; states and gradients where they are most, the rest at the peak."""
    names = {"student": "weights", "AdamW": "optimizer", "LARS": "optimizer"}
    predicted = {names.get(name, name): size for name, size in state_shares(config, ranks).items()}
    held, peak = footprint(config, ranks, kind), max(pages, key=lambda page: page.total)
    rows = [
        (name, predicted[name], max(page.kinds.get(name, 0) for page in pages))
        for name in ("weights", "gradients", "optimizer", "teacher")
    ]
    for name, size, filed in (
        ("whole gradients", held.gradients, ["whole gradients", "gradients"]),
        ("gathered weights", held.gathered, ["gathered"]),
        ("activations, crops", held.activations, ["activations", "crops"]),
        ("logits, targets", held.logits, ["logits"]),
        ("working memory", held.working, ["working"]),
    ):
        rows.append((name, size, sum(peak.kinds.get(key, 0) for key in filed)))
    return [*rows, ("peak of all", held.total, peak.total)]


def compare_traffic(config: Config, ranks: int, ledger: Ledger) -> Rows:
    """Return (collective, formula, traced) in bytes that one rank receives in a step."""
    predicted = traffic(config, ranks)
    return [
        (name, predicted.get(name, 0.0), ledger.received.get(name, 0.0))
        for name in sorted(predicted.keys() | ledger.received.keys())
    ]


def table(head: list[str], rows: list[tuple[Any, ...]]) -> str:
    """Return a Markdown table of a name, figures in MiB, and the ratio of the last two."""
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for name, *figures in rows:
        ratio = f"{figures[-2] / figures[-1]:.3f}" if figures[-1] else "–"
        lines.append(f"| {name} | " + " | ".join(f"{f / MIB:,.2f}" for f in figures) + f" | {ratio} |")
    return "\n".join(lines)


def as_on(kind: str, config: Config) -> Config:
    """Return the config with the attention of a kind of device, and let the layers do as there: none is at hand."""
    if kind == "cpu":
        return config
    # What a CPU does a few rows at a time a GPU does at once.
    frugal.CACHED_ROWS = sys.maxsize
    losses.CHUNK["cpu"] = losses.CHUNK[kind]
    if config.parallel.attention == "auto":
        return replace(config, parallel=replace(config.parallel, attention="sdpa"))
    return config


def trace(arguments: argparse.Namespace) -> None:
    config = as_on(arguments.kind, load(arguments.config, arguments.overrides))
    ledger = trace_step(config, arguments.ranks)
    rows = compare_memory(config, arguments.ranks, arguments.kind, ledger.pages())
    moved = compare_traffic(config, arguments.ranks, ledger)
    if arguments.json:
        print(json.dumps({"memory": rows, "traffic": moved}))
        return
    print(table(["held by rank 0, MiB", "formula", "trace", "formula / trace"], rows))
    print()
    print(table(["received in a step, MiB", "formula", "trace", "formula / trace"], moved))


def measure(arguments: argparse.Namespace) -> None:
    settings = [*SMALL, f"train.batch={16 * arguments.ranks}", "train.microbatch=16", *arguments.overrides]
    config = load(arguments.config, settings)
    found = on_ranks("record", arguments.config, settings, arguments.ranks)
    traced = trace_step(config, arguments.ranks)
    pages = [Page(phase, kinds) for phase, kinds in found["pages"]]
    rows = compare_memory(config, arguments.ranks, "cpu", traced.pages())
    real = compare_memory(config, arguments.ranks, "cpu", pages)
    print(
        table(
            ["held by rank 0, MiB", "formula", "trace", "real", "trace / real"],
            [(*row, other[2]) for row, other in zip(rows, real, strict=True)],
        )
    )
    print()
    moved = compare_traffic(config, arguments.ranks, traced)
    print(
        table(
            ["received in a step, MiB", "formula", "trace", "real", "trace / real"],
            [(*row, found["received"].get(row[0], 0.0)) for row in moved],
        )
    )


def weak(arguments: argparse.Namespace) -> None:
    print(
        "| ranks | prefetch | s a step | waiting for others, s | share | … gathering | … reducing | transfer alone, s |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for ranks in arguments.ranks:
        alone = "–"
        for prefetch in arguments.prefetch if ranks > 1 else arguments.prefetch[:1]:
            settings = [
                *SMALL, f"train.batch={arguments.images * ranks}", f"train.microbatch={arguments.images}",
                f"train.duration={arguments.steps}it", f"parallel.prefetch={prefetch}", "log.every=1it",
                "log.tensorboard=false", "checkpoint.every=0it", "eval.every=0it", *arguments.overrides,
            ]  # fmt: skip
            if ranks > 1 and alone == "–":
                alone = f"{on_ranks('record', arguments.config, settings, ranks)['transfer_s']:.3f}"
            steps = on_ranks("train", arguments.config, settings, ranks)["steps"]
            # The first steps allocate; of the others the fastest was disturbed least.
            best = min(steps[2:], key=lambda step: step["seconds"])
            waiting = best["gathering"] + best["reducing"]
            print(
                f"| {ranks} | {prefetch} | {best['seconds']:.3f} | {waiting:.3f} | {waiting / best['seconds']:.1%} | "
                f"{best['gathering']:.3f} | {best['reducing']:.3f} | {alone} |",
                flush=True,
            )


def on_ranks(job: str, config: str, settings: list[str], ranks: int) -> dict[str, Any]:
    """Return what rank 0 of so many processes prints as JSON.

    Raises:
        SystemExit: a rank failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "rank", "--config", config, job, f"output_dir={folder}/run", *settings]
        processes = [
            subprocess.Popen(
                command,
                env={
                    **os.environ,
                    "KINETO_LOG_LEVEL": "99",
                    **Place(rank, ranks, rank, ranks).to_environment("127.0.0.1", port),
                },
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            text, _ = processes[0].communicate()
            codes = [process.wait() for process in processes]
        finally:
            for process in processes:
                process.kill()
    if any(codes):
        raise SystemExit(f"exit codes of the ranks: {codes}")
    return dict(json.loads(text.splitlines()[-1]))


def rank(arguments: argparse.Namespace) -> None:
    config, place = load(arguments.config, arguments.overrides), place_from_environment()
    found = _record(config, place) if arguments.job == "record" else _train(config)
    if place.rank == 0:
        print(json.dumps(found))


def _record(config: Config, place: Place) -> dict[str, Any]:
    world = start_world(config.parallel, place)
    try:
        record_step(config, world)  # loads libraries, which are no part of a step
        ledger = record_step(config, world)
        pages = [(page.phase, page.kinds) for page in ledger.pages()]
        seconds = min(transfer(ledger.collectives) for _ in range(5))
        return {"pages": pages, "received": ledger.received, "transfer_s": seconds}
    finally:
        end_world()


def transfer(collectives: list[tuple[str, int]]) -> float:
    """Return the seconds that collectives of these kinds and sizes take one after the other, and nothing else."""
    ranks = dist.get_world_size()
    wholes = [torch.ones(-(-size // 4 // ranks) * ranks) for _, size in collectives]
    parts = [torch.ones(len(whole) // ranks) for whole in wholes]
    # Their newer names are not in the oldest torch that the project runs with.
    warnings.filterwarnings("ignore", message=".*is deprecated", category=FutureWarning)
    dist.barrier()
    start = time.perf_counter()
    for (kind, _), whole, part in zip(collectives, wholes, parts, strict=True):
        if kind == "all-gather":
            dist.all_gather_into_tensor(whole, part)
        elif kind == "reduce-scatter":
            dist.reduce_scatter_tensor(part, whole)
        else:
            dist.all_reduce(whole)
    return time.perf_counter() - start


def _train(config: Config) -> dict[str, Any]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        train(config, console=False)
    events = profile.profiler.kineto_results.events()
    return {"steps": waits(sorted(((e.name(), e.start_ns(), e.duration_ns()) for e in events), key=lambda e: e[1]))}


def waits(events: list[tuple[str, int, int]]) -> list[dict[str, float]]:
    """Return of each step: ``seconds``, and of them those that FSDP waits for other ranks' parts.

    A step ends where its optimizer's does. What FSDP spends on gathering and reducing, without the operations that this
    rank computes in it (copies, casts), is waiting.

    Args:
        events: (name, start, duration in ns) by start, of one thread.
    """
    ends = [start + length for name, start, length in events if name.startswith("Optimizer.step")]
    steps = [{"seconds": (end - start) / 1e9, "gathering": 0.0, "reducing": 0.0} for start, end in pairwise(ends)]
    until, part, number = 0, "", 0
    computed = 0
    for name, start, length in events:
        while number < len(steps) and start >= ends[number + 1]:
            number += 1
        if start < ends[0] or number >= len(steps):
            continue
        if name.startswith(GATHERING) and start >= until:
            until, part = start + length, "reducing" if "reduce" in name else "gathering"
            steps[number][part] += length / 1e9
            computed = start
        elif name.startswith("aten::") and computed <= start < until:
            steps[number][part] -= length / 1e9
            computed = start + length
    return steps


def main() -> int:
    parser = Parser(prog="benchmarks/scale.py", description="Memory, traffic and time of many ranks.")
    commands = parser.add_subparsers(required=True)
    bench = str(ROOT / "configs" / "bench.yaml")

    def command(function: Any, text: str, config: str | None = bench) -> argparse.ArgumentParser:
        made = commands.add_parser(function.__name__, help=text, description=text)
        made.set_defaults(function=function)
        if function is rank:
            made.add_argument("job", choices=["record", "train"])
        made.add_argument("--config", default=config, required=config is None)
        made.add_argument("overrides", nargs="*", metavar="key=value")
        return made

    tracing = command(trace, "formulas against a traced step", None)
    tracing.add_argument("--ranks", type=int, required=True)
    tracing.add_argument("--kind", choices=["cpu", "cuda"], default="cuda", help="device that the formulas are for")
    tracing.add_argument("--json", action="store_true", help="figures in bytes instead of tables")
    measuring = command(measure, "formulas and a traced step against a real one")
    measuring.add_argument("--ranks", type=int, default=2)
    scaling = command(weak, "a step's time on more and more ranks")
    scaling.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    scaling.add_argument("--prefetch", type=int, nargs="+", default=[1, 3], help="values of parallel.prefetch")
    scaling.add_argument("--images", type=int, default=8, help="of one rank in a step")
    scaling.add_argument("--steps", type=int, default=8)
    command(rank, "one process of the others (they start it)", None)
    arguments = parser.parse_args()
    if arguments.function in (trace, measure) and arguments.ranks < 2:
        raise UserError(f"--ranks {arguments.ranks}: a rank alone gathers nothing; use 2 or more")
    arguments.function(arguments)
    return 0


if __name__ == "__main__":
    run_cli(main)
