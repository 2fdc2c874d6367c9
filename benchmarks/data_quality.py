"""Whether both data paths train equally well: short runs with each, seed by seed, and the difference in k-NN.

    python benchmarks/data_quality.py --seeds 8
    python benchmarks/data_quality.py --seeds 8 --config configs/cifar10.yaml \\
        data.train=tar:cifar10-train.tar eval.test=tar:cifar10-test.tar data.workers=0 parallel.threads=1 \\
        crops.blur=paper crops.solarize=0.2 crops.local_number=2 model.dim=96 model.depth=3 train.duration=300it \\
        optim.warmup=30it checkpoint.every=0it eval.every=100% eval.max_train=5000

For each seed one run with ``crops.implementation=fast`` and one with ``reference``: the same first weights, images,
boxes and strengths. The difference is taken within each seed; its interval is Student's, 95 %. Runs stay in
``--output-dir``: the same command with more seeds adds to them, and an interrupted one is continued.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2_fsdp.errors import RunFailed, UserError, run_cli

ROOT = Path(__file__).resolve().parents[1]
PATHS = ("fast", "reference")
SHORT = (
    "data.train=scenes:n=2000,size=48", "data.workers=0", "crops.global_size=32", "crops.local_size=16",
    "crops.local_number=2", "model.dim=96", "model.depth=2", "train.duration=300it", "train.batch=64",
    "train.microbatch=64", "optim.warmup=30it", "checkpoint.every=0it", "eval.every=100%", "eval.max_train=2000",
    "eval.test=scenes:n=600,size=48,split=test", "eval.size=48", "eval.resize=48", "parallel.threads=1",
    "log.tensorboard=false",
)  # fmt: skip
"""What makes of configs/demo.yaml a run of two to three minutes on one core; overrides come after it."""

# Student's t: the quantile at .975 for 1, 2, … degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval(values: list[float]) -> tuple[float, float]:
    """Return the mean of the values and half the width of its 95 % confidence interval."""
    quantile = _STUDENT[len(values) - 2] if len(values) - 2 < len(_STUDENT) else 1.96
    return statistics.fmean(values), quantile * statistics.stdev(values) / math.sqrt(len(values))


def accuracy(folder: Path, key: str, settings: str) -> float | None:
    """Return a finished run's last k-NN accuracy, percent; None for a run that is not finished.

    Raises:
        UserError: the run had other settings, or no such k-NN.
    """
    metrics, finished = folder / "metrics.jsonl", folder / "finished"
    if not finished.exists() or not metrics.exists():
        return None
    if finished.read_text() != settings:
        raise UserError(f"{folder} is of other settings: {finished.read_text()}\n  choose another --output-dir")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [line[key] for line in lines if key in line and line["step"] > 0]
    if not found:
        raise UserError(f"{folder} has no {key} after its first step; is eval.every 0, or k not among eval.k?")
    return float(found[-1])


def train(folder: Path, config: str, seed: int, implementation: str, overrides: list[str], settings: str) -> None:
    """Train one run, or what is left of it, and note its settings when it is finished."""
    command = [
        sys.executable, "launchers/local.py", "--config", config, "--nproc", "1", "--output-dir", str(folder),
        *overrides, f"seed={seed}", f"crops.implementation={implementation}",
    ]  # fmt: skip
    result = subprocess.run(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if result.returncode:
        raise RunFailed(f"a run ended with code {result.returncode}: {' '.join(command)}\n{result.stderr[-2000:]}")
    (folder / "finished").write_text(settings)


def table(found: dict[str, list[float]]) -> str:
    """Return the accuracies and their differences as a Markdown table."""
    differences = [fast - slow for fast, slow in zip(found["fast"], found["reference"], strict=True)]
    rows = ["| k-NN, % | mean | standard deviation over seeds | each |", "|---|---:|---:|---|"]
    for name, values in (*found.items(), ("fast − reference", differences)):
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else "–"
        rows.append(f"| {name} | {statistics.fmean(values):.2f} | {spread} | {' '.join(f'{v:.1f}' for v in values)} |")
    if len(differences) > 1:
        mean, half = interval(differences)
        rows.append(f"\nfast − reference: {mean:+.2f} ± {half:.2f} points (95 %, {len(differences)} seeds)")
    return "\n".join(rows)


def main() -> None:
    """Train what is missing, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="YAML file of the runs (default: a short variant of configs/demo.yaml)")
    parser.add_argument("--seeds", type=int, default=5, help="how many (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--k", type=int, default=20, help="neighbours (default: %(default)s)")
    parser.add_argument("--output-dir", default="runs/data_quality", help="folder of the runs (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_intermixed_args()
    config, key = arguments.config or "configs/demo.yaml", f"eval/knn_{arguments.k}"
    overrides = [*(() if arguments.config else SHORT), *arguments.overrides]
    settings = " ".join([config, *overrides])
    found: dict[str, list[float]] = {name: [] for name in PATHS}
    for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
        for name in PATHS:
            folder = Path(arguments.output_dir).absolute() / f"seed{seed}_{name}"
            started = time.monotonic()
            if (percent := accuracy(folder, key, settings)) is None:
                train(folder, config, seed, name, overrides, settings)
                percent = accuracy(folder, key, settings)
                assert percent is not None
            found[name].append(percent)
            print(f"seed {seed}, {name}: {percent:.1f} % ({time.monotonic() - started:.0f} s)", flush=True)
    print(table(found))
    result: dict[str, Any] = {
        "command": ["python", *sys.orig_argv[1:]],
        "date": date.today().isoformat(),
        "config": config,
        "overrides": overrides,
        "accuracy": found,
    }
    Path(arguments.output_dir, "data_quality.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    run_cli(main)
