#!/usr/bin/env python
"""Pretrain on a SLURM cluster.

    python launchers/slurm.py --nodes 16 --config configs/vitg14.yaml
    python launchers/slurm.py --nodes 2 --config configs/vits14.yaml --time 24h --follow data.train=folder:/my/images

The same command continues an interrupted run. The job saves and requeues itself at its time limit and when it is
preempted, and starts again after a fault. Every key of the config can be overridden by key=value.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dinov2_fsdp.errors import Parser, run_cli
from launchers.cluster.options import add_job_arguments


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(
        prog="launchers/slurm.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file; without one, all defaults")
    parser.add_argument("--output-dir", help="run directory, on a file system that all nodes share")
    parser.add_argument(
        "--overwrite", action="store_true", help="delete the run that is in the directory and start anew"
    )
    parser.add_argument("--dry-run", action="store_true", help="print script, environment and plan; needs no cluster")
    parser.add_argument("--gpu", help="with --dry-run: what the plan is for, as H200 or GIB,TFLOPS")
    parser.add_argument("--follow", action="store_true", help="show state and progress; Ctrl-C leaves the job alone")
    parser.add_argument(
        "--array",
        action="append",
        default=[],
        metavar="KEY=A,B,… | A.yaml,B.yaml",
        help="one job for each value or config; several --array are combined",
    )
    parser.add_argument(
        "--remote-data", action="store_true", help="only the nodes see the data: do not look for it here"
    )
    add_job_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the config")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    arguments = parse()
    from launchers.cluster.training import launch

    return launch(arguments)


if __name__ == "__main__":
    run_cli(main)
