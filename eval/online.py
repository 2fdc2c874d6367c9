"""The evaluations that a pretraining run may call at an interval, by the names in ``eval.tasks``.

Importing this module imports neither torch nor the evaluations: launchers check a config with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.sources import Source, open_source
from dinov2_fsdp.duration import Duration
from dinov2_fsdp.errors import UserError, nearest
from eval.classes import check_sources

if TYPE_CHECKING:
    from dinov2_fsdp.train import Evaluation

DENSE = ("segmentation", "depth")
"""Tasks whose images come with a value per pixel."""
TASKS = ("knn", "linear", "logistic", "retrieval", *DENSE)


def online_evaluations() -> dict[str, Evaluation]:
    """Return every task's evaluation, by its name."""
    return {task: getattr(import_module(f"eval.{task}"), f"online_{task}") for task in TASKS}


def check_evaluations(config: Config) -> None:
    """Refuse evaluations that would end a run when their time comes; where ``eval.every`` is 0, nothing is checked.

    Raises:
        UserError: a task is unknown, or its images are missing, have no labels, differ in their classes, or have
            values for other sizes.
    """
    if Duration.parse(config.eval.every).value == 0:
        return
    for task in config.eval.tasks:
        if task not in TASKS:
            raise UserError(f"eval.tasks: no evaluation is called '{task}'{nearest(task, TASKS)}")
    train, test, cache = config.eval.train or config.data.train, config.eval.test, config.data.cache
    assert test is not None  # the config's own rules see to it
    for task in config.eval.tasks:
        if task in DENSE:
            from eval.dense import KEPT
            from eval.pairs import ScenePairs, check_pairs, open_pairs

            for spec, used in ((train, min(config.eval.max_train or KEPT, KEPT)), (test, config.eval.max_test)):
                pairs = open_pairs(spec, task, cache)
                if task == "segmentation" and not isinstance(pairs, ScenePairs):
                    c = config.eval
                    try:
                        check_pairs(pairs, c.classes, c.first_class, tuple(c.void), limit=used)
                    except UserError as error:
                        raise UserError(_as_keys(str(error))) from None
                else:
                    check_pairs(pairs, limit=used)
        else:
            train_key = "eval.train" if config.eval.train else "data.train"
            check_sources(_opened(train_key, train, cache), _opened("eval.test", test, cache))


def _opened(key: str, spec: str, cache: str | None) -> Source:
    try:
        return open_source(spec, cache)
    except UserError as error:
        raise UserError(f"{key}: {error}\nor train without evaluations: eval.every=0it") from None


def _as_keys(message: str) -> str:
    """Return a message about the flags of a task's command as one about the keys of a config."""
    flags = {"--classes": "eval.classes", "--first-class": "eval.first_class", "--void": "eval.void"}
    for flag, key in flags.items():
        message = message.replace(flag, key)
    return message
