"""What a job asks of the cluster: command line over a site's file of defaults over built-in defaults."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shlex
import sys
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinov2_fsdp.errors import UserError, nearest

DEFAULT_SITE = Path("dinov2_fsdp", "slurm.yaml")
"""Within the user's folder of settings, ``~/.config`` unless XDG_CONFIG_HOME says otherwise."""
DEFAULT_GPUS_PER_NODE = 8
DEFAULT_SIGNAL_SECONDS = 300
"""Before anything has been measured: more than a step and a save of the largest recipe take."""
OWN_KEYS = {
    "array": "--array",
    "cpus-per-gpu": "--cpus-per-gpu",
    "cpus-per-task": "--cpus-per-gpu",
    "error": "the run directory",
    "gpus-per-node": "--gpus-per-node",
    "nodes": "--nodes",
    "ntasks": "--nodes and --tasks-per-node",
    "ntasks-per-node": "--tasks-per-node",
    "open-mode": "the run directory",
    "output": "the run directory",
    "requeue": "--max-requeues",
    "no-requeue": "--max-requeues 0 --max-restarts 0",
    "signal": "--signal-seconds",
}
"""Options of sbatch that jobs could not do without, and what decides about them here."""
OPTIONS_HERE = ("account", "comment", "constraint", "exclude", "mem", "partition", "qos", "time")
"""Options of sbatch that are options here too: given the other way, they would escape the checks."""


@dataclass(frozen=True)
class JobOptions:
    """A job's demands. None: whatever the cluster gives."""

    nodes: int = 1
    gpus_per_node: int | None = None
    tasks_per_node: int | None = None
    cpus_per_gpu: int | None = None
    mem: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    comment: str | None = None
    slurm: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    python: str = shlex.quote(sys.executable)
    interface: str | None = None
    cpu_bind: str = "cores"
    preflight: str = "warn"
    meet_seconds: float = 300.0
    signal_seconds: int | None = None
    max_requeues: int = 100
    max_restarts: int = 10
    array_parallelism: int = 256

    @property
    def minutes(self) -> int | None:
        """The time limit, rounded up to minutes; None where the partition's default holds."""
        return None if self.time is None else parse_minutes(self.time)


_HELP = {
    "nodes": "nodes of the job (default: 1)",
    "gpus_per_node": "GPUs of each node, one rank each (default: 8, or 0 where parallel.device=cpu)",
    "tasks_per_node": "ranks of each node (default: one per GPU, or one)",
    "cpus_per_gpu": "CPU cores of each rank (default: one per loader process of the config)",
    "mem": "memory of each node, e.g. 500G; 0: all of it (default: all with GPUs, else the cluster's default)",
    "time": "time limit as of sbatch: minutes, H:M:S, D-H; also 24h, 3d. Longer runs requeue themselves",
    "partition": "partition (default: the cluster's)",
    "account": "account to charge",
    "qos": "quality of service",
    "constraint": "features that nodes must have",
    "exclude": "nodes to leave out",
    "comment": "comment of the job",
    "python": "command that starts Python on the nodes, e.g. a container's (default: this Python)",
    "interface": "network interface of gloo and NCCL, e.g. ib0 (default: they choose)",
    "cpu_bind": "how srun binds ranks to cores (default: cores)",
    "preflight": "before the run: warn of slow nodes; exclude them, and those that do not answer, and start again; off",
    "meet_seconds": "seconds in which all ranks must have met (default: 300)",
    "signal_seconds": "seconds before the time limit at which the run saves (default: from the run's measured times)",
    "max_requeues": "how often time limits and preemptions may requeue the job (default: 100)",
    "max_restarts": "how often faults may restart it (default: 10)",
    "array_parallelism": "jobs of an array that run at once (default: 256)",
}
_REPEATED = {
    "slurm": ("KEY=VALUE", "any other option of sbatch, e.g. --slurm reservation=big; repeatable"),
    "env": ("KEY=VALUE", "environment variable of the ranks; repeatable"),
    "setup": ("COMMAND", "shell command before the ranks start, e.g. 'module load cuda'; repeatable"),
}
_CHOICES = {"preflight": ("warn", "exclude", "off")}


