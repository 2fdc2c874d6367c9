"""How fast the trainer is with the recipes, and with what changes it: microbatch, compilation, attention, and so on.

    python benchmarks/recipes.py                                         # each recipe as it stands
    python benchmarks/recipes.py --config configs/vitg14.yaml --microbatch 16 32 --compile on --attention sdpa varlen

Each run is the trainer's own, in a process of its own, on this machine's one device, with made-up images, one
microbatch a step. One thing at a time differs from the recipe's own values; with ``--all`` every combination runs.

    img/s       of the second half of the steps, with everything that a run does between them
    TFLOP/s     useful operations (``dinov2_fsdp.counts``), so without what is computed again
    limit       what the step's matrix products reach when each is repeated by itself (``products.py``)
    warm-up     how much longer the first half took; with compilation, mostly that
    waiting     share of the second half in which the device had no data to work on

A run that fails, does not fit or takes too long is a row with its reason. Rows appear as their runs end.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.attention import parse
from benchmarks.step import products
from dinov2_fsdp.config import Config, load
from dinov2_fsdp.counts import step_flops_per_image
from dinov2_fsdp.errors import RunFailed, UserError, run_cli
from dinov2_fsdp.monitor.clock import PHASES
from dinov2_fsdp.parallel.place import available_cores

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ("vitl16_in1k", "vitg14", "vits14", "vitb14", "vitl14")
"""Those with a goal first, in case time runs out."""
GOALS = {"vitl16_in1k": 340.0, "vitg14": 75.0}
"""Images a second, on one H200."""
GOAL_FRACTION = 0.5
"""Of the limit, for the same recipes."""
KEYS = {
    "microbatch": "train.microbatch",
    "compile": "parallel.compile",
    "checkpointing": "parallel.activation_checkpointing",
    "attention": "parallel.attention",
    "colours": "crops.colours",
}
"""What may vary, and the key of the config."""
SWITCH = {"off": "false", "on": "true"}
IMAGES = 1024
"""Made-up images; drawing one takes long, so that workers keep those they have drawn."""
STEPS = "1Mit"
"""Longer than any warm-up; no run gets that far."""
LOOK = 0.1
"""Seconds between two looks at a run's metrics."""

Variation = dict[str, str]
Row = dict[str, Any]


def own_values(config: Config) -> Variation:
    """Return a recipe's own value of everything that may vary."""
    return {
        "microbatch": str(config.train.microbatch),
        "compile": "on" if config.parallel.compile else "off",
        "checkpointing": config.parallel.activation_checkpointing,
        "attention": config.parallel.attention,
        "colours": config.crops.colours,
    }


def variations(own: Variation, asked: dict[str, list[str]], every: bool) -> list[Variation]:
    """Return what to run, a recipe's own values first: then one of the values asked for at a time, or all of them."""
    if every:
        values = [asked.get(name) or [own[name]] for name in own]
        others: Iterable[Variation] = (dict(zip(own, found, strict=True)) for found in itertools.product(*values))
    else:
        others = ({**own, name: value} for name in own for value in asked.get(name, ()))
    found = [own]
    found += [other for other in others if other != own]
    return [one for number, one in enumerate(found) if one not in found[:number]]


def overrides_of(variation: Variation) -> list[str]:
    """Return a variation as overrides of the config: one microbatch is the whole batch."""
    chosen = [f"{KEYS[name]}={SWITCH.get(value, value)}" for name, value in variation.items()]
    return [*chosen, f"train.batch={variation['microbatch']}"]


# -- a run ------------------------------------------------------------------------------------------------------------


