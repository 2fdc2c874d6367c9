"""All tasks on a run's newest checkpoint and on its untrained twin: the numbers of docs/evaluation.md.

python benchmarks/evaluations.py --run runs/NAME --camvid DIR/camvid.tar [--cifar DIR] [--dry-run]

Data beside the run's own: CamVid as ``images/SPLIT`` and ``annotations/SPLIT``; CIFAR-10 as ``cifar10-train.tar`` and
``cifar10-test.tar`` in one folder. What is there already is measured anew. The last lines are the table, in Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCENES = ("scenes:n=4000", "scenes:n=1000,split=test")


def commands(run: Path, camvid: Path | None, cifar: Path | None) -> list[list[str]]:
    """Return one command for each task, data set and backbone, sized for two CPU cores."""
    labelled = [SCENES]
    if cifar is not None:
        labelled.append((f"tar:{cifar}/cifar10-train.tar", f"tar:{cifar}/cifar10-test.tar"))
    dense = [(SCENES, ["--train-batch", "16", "--iterations", "1000"])]
    if camvid is not None:
        sizes = ["--classes", "11", "--first-class", "0", "--void", "11", "--short-side", "360", "--crop", "240"]
        sizes += ["--stride", "160", "--iterations", "400", "--warmup", "50", "--train-batch", "8"]
        dense.append(((f"tar:{camvid}#train", f"tar:{camvid}#test"), sizes))
    found = []
    for twin in ([], ["--untrained"]):
        for train, test in labelled:
            data = ["--train", train, "--test", test]
            found.append(["eval/knn.py", *data, "--max-train", "10000", *twin])
            heads = ["--no-augment", "--epoch-length", "0", "--epochs", "30", "--train-batch", "256"]
            found.append(["eval/linear.py", *data, *heads, "--max-train", "10000", *twin])
            found.append(["eval/logistic.py", *data, "--max-train", "5000", *twin])
            retrieval = ["--gallery", train, "--queries", test, "--max-train", "10000", "--max-test", "1000"]
            found.append(["eval/retrieval.py", *retrieval, *twin])
        for (train, test), more in dense:
            found.append(["eval/segmentation.py", "--train", train, "--test", test, *more, *twin])
            ratios = ["--multi-scale", *more, "--ratios", "1", "1.32"]
            found.append(["eval/segmentation.py", "--train", train, "--test", test, *_own_crop(ratios, train), *twin])
        data = ["--train", SCENES[0], "--test", SCENES[1]]
        found.append(["eval/depth.py", *data, *twin])
        found.append(["eval/depth.py", *data, "--layers", "4", *twin])
    return [[command[0], "--weights", str(run), *command[1:]] for command in found]


def _own_crop(words: list[str], train: str) -> list[str]:
    """Return the flags of +ms with the sizes of rendered scenes, whose images are smaller than the published crops."""
    return [*words, "--crop", "64", "--stride", "64", "--short-side", "64"] if train.startswith("scenes:") else words


def table(run: Path) -> str:
    """Return a Markdown table of all results of a run: value, time and peak memory by task, data and backbone."""
    lines = [
        "| task | test data | backbone | step | metric | value | seconds | peak GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for file in sorted((run / "eval").glob("step_*/*/results.json")):
        r = json.loads(file.read_text())
        if "metric" not in r or r["value"] is None:
            continue
        test = r["data"]["test"]
        test = test if test.startswith("scenes:") else Path(test.partition(":")[2]).name
        cells = (
            r["task"],
            test,
            r["backbone"],
            r["step"],
            r["metric"],
            f"{r['value']:.4g}",
            r["seconds"],
            r.get("peak_memory_gib", ""),
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/evaluations.py", description="All tasks on a run and its twin.")
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--camvid", type=Path, help="camvid.tar")
    parser.add_argument("--cifar", type=Path, help="the folder of cifar10-train.tar and cifar10-test.tar")
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    arguments = parser.parse_args()
    for command in commands(arguments.run, arguments.camvid, arguments.cifar):
        print("+ python " + shlex.join(command), flush=True)
        if not arguments.dry_run and subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode:
            return 1
    if not arguments.dry_run:
        print(table(arguments.run))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
