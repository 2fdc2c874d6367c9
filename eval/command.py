"""What the commands of all tasks share: their flags, the backbone that is looked at, and the world of processes.

A task's settings are a dataclass whose fields are its flags: a field ``train_batch`` is ``--train-batch``, and the text
below a field is its help. Fields that a run's ``eval`` section has too (``size``, ``batch``, …) default to that.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import torch

from dinov2_fsdp.config import Config, ParallelConfig
from dinov2_fsdp.data.sources import BadImage, Source, open_source
from dinov2_fsdp.errors import Parser, UserError
from dinov2_fsdp.models.vision_transformer import VisionTransformer
from dinov2_fsdp.parallel.place import place_from_environment, started_by_launcher
from dinov2_fsdp.parallel.world import World, end_world, start_world
from dinov2_fsdp.weights import load_backbone, untrained_backbone
from eval.features import PRECISIONS, Features, choose_device, frozen, pixel_features
from eval.results import PARTIAL, data_of, digest_of, folder_of, of_part, record, run_of, without_idle_limits
from eval.splits import splits_of

Settings = TypeVar("Settings")

_SECONDS_FOR_RANK_0 = 5.0


@dataclass
class Subject:
    """What is evaluated, and where.

    ``backbone`` is ``teacher``, ``untrained`` or ``pixels``; ``model`` is None for pixels; ``run`` is the run directory
    that the weights belong to, None where there is none.
    """

    backbone: str
    model: VisionTransformer | None
    step: int | None
    config: Config | None
    checkpoint: str | None
    run: Path | None
    world: World
    precision: str = "fp32"

    def __str__(self) -> str:
        return f"{self.backbone}, step {self.step}" if self.step else self.backbone

    @property
    def patch(self) -> int:
        """Side of the backbone's patches, pixels; 1 for pixels."""
        return 1 if self.model is None else self.model.patch_size

    def features(self, size: int, blocks: Sequence[int] = ()) -> Features:
        """Return the frozen forward for crops of ``size`` pixels; see :func:`eval.features.frozen`."""
        if self.model is None:
            return pixel_features
        return frozen(self.model, size, self.world.device, precision=self.precision, blocks=blocks)

    def last_blocks(self, count: int) -> list[int]:
        """Return the numbers of the last ``count`` blocks, of as many as there are."""
        depth = 1 if self.model is None else len(self.model.blocks)
        return list(range(-min(count, depth), 0))

    def key(self, **other: Any) -> dict[str, Any]:
        """Return what kept features depend on beside the images."""
        names = {"backbone": self.backbone, "step": self.step, "checkpoint": self.checkpoint}
        return {**names, "precision": self.precision, **other}

    def name(self, task: str) -> str:
        """Return the folder of ``task`` for this backbone."""
        return task if self.backbone == "teacher" else f"{task}_{self.backbone}"


def build_parser(prog: str, description: str, settings: type, *, pixels: bool = False) -> argparse.ArgumentParser:
    """Return a parser with the flags that all tasks share and one for each field of ``settings``.

    Args:
        pixels: offer ``--pixels``.
    """
    parser = Parser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        epilog="Data and sizes default to the run's config (eval.train or data.train, eval.test, eval.size, …). "
        "Several processes share the work: torchrun --standalone --nproc-per-node N " + prog,
    )
    add = parser.add_argument
    add("--weights", metavar="PATH", help="a run directory, one of its checkpoints, or a weights file")
    add("--step", type=int, help="which checkpoint of the run; by default the newest")
    which = parser.add_mutually_exclusive_group()
    if pixels:
        which.add_argument("--pixels", action="store_true", help="use raw pixels as features: the baseline to beat")
    which.add_argument("--untrained", action="store_true", help="the run's backbone before its first step")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)")
    add("--precision", default="fp32", choices=tuple(PRECISIONS), help="of the backbone's forward (default: fp32)")
    add("--workers", type=int, default=0, help="processes that decode images (default: 0, in this one)")
    add("--output", metavar="DIR", help="where to write results.json; by default RUN/eval/step_…/TASK…")
    add_settings(parser, settings)
    return parser


def add_data(
    parser: argparse.ArgumentParser,
    train: str,
    test: str,
    kind: str = "labels",
    names: tuple[str, str] = ("train", "test"),
) -> None:
    """Add a flag for each split, by default ``--train`` and ``--test``, and ``--data``, which stands for both.

    Args:
        train, test: what they hold. kind: see :func:`eval.splits.splits_of`.
    """
    for name, text in zip(names, (train, test), strict=True):
        parser.add_argument(f"--{name}", metavar="SPEC", help=text)
    both = " and ".join(f"--{name}" for name in names)
    parser.add_argument("--data", metavar="SPEC", help=f"a data set with two splits, in place of {both}")
    parser.set_defaults(splits=(kind, *names))