def trained(config: str, steps: int, overrides: list[str], limit: float) -> dict[str, Any]:
    """Run the trainer until it has done so many steps; return metrics of both halves of them, and its environment.

    It is then killed: a run that ends saves, which takes a large model longer than its steps.

    Raises:
        RunFailed: it ended by itself, or took longer than ``limit`` seconds; the message is the last of its own.
    """
    with tempfile.TemporaryDirectory() as folder, open(f"{folder}/errors", "w+") as errors:
        run = Path(folder, "run")
        command = [
            sys.executable, str(ROOT / "launchers" / "local.py"), "--config", config, "--output-dir", str(run),
            "--nproc", "1", f"train.duration={STEPS}", f"log.every={steps // 2}it", "log.tensorboard=false",
            "eval.every=0it", "checkpoint.every=0it", *overrides,
        ]  # fmt: skip
        # What an earlier run has compiled would be taken from the cache; and a killed run leaves its files behind.
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled", "TMPDIR": folder}
        deadline = time.monotonic() + limit
        # Not in a session of its own: whoever ends this process's group has to end the run too.
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors, env=environment)
        try:
            while len(lines := _lines(run / "metrics.jsonl")) < 2:
                if process.poll() is not None:
                    errors.seek(0)
                    raise RunFailed(cause(errors.read(), process.returncode))
                if time.monotonic() > deadline:
                    raise RunFailed(f"had not done {steps} steps in {limit:.0f} s")
                time.sleep(LOOK)
            return {"lines": lines[:2], "environment": json.loads((run / "environment.json").read_text())}
        finally:
            # Data workers would notice only seconds later, and meanwhile disturb whatever is measured next.
            children = _children(process.pid) if process.poll() is None else []
            process.kill()
            process.wait()
            for child in children:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started, as far as the system tells (Linux)."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in file.read_text().split()]
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    with contextlib.suppress(FileNotFoundError):
        whole = path.read_bytes().rpartition(b"\n")[0]
        return [line for text in whole.splitlines() if "img_per_s" in (line := json.loads(text))]
    return []


def cause(errors: str, code: int) -> str:
    """Return why a run ended: its last line that is called an error, else its last line."""
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    named = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    text = (named or lines or ["it said nothing"])[-1].partition("; the traceback is in")[0]
    return f"{text[:300]} (code {code})"


def figures(run: dict[str, Any], images: int, flops_per_image: float, steps: int) -> Row:
    """Return what the metrics of a run's two halves say, of ``steps`` steps and ``images`` a step together."""
    first, second = run["lines"]
    environment = run["environment"]
    seconds = [steps / 2 * images / line["img_per_s"] for line in (first, second)]
    return {
        "img_per_s": second["img_per_s"],
        "tflops": flops_per_image * second["img_per_s"] / 1e12,
        "memory_gib": second["memory"],
        "warm_up_s": seconds[0] - seconds[1],
        "data_wait": second["data_wait"],
        "phases_s": {phase: second.get(f"time/{phase}", 0.0) for phase in PHASES},
        "attention_taken": environment["attention"],
        "device": (environment["devices"] or [environment["cpu"]])[0],
        "torch": environment["torch"],
    }


def limit_of(config: str, overrides: list[str]) -> float | None:
    """Return the TFLOP/s of a step's matrix products, each by itself; None where they cannot be measured."""
    try:
        found = products(config, overrides)
    except subprocess.CalledProcessError as error:
        print(f"the limit could not be measured: products.py ended with code {error.returncode}", file=sys.stderr)
        return None
    return float(found["flops"] / found["seconds"] / 1e12)


def goals(recipe: str, row: Row) -> str:
    """Return whether a row reaches its recipe's goals, nothing for a recipe without."""
    if recipe not in GOALS or row.get("reason"):
        return ""
    rate = "yes" if row["img_per_s"] >= GOALS[recipe] else "no"
    fraction = row.get("fraction")
    share = "unknown" if fraction is None else "yes" if fraction >= GOAL_FRACTION else "no"
    return f"{GOALS[recipe]:.0f} img/s: {rate}; {100 * GOAL_FRACTION:.0f} % of the limit: {share}"


# -- the table --------------------------------------------------------------------------------------------------------

FIGURES = ("img/s", "TFLOP/s", "of the limit", "peak, GiB", "warm-up, s", "waiting", "goals for one H200")


def head() -> str:
    """Return the first two lines of the Markdown table."""
    titles = ["recipe", *KEYS, *FIGURES]
    return f"| {' | '.join(titles)} |\n|{'---|' * (1 + len(KEYS))}{'---:|' * (len(FIGURES) - 1)}---|"


def line_of(row: Row) -> str:
    """Return a row of the Markdown table; a reason stands where the figures would."""
    chosen = dict(row["variation"])
    if row.get("attention_taken", chosen["attention"]) != chosen["attention"]:
        chosen["attention"] += f" ({row['attention_taken']})"
    if row.get("reason"):
        cells = [row["reason"].replace("|", "/"), *[""] * (len(FIGURES) - 1)]
    else:
        fraction = row.get("fraction")
        cells = [
            f"{row['img_per_s']:,.1f}",
            f"{row['tflops']:,.3g}",
            "–" if fraction is None else f"{100 * fraction:.0f} %",
            f"{row['memory_gib']:.1f}",
            f"{row['warm_up_s']:.1f}",
            f"{100 * row['data_wait']:.0f} %",
            goals(row["recipe"], row),
        ]
    return f"| {' | '.join([row['recipe'], *chosen.values(), *cells])} |"


