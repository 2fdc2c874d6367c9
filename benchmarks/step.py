"""How fast a training step is, and how far from the limit: the numbers of docs/performance.md.

    python benchmarks/step.py                    # `make bench`
    python benchmarks/step.py --config configs/vits14.yaml --steps 20 data.train=folder:/my/images

For each precision, in turn and several times over, the matrix products of the step are timed by themselves
(``products.py``) and the trainer runs for a few steps; the best round of each counts. LightlyTrain's step comes in turn
with ours where it is installed (``peer_step.py``), and the data path has a table of its own (``data_path.py``). The
same on a CPU and on a GPU.

    limit       operations a second of the step's own matrix products, each repeated by itself
    fraction    useful operations of a step / its time / limit; the wait for data is left out and reported beside
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.attention import parse
from benchmarks.peer_step import peer
from dinov2_fsdp.config import load
from dinov2_fsdp.errors import run_cli
from dinov2_fsdp.monitor.clock import PHASES

ROOT = Path(__file__).resolve().parent.parent
DROPPED = 0.4
"""The stochastic depth whose saving is measured, against none."""


def products(config: str, overrides: list[str]) -> dict[str, Any]:
    """Return what ``products.py`` prints for a config."""
    command = [sys.executable, str(ROOT / "benchmarks" / "products.py"), "--config", config, "--rounds", "1"]
    done = subprocess.run([*command, *overrides], check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def trained(config: str, steps: int, overrides: list[str]) -> dict[str, Any]:
    """Run the trainer for so many steps and return its steps' times and its peak memory, GiB.

    Raises:
        SystemExit: the run failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "launchers" / "local.py"), "--config", config, "--output-dir", f"{folder}/run",
            "--nproc", "1", f"train.duration={steps}it", "log.every=1it", "log.tensorboard=false", "eval.every=0it",
            *overrides,
        ]  # fmt: skip
        # What an earlier run has compiled would be taken from the cache.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
        if code := subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=False).returncode:
            raise SystemExit(code)
        text = Path(folder, "run", "metrics.jsonl").read_text()
        machine = json.loads(Path(folder, "run", "environment.json").read_text())
    lines = [json.loads(line) for line in text.splitlines()]
    of_steps = [line for line in lines if "img_per_s" in line]
    saves = [line for line in lines if "checkpoint/stall_s" in line]
    return {
        "environment": machine,
        "lines": of_steps,
        "seconds": [_own_seconds(line) for line in of_steps],
        "stall": [line["checkpoint/stall_s"] for line in saves],
        "memory": of_steps[-1]["memory"],
    }


def data_path(config: str, images: str | None, overrides: list[str], lightly: bool) -> tuple[dict[str, Any], str]:
    """Return what ``data_path.py`` finds for a config's crops and its table; its own images unless others are named.

    Raises:
        SystemExit: it failed.
    """
    print("data path …", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "benchmarks" / "data_path.py"), "--config", config,
            "--images", images or load(config, overrides).data.train, "--rounds", "3", "--torchvision",
            "--json", f"{folder}/data.json", *(["--lightly"] if lightly else []), *overrides,
        ]  # fmt: skip
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.returncode)
        return dict(json.loads(Path(folder, "data.json").read_text())), done.stdout.strip()


def _own_seconds(line: dict[str, float]) -> float:
    return sum(line.get(f"time/{phase}", 0.0) for phase in PHASES if phase != "data")


def fastest(runs: list[dict[str, Any]], settled: int) -> dict[str, float]:
    """Return the line of metrics of the fastest step, without the first ``settled`` ones of each run."""
    lines = [line for run in runs for line in run["lines"][settled:]]
    best: dict[str, float] = min(lines, key=_own_seconds)
    return best