def add_settings(parser: argparse.ArgumentParser, settings: type) -> None:
    """Add a flag for each field of the dataclass ``settings``; one that is not given stays None."""
    group = parser.add_argument_group("settings")
    documented = _docs(settings)
    for field in fields(settings):
        kind = str(field.type)
        flag = f"--{field.name.replace('_', '-')}"
        default = field.default
        if isinstance(default, tuple):
            default = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
        text = documented[field.name].replace("%", "%%") + ("" if default in (None, "") else f" (default: {default})")
        if kind.startswith("bool"):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
            continue
        single = {"int": int, "float": float, "str": str}[
            kind.removeprefix("tuple[").split(",")[0].split(" ")[0].rstrip("]")
        ]
        many = kind.startswith("tuple")
        group.add_argument(flag, type=single, nargs="+" if many else None, metavar=_metavar(single), help=text)


def read_settings(arguments: argparse.Namespace, defaults: Settings, config: Config | None) -> Settings:
    """Return the settings: what flags say, else what the run's ``eval`` section says, else the defaults."""
    result = defaults
    names = [field.name for field in fields(defaults)]  # type: ignore[arg-type]
    if config is not None:
        shared = {name: getattr(config.eval, name) for name in names if hasattr(config.eval, name)}
        result = replace(result, **shared)  # type: ignore[type-var]
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    return replace(result, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})  # type: ignore[type-var]