def add_job_arguments(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """Add the options of a job, all without default, so that a site's file can tell what was not given."""
    group = parser.add_argument_group("job")
    types = {f.name: str(f.type) for f in dataclasses.fields(JobOptions)}
    for name, text in _HELP.items():
        if name in leave_out:
            continue
        kind = int if types[name].startswith("int") else float if types[name].startswith("float") else str
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            choices=_CHOICES.get(name),
            help=text,
            metavar=_metavar(name, kind),
        )
    for name, (metavar, text) in _REPEATED.items():
        if name not in leave_out:
            group.add_argument(f"--{name}", action="append", metavar=metavar, help=text)
    group.add_argument(
        "--site",
        metavar="FILE",
        help="YAML file of defaults for these options (default: ~/.config/dinov2_fsdp/slurm.yaml)",
    )


def _metavar(name: str, kind: type) -> str | None:
    return None if name in _CHOICES else "N" if kind in (int, float) else name.upper().split("_")[0]


def given_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of a job that a command line gives."""
    values = {name: getattr(arguments, name, None) for name in (*_HELP, *_REPEATED)}
    return {name: value for name, value in values.items() if value is not None}


def job_options(arguments: argparse.Namespace, not_of_site: Container[str] = ()) -> JobOptions:
    """Return the options of a job from its command line and the site's file, but for some keys of the latter.

    Raises:
        UserError: a value is impossible, or the site's file cannot be read or has an unknown key.
    """
    values = {name: value for name, value in read_site(arguments.site).items() if name not in not_of_site}
    for name, given in given_options(arguments).items():
        if name == "setup":
            values["setup"] = [*values.get("setup", []), *given]
        elif name in _REPEATED:
            values[name] = {**values.get(name, {}), **_pairs(f"--{name}", given)}
        else:
            values[name] = given
    values["slurm"] = {_slurm_key(key): value for key, value in values.get("slurm", {}).items()}
    options = JobOptions(**values)
    _validate(options)
    return options


def read_site(file: str | None) -> dict[str, Any]:
    """Return the defaults that a site's file gives; nothing where the user's own does not exist.

    Raises:
        UserError: ``file`` does not exist; it is no YAML; a key or a type in it is wrong.
    """
    path = _default_site() if file is None else Path(file).expanduser()
    if not path.is_file():
        if file is None:
            return {}
        raise UserError(f"--site {file} does not exist; write one like `partition: gpu` or leave --site out")
    import yaml

    try:
        text = path.read_text()
        yaml.safe_load(text)  # refuses tags
        # As written: YAML would read the time 2:00:00 as a number, and the account 0123 as another one.
        content = yaml.load(text, yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())[:200]}") from None
    if content in (None, ""):
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold lines like `partition: gpu`")
    return {
        _site_key(path, key): _site_value(path, key.replace("-", "_"), value)
        for key, value in content.items()
        if value not in _NOTHING
    }


_NOTHING = ("", "~", "null")
"""What YAML takes for no value."""


def _default_site() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / DEFAULT_SITE


def _site_key(path: Path, key: str) -> str:
    valid = [f.name for f in dataclasses.fields(JobOptions)]
    name = key.replace("-", "_")
    if name not in valid:
        raise UserError(f"{path}: unknown key '{key}'{nearest(name, valid)}\nvalid: {', '.join(valid)}")
    return name


def _site_value(path: Path, name: str, value: Any) -> Any:
    kind = {f.name: str(f.type) for f in dataclasses.fields(JobOptions)}[name]
    if kind.startswith("dict"):
        if isinstance(value, dict):
            return {key: "" if item in _NOTHING else str(item) for key, item in value.items()}
        raise UserError(f"{path}: '{name}' holds {value!r}; it needs lines like `reservation: big` below it")
    if kind.startswith("list"):
        return [str(item) for item in (value if isinstance(value, list) else [value])]
    if not isinstance(value, str):
        raise UserError(f"{path}: '{name}' holds {value!r}; it needs one value")
    for prefix, read, needed in (("int", int, "a whole number"), ("float", float, "a number")):
        if kind.startswith(prefix):
            try:
                return read(value)
            except ValueError:
                raise UserError(f"{path}: '{name}' holds {value!r}; it needs {needed}") from None
    if name in _CHOICES and value not in _CHOICES[name]:
        raise UserError(f"{path}: '{name}' holds {value!r}; valid: {', '.join(_CHOICES[name])}")
    return value


def _pairs(option: str, texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        key, separator, value = text.partition("=")
        # An option of sbatch may be a word alone (`--slurm exclusive`); a variable always has a value.
        if not key or (option == "--env" and not separator):
            raise UserError(f"{option} '{text}' is not of the form KEY=VALUE")
        pairs[key] = value
    return pairs


def _slurm_key(key: str) -> str:
    name = key.strip().lstrip("-").replace("_", "-")
    if name in OWN_KEYS:
        raise UserError(f"--slurm {key}=… would break the job; it follows from {OWN_KEYS[name]}")
    if name in OPTIONS_HERE:
        raise UserError(f"--slurm {key}=…: use --{name}, which is checked before anything is submitted")
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name):
        raise UserError(f"--slurm '{key}' is no option of sbatch; give its long name, e.g. --slurm reservation=big")
    return name


def _validate(options: JobOptions) -> None:
    for name in ("nodes", "tasks_per_node", "cpus_per_gpu", "signal_seconds", "meet_seconds", "array_parallelism"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name.replace('_', '-')} {value} is impossible; valid: above 0")
    for name in ("gpus_per_node", "max_requeues", "max_restarts"):
        value = getattr(options, name)
        if value is not None and value < 0:
            raise UserError(f"--{name.replace('_', '-')} {value} is impossible; valid: 0 or more")
    if options.mem is not None and not re.fullmatch(r"\d+[KMGT]?B?", options.mem, re.IGNORECASE):
        raise UserError(f"--mem '{options.mem}' is not understood; valid: a number with K, M, G or T, e.g. 500G, or 0")
    for name in options.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise UserError(f"--env {name}=… is no name of a variable")
    minutes = options.minutes
    if minutes is not None and options.signal_seconds is not None and options.signal_seconds >= 60 * minutes:
        raise UserError(
            f"--signal-seconds {options.signal_seconds} leaves nothing of --time {options.time} ({60 * minutes} s)"
        )
    for name, value in vars(options).items():
        if isinstance(value, str) and "\n" in value:
            raise UserError(f"--{name.replace('_', '-')} must be one line")


def parse_minutes(text: str) -> int:
    """Return a time limit in minutes, rounded up; see :func:`parse_seconds`."""
    return math.ceil(parse_seconds(text) / 60)


def parse_seconds(text: str) -> float:
    """Return a time limit in seconds.

    ``M``, ``M:S``, ``H:M:S`` and ``D-H[:M[:S]]`` as of sbatch; ``90m``, ``24h``, ``3d``.

    Raises:
        UserError: it is none of these, or zero.
    """
    valid = "valid: minutes, H:M:S, D-H, D-H:M:S, or a number with m, h or d such as 24h"
    if match := re.fullmatch(r"(\d+(?:\.\d+)?)([mhd])", text.strip()):
        seconds = float(match[1]) * {"m": 60, "h": 3600, "d": 86400}[match[2]]
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip()):
        days, *rest = (int(part) if part is not None else None for part in match.groups())
        numbers = [number for number in rest if number is not None]
        # After days come hours; without days, a number alone is minutes.
        units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
        seconds = 86400.0 * (days or 0) + sum(n * unit for n, unit in zip(numbers, units, strict=False))
    else:
        raise UserError(f"--time '{text}' is not understood; {valid}")
    if seconds <= 0:
        raise UserError(f"--time '{text}' is no time at all; {valid}")
    return seconds