def measure(
    config: str, precision: str, rounds: int, steps: int, overrides: list[str], lightly: str | None
) -> dict[str, Any]:
    """Return all figures of one precision; ``lightly``: the interpreter that has LightlyTrain, if it is to run too."""
    wanted = [f"train.precision={precision}", *overrides]
    asked, settled, no_save = load(config, wanted), steps // 2, "checkpoint.every=0it"
    limits, peers = [], []
    # Runs by their stochastic depth: as asked for; and those that its own rows compare.
    runs: dict[float, list[dict[str, Any]]] = {asked.model.drop_path: [], 0.0: [], DROPPED: []}
    for number in range(rounds):
        print(f"{precision}, round {number + 1} of {rounds} …", file=sys.stderr, flush=True)
        limits.append(products(config, wanted))
        for drop, done in runs.items():
            done.append(trained(config, steps, [*wanted, f"model.drop_path={drop}", no_save]))
        if lightly is not None:
            peers.append(peer(asked, steps, lightly))
    some, plain = limits[0], runs[asked.model.drop_path]
    rate = max(limit["flops"] / limit["seconds"] for limit in limits)
    # The products are those of one microbatch.
    images, flops = (some[key] * (asked.train.batch // some["images"]) for key in ("images", "flops"))
    best = fastest(plain, settled)
    seconds = _own_seconds(best)
    print(f"{precision}, saves and compiled blocks …", file=sys.stderr, flush=True)
    student = [products(config, [*wanted, f"model.drop_path={drop}"])["student_flops"] for drop in (0.0, DROPPED)]
    # Runs of their own: a save that goes on beside the next steps takes their time. The last one ends with its run.
    every = max(1, settled)
    stalls = trained(config, 5 * every + 1, [*wanted, f"checkpoint.every={every}it"])["stall"][1:]
    compiled = {
        drop: [trained(config, steps, [*wanted, "parallel.compile=true", f"model.drop_path={drop}", no_save])]
        for drop in runs
    }
    of_compiled = compiled[asked.model.drop_path][0]
    in_all = [run["lines"][-1]["seconds"] - run["lines"][settled - 1]["seconds"] for run in plain]
    own = [sum(run["seconds"][settled:]) + sum(_data(line) for line in run["lines"][settled:]) for run in plain]
    return {
        "precision": precision,
        "environment": plain[0]["environment"],
        "threads": some["threads"],
        "images": images,
        "gflop_per_image": flops / images / 1e9,
        "limit_gflop_per_s": rate / 1e9,
        "square_gflop_per_s": max(limit["square_flops_per_s"] for limit in limits) / 1e9,
        "not_counted": some["not_counted"],
        "step_s": seconds,
        "img_per_s": images / seconds,
        "fraction": flops / seconds / rate,
        "phases_s": {phase: best.get(f"time/{phase}", 0.0) for phase in PHASES},
        "data_s": median(_data(line) for run in plain for line in run["lines"][settled:]),
        "memory_gib": min(run["memory"] for run in plain),
        "logging_and_the_rest_s": min(a - b for a, b in zip(in_all, own, strict=True)) / (steps - settled),
        "stall_s": median(stalls) if stalls else None,
        "drop_path": {
            "saved_time": _saved(runs, settled),
            "saved_time_compiled": _saved(compiled, settled),
            "saved_operations": 1 - student[1] / student[0],
        },
        "compile": {
            "first_step_s": of_compiled["seconds"][0],
            "step_s": _own_seconds(fastest([of_compiled], settled)),
            "memory_gib": of_compiled["memory"],
        },
        "lightly_train": {
            "version": peers[0]["version"],
            "step_s": min(second for run in peers for second in run["seconds"][settled:]),
            "memory_gib": min(run["memory"] for run in peers),
        }
        if peers
        else None,
    }


def _saved(runs: dict[float, list[dict[str, Any]]], settled: int) -> float:
    """Return the share of the student's time, forward and backward, that stochastic depth saves."""
    whole, less = (
        min(line["time/student"] + line["time/backward"] for run in runs[drop] for line in run["lines"][settled:])
        for drop in (0.0, DROPPED)
    )
    return float(1 - less / whole)


def _data(line: dict[str, float]) -> float:
    return line.get("time/data", 0.0)


def table(results: list[dict[str, Any]]) -> str:
    """Return the figures as a Markdown table, a column for each precision."""
    rows: list[tuple[str, list[str]]] = [
        ("limit: the step's own matrix products, GFLOP/s", [f"{r['limit_gflop_per_s']:,.0f}" for r in results]),
        ("one large square product, GFLOP/s", [f"{r['square_gflop_per_s']:,.0f}" for r in results]),
        ("useful operations, GFLOP an image", [f"{r['gflop_per_image']:,.1f}" for r in results]),
        *(
            [("not counted in them", [", ".join(r["not_counted"]) or "–" for r in results])]
            if any(r["not_counted"] for r in results)
            else []
        ),
        ("step, s", [f"{r['step_s']:.3f}" for r in results]),
        ("images a second", [f"{r['img_per_s']:.2f}" for r in results]),
        ("**fraction of the limit**", [f"**{100 * r['fraction']:.0f} %**" for r in results]),
        *(
            (f"… {phase}, s", [f"{r['phases_s'][phase]:.3f}" for r in results])
            for phase in PHASES
            if phase != "data" and any(r["phases_s"][phase] for r in results)
        ),
        ("data beside it, s a step", [f"{r['data_s']:.3f}" for r in results]),
        ("a line of metrics and all else, s", [f"{r['logging_and_the_rest_s']:.4f}" for r in results]),
        (
            "stall of an asynchronous save, s",
            ["–" if r["stall_s"] is None else f"{r['stall_s']:.4f}" for r in results],
        ),
        ("peak memory, GiB", [f"{r['memory_gib']:.2f}" for r in results]),
        (
            f"stochastic depth {DROPPED}: operations of the student saved",
            [f"{100 * r['drop_path']['saved_operations']:.1f} %" for r in results],
        ),
        ("… time of the student saved", [f"{100 * r['drop_path']['saved_time']:.1f} %" for r in results]),
        ("… compiled", [f"{100 * r['drop_path']['saved_time_compiled']:.1f} %" for r in results]),
        ("compiled: first step, s", [f"{r['compile']['first_step_s']:.1f}" for r in results]),
        ("… step, s", [f"{r['compile']['step_s']:.3f}" for r in results]),
        ("… peak memory, GiB", [f"{r['compile']['memory_gib']:.2f}" for r in results]),
    ]
    if all(r["lightly_train"] for r in results):
        rows += [
            ("LightlyTrain's step, s", [f"{r['lightly_train']['step_s']:.3f}" for r in results]),
            ("… over ours", [f"{r['lightly_train']['step_s'] / r['step_s']:.2f} ×" for r in results]),
            ("… peak memory, GiB", [f"{r['lightly_train']['memory_gib']:.2f}" for r in results]),
        ]
    head = f"| | {' | '.join(r['precision'] for r in results)} |\n|---|{'---|' * len(results)}"
    return "\n".join([head, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/step.py", description="Speed of a training step, and its limit.")
    parser.add_argument("--config", default=str(ROOT / "configs" / "bench.yaml"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="of each run; the first half is not counted")
    parser.add_argument(
        "--lightly", default="auto", metavar="PYTHON",
        help="interpreter that has lightly-train, whose step is timed in turn with ours; 'none': leave it out "
        "(default: this one, if it has it)",
    )  # fmt: skip
    parser.add_argument("--images", help="of the data path (default: the config's): tar:PATH, folder:PATH, …")
    parser.add_argument("--output", default="runs/bench.json", help="where all figures go")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parse(parser)
    # First, so that what is wrong with the config or the images shows at once.
    for precision in arguments.precision:
        load(arguments.config, [f"train.precision={precision}", *arguments.overrides])
    lightly = None if arguments.lightly == "none" else arguments.lightly
    if lightly == "auto":
        lightly = sys.executable if importlib.util.find_spec("lightly_train") else None
    of_data, data_table = data_path(arguments.config, arguments.images, arguments.overrides, lightly == sys.executable)
    output = Path(arguments.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for precision in arguments.precision:
        done = measure(arguments.config, precision, arguments.rounds, arguments.steps, arguments.overrides, lightly)
        results.append(done)
        # After each, as what comes next takes long and may fail.
        figures = {"date": date.today().isoformat(), "results": results, "data_path": of_data}
        output.write_text(json.dumps(figures, indent=2) + "\n")
        machine = done["environment"]
        print(
            f"{date.today()}, {', '.join(machine['devices'] or [machine['cpu']])}, {done['threads']} thread(s), "
            f"torch {machine['torch']}, compiled code: {machine['compiled']}, batch {done['images']}; "
            f"all figures: {output}\n"
        )
        print(table(results), flush=True)
    print(f"\n{data_table}")
    return 0


if __name__ == "__main__":
    run_cli(main)