def require_positive(settings: Any, *names: str, zero: Sequence[str] = ()) -> None:
    """Refuse settings that are not above 0 (those in ``zero``: below 0).

    Raises:
        UserError: naming the flag.
    """
    for name in (*names, *zero):
        values = getattr(settings, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value < 0 or (value == 0 and name not in zero):
                valid = "a number of at least 0" if name in zero else "a number above 0"
                raise UserError(f"--{name.replace('_', '-')} {value} is impossible; valid: {valid}")


def check_sizes(settings: Any) -> None:
    """Refuse an impossible ``resize``, ``size`` or ``batch``. Raises :class:`UserError`."""
    require_positive(settings, "resize", "size", "batch")
    if settings.resize < settings.size:
        raise UserError(f"--resize {settings.resize} is smaller than --size {settings.size}; valid: at least the size")


@contextmanager
def open_subject(arguments: argparse.Namespace) -> Iterator[Subject]:
    """Join the other processes, if a launcher started several, and yield what the command line says to evaluate.

    Raises:
        UserError: there are no weights, or they do not fit.
    """
    _split_data(arguments)
    pixels = getattr(arguments, "pixels", False)
    if arguments.weights is None and not (pixels and arguments.train and arguments.test):
        alone = "\n(only --pixels with --train and --test goes without)" if hasattr(arguments, "pixels") else ""
        raise UserError(f"--weights PATH is needed: a run, a checkpoint or a weights file{alone}")
    joined = started_by_launcher()
    if joined:
        world = start_world(ParallelConfig(device=arguments.device), place_from_environment())
    else:
        world = World(0, 1, 0, choose_device(arguments.device))
    try:
        yield _load(arguments, pixels, world)
    except UserError as error:
        error.silent = rank_0_says(world, str(error))
        raise
    except BadImage as error:
        raise UserError(f"{error}\nmend or remove that file") from None
    finally:
        if joined:
            end_world()


def rank_0_says(world: World, message: str) -> bool:
    """Return whether another process, rank 0, shows this very message, so that it need not be shown again."""
    if world.store is None:
        return False
    try:
        if world.rank == 0:
            world.store.set("evaluation error", message)
            return False
        world.store.wait(["evaluation error"], timedelta(seconds=_SECONDS_FOR_RANK_0))
        return bool(world.store.get("evaluation error").decode() == message)
    except RuntimeError:  # rank 0 has no complaint, or is gone
        return False


def _split_data(arguments: argparse.Namespace) -> None:
    """Let ``--data`` be both splits. Raises :class:`UserError`."""
    if getattr(arguments, "data", None) is None:
        return
    kind, *names = arguments.splits
    if any(getattr(arguments, name) is not None for name in names):
        raise UserError(f"--data is both splits; give it alone, or --{names[0]} and --{names[1]}")
    for name, spec in zip(names, splits_of(arguments.data, kind), strict=True):
        setattr(arguments, name, spec)


def _load(arguments: argparse.Namespace, pixels: bool, world: World) -> Subject:
    if arguments.weights is None:
        return Subject("pixels", None, 0, None, None, None, world)
    loaded = load_backbone(arguments.weights, step=arguments.step)
    run = run_of(Path(arguments.weights))
    common = {"config": loaded.config, "run": run, "world": world, "precision": arguments.precision}
    if pixels:
        return Subject("pixels", None, 0, checkpoint=None, **common)
    if arguments.untrained:
        if loaded.config is None:
            raise UserError(
                f"--untrained needs a run's config, which {arguments.weights} does not hold; give a run directory"
            )
        return Subject("untrained", untrained_backbone(loaded.config), 0, checkpoint=None, **common)
    return Subject("teacher", loaded.model, loaded.step, checkpoint=loaded.source, **common)


def specs_of(config: Config | None, train: str | None, test: str | None, task: str) -> tuple[str, str]:
    """Return the specs of the images to learn from and of the test images: as given, or else as the config says.

    Raises:
        UserError: one is given nowhere.
    """
    if config is not None:
        train, test = train or config.eval.train or config.data.train, test or config.eval.test
    for value, name in ((train, "train"), (test, "test")):
        if value is None:
            raise UserError(
                f"{task} needs labelled images; give --{name} SPEC or set eval.{name}=SPEC, e.g. folder:PATH"
            )
    assert train is not None
    assert test is not None
    return train, test


def open_both(config: Config | None, train: str | None, test: str | None, task: str) -> tuple[Source, Source]:
    """Return both sources of :func:`specs_of`, opened. Raises :class:`UserError`."""
    first, second = specs_of(config, train, test, task)
    cache = config.data.cache if config else None
    return open_source(first, cache), open_source(second, cache)


@dataclass
class Evaluation:
    """One task on one backbone and its data: where unfinished work and results go.

    Args:
        task: its name. data: has the specs ``train`` and ``test``. output: ``--output``.
        sizes: images of the sets to learn from and to test on; a limit (``max_train``, ``max_test``) that reaches
            them is none.
    """

    subject: Subject
    task: str
    settings: Any
    data: dict[str, Any]
    sizes: tuple[int, int]
    output: str | None = None

    def __post_init__(self) -> None:
        self.started = time.monotonic()
        self.settings = without_idle_limits(self.settings, *self.sizes)
        s = self.subject
        described = {"data": self.data, "settings": asdict(self.settings)}
        images, part = data_of(described), of_part(described)
        # Without regard to other results that are or will be there: the same evaluation has to find it again.
        folder = folder_of(s.run, s.step, s.name(self.task), images if part else None, self.output, part)
        self._partial = None if folder is None else folder / PARTIAL / digest_of(images)

    def partial(self, name: str = "") -> Path | None:
        """Return the folder of what an interrupted evaluation goes on from; None where nothing is kept."""
        return None if self._partial is None else self._partial / name

    def finish(self, metric: str, metrics: dict[str, float], **more: Any) -> Path | None:
        """Record the results (rank 0), remove what was kept for an interruption, and return the file of the results.

        Args:
            metric: which of ``metrics`` stands for the task.
            more: further entries of ``results.json``; ``data`` is added to what is known of the data.
        """
        subject = self.subject
        if subject.world.rank != 0:
            return None
        device = subject.world.device
        results = {
            "task": self.task,
            "backbone": subject.backbone,
            "checkpoint": subject.checkpoint,
            "step": subject.step,
            "settings": asdict(self.settings)
            | {"device": str(device), "processes": subject.world.size, "precision": subject.precision},
            "metrics": metrics,
            "data": {**self.data, **more.pop("data", {})},
            "seconds": round(time.monotonic() - self.started, 2),
            "peak_memory_gib": round(peak_memory_gib(device), 3),
            **more,
        }
        file = record(results, subject.name(self.task), metric, subject.run, self.output)
        if self._partial is not None:
            shutil.rmtree(self._partial, ignore_errors=True)
            with suppress(OSError):  # other data's may lie there
                self._partial.parent.rmdir()
        return file


def _docs(settings: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for cls in reversed([base for base in settings.__mro__ if hasattr(base, "__dataclass_fields__")]):
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[statement.target.id] = " ".join(following.value.value.split())  # type: ignore[attr-defined,union-attr]
    return docs


def _metavar(single: type) -> str:
    return {int: "N", float: "X", str: "TEXT"}[single]


def peak_memory_gib(device: torch.device) -> float:
    """Return GiB: the most that torch allocated on a GPU, or the most memory that this process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