def in_turn(of_recipes: list[list[tuple[str, Variation]]]) -> Iterator[tuple[str, Variation]]:
    """Yield the first of every recipe, then the second of every recipe, and so on, as time may run out."""
    for several in itertools.zip_longest(*of_recipes):
        yield from (one for one in several if one is not None)


def measure_all(
    runs: Iterable[tuple[str, Variation]], measure: Callable[[str, Variation], Row], seconds: float
) -> Iterator[Row]:
    """Yield the row of each (config, variation); after so many seconds no run starts, and rows say so."""
    deadline = time.monotonic() + seconds
    for config, variation in runs:
        row: Row = {"recipe": Path(config).stem, "variation": variation}
        if time.monotonic() >= deadline:
            yield {**row, "reason": f"not run: the {seconds:.0f} s were over"}
            continue
        try:
            yield {**row, **measure(config, variation)}
        except (RunFailed, UserError) as error:
            yield {**row, "reason": str(error).splitlines()[0]}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/recipes.py", description="The trainer's speed with recipes.")
    parser.add_argument("--config", nargs="+", default=[str(ROOT / "configs" / f"{name}.yaml") for name in RECIPES])
    parser.add_argument("--microbatch", type=int, nargs="+", default=[], metavar="IMAGES")
    parser.add_argument("--compile", nargs="+", default=[], choices=["off", "on"])
    parser.add_argument("--checkpointing", nargs="+", default=[], choices=["none", "selective", "full"])
    parser.add_argument("--attention", nargs="+", default=[], choices=["auto", "math", "sdpa", "xformers", "varlen"])
    parser.add_argument("--colours", nargs="+", default=[], choices=["worker", "device"])
    parser.add_argument("--all", action="store_true", help="every combination instead of one change at a time")
    parser.add_argument("--steps", type=int, default=24, help="of each run, an even number (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no run after so long")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one run may take (%(default)s)")
    parser.add_argument("--workers", type=int, default=max(1, available_cores() - 1), help="data workers (%(default)s)")
    parser.add_argument("--json", help="write all figures here, after every run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parse(parser)
    if arguments.steps < 2 or arguments.steps % 2:
        raise UserError(f"--steps {arguments.steps} has no two halves; use 2, 4, 6, …")
    asked = {name: [str(value) for value in getattr(arguments, name)] for name in KEYS}
    common = [f"data.train=scenes:n={IMAGES}", f"data.workers={arguments.workers}", *arguments.overrides]
    limits: dict[tuple[str, str], float | None] = {}

    def measure(config: str, variation: Variation) -> Row:
        chosen = [*common, *overrides_of(variation)]
        # Here too, so that a wrong value has its message without a process.
        flops = step_flops_per_image(load(config, chosen))
        run = trained(config, arguments.steps, chosen, arguments.limit)
        row = figures(run, int(variation["microbatch"]), flops, arguments.steps)
        key = (config, variation["microbatch"])
        if key not in limits:
            own = own_values(load(config, arguments.overrides))
            limits[key] = limit_of(config, [*common, *overrides_of({**own, "microbatch": variation["microbatch"]})])
        limit = limits[key]
        return {**row, "limit_tflops": limit, "fraction": None if limit is None else row["tflops"] / limit}

    of_recipes = [
        [(config, one) for one in variations(own_values(load(config, arguments.overrides)), asked, arguments.all)]
        for config in arguments.config
    ]
    rows: list[Row] = []
    print(head(), flush=True)
    for row in measure_all(in_turn(of_recipes), measure, arguments.seconds):
        rows.append(row)
        print(line_of(row), flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(rows, indent=2) + "\n")
    machine = next((f"{row['device']}, torch {row['torch']}; " for row in rows if "device" in row), "")
    print(f"\n{machine}{arguments.steps} steps a run")
    return 0 if any(not row.get("reason") for row in rows) else 1


if __name__ == "__main__":
    run_cli(main)
