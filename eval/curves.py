"""The training curves of a run as one picture: losses, entropies, k-NN, schedules, speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from numpy.typing import NDArray

from dinov2_fsdp.errors import UserError
from eval.figures import COLOURS, DPI, STYLE

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and the values that were logged at them."""


def draw_curves(run: Path, references: dict[str, float] | None = None) -> Path:
    """Draw ``run/pictures/curves.png`` from the run's metrics and return the file.

    ``references``: see :func:`training_curves`; by default what a demo has measured, whose picture this would replace.
    """
    references = _of_demo(run) if references is None else references
    return training_curves(run / "metrics.jsonl", run / "pictures" / "curves.png", references, title=run.name)


def _of_demo(run: Path) -> dict[str, float] | None:
    """Return the accuracies beside the trained backbone's that ``launchers/demo.py`` has written, if it has."""
    try:
        summary = json.loads((run / "summary.json").read_text())
        return {"raw pixels": float(summary["knn_pixels"]), "untrained": float(summary["knn_untrained"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_metrics(metrics_jsonl: str | Path) -> dict[str, Series]:
    """Return (steps, values) of every number in a ``metrics.jsonl``; of a step repeated after a resume the last.

    Lines that are no JSON object with a step (say, the last one of a run that was killed) are passed over.

    Raises:
        UserError: the file is missing or holds no step.
    """
    path = Path(metrics_jsonl)
    if not path.is_file():
        raise UserError(f"{path} does not exist; a run writes it as soon as it has logged a step")
    series: dict[str, dict[int, float]] = {}
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            continue
        for key, value in entry.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value):
                series.setdefault(key, {})[entry["step"]] = float(value)
    if not series:
        raise UserError(f"{path} holds no step yet; let the run log some")
    return {key: _sorted(points) for key, points in series.items()}


def training_curves(
    metrics_jsonl: str | Path, png: str | Path, references: dict[str, float] | None = None, title: str = ""
) -> Path:
    """Draw loss, its terms, entropies, k-NN, schedules and speed over the steps; return the file (1800 × 1020 pixels).

    A run without k-NN evaluations (``eval.every=0it``, or other tasks) has no panel of them.

    Args:
        references: horizontal lines in the k-NN panel, percent, e.g. ``{"raw pixels": 21.0}``.

    Raises:
        UserError: there is nothing to draw.
    """
    metrics = read_metrics(metrics_jsonl)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(15, 8.5), dpi=DPI, layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        grid = figure.add_gridspec(2, 3)
        _lines(figure.add_subplot(grid[0, 0]), metrics, "Total loss", {"loss": "loss"})
        terms = {key: key.removeprefix("loss/") for key in sorted(metrics) if key.startswith("loss/")}
        _loss_terms(figure, grid[0, 1], metrics, terms)
        entropies = {key: _entropy_name(key) for key in sorted(metrics, reverse=True) if "/entropy" in key}
        _lines(figure.add_subplot(grid[0, 2]), metrics, "Entropy of the outputs", entropies, unit="nats")
        accuracies = sorted((key for key in metrics if "knn_" in key), key=lambda key: int(key.rsplit("_", 1)[1]))
        if accuracies or references:
            _knn(figure.add_subplot(grid[1, 0]), metrics, accuracies, references or {})
            schedules, speed = grid[1, 1], grid[1, 2]
        else:
            schedules, speed = grid[1, 1:], grid[1, 0]
        _schedules(figure, schedules, metrics)
        _lines(figure.add_subplot(speed), metrics, "Speed", {"img_per_s": ""}, unit="images / s", bottom=0)
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png)
    return Path(png)


def _lines(
    axes: Axes,
    metrics: dict[str, Series],
    title: str,
    names: dict[str, str],
    unit: str = "",
    bottom: float | None = None,
) -> None:
    axes.set_title(title)
    axes.set_ylabel(unit)
    axes.set_xlabel("step")
    present = [key for key in names if key in metrics]
    if not present:
        _say_absent(axes)
        return
    for number, key in enumerate(present):
        _draw(axes, metrics[key], COLOURS[number % len(COLOURS)], names[key])
    if bottom is not None:
        axes.set_ylim(bottom=bottom)
    if any(names[key] for key in present) and len(present) > 1:
        axes.legend(loc="best")


def _draw(axes: Axes, series: Series, colour: str, label: str, smooth: bool = True) -> None:
    steps, values = series
    window = len(values) // 40
    if window < 2 or not smooth:
        axes.plot(steps, values, color=colour, lw=1.8, label=label, marker="o" if len(steps) == 1 else None)
        return
    axes.plot(steps, values, color=colour, lw=0.8, alpha=0.3)
    axes.plot(steps, _smooth(values, window), color=colour, lw=1.9, label=label)


def _loss_terms(figure: Figure, place: SubplotSpec, metrics: dict[str, Series], terms: dict[str, str]) -> None:
    # Each term has a scale of its own: on a shared one, only the largest would be seen to move.
    _stack(figure, place, metrics, "Loss terms (unweighted)", list(terms.items()), smooth=True)


def _schedules(figure: Figure, place: SubplotSpec, metrics: dict[str, Series]) -> None:
    wanted = (
        ("lr", "learning rate"),
        ("weight_decay", "weight decay"),
        ("teacher_momentum", "teacher momentum"),
        ("teacher_temperature", "teacher temperature"),
    )
    _stack(figure, place, metrics, "Schedules", [entry for entry in wanted if entry[0] in metrics], smooth=False)


def _stack(
    figure: Figure,
    place: SubplotSpec,
    metrics: dict[str, Series],
    title: str,
    rows: Sequence[tuple[str, str]],
    smooth: bool,
) -> None:
    inner = place.subgridspec(max(1, len(rows)), 1, hspace=0.1)
    if not rows:
        axes = figure.add_subplot(inner[0])
        axes.set_title(title)
        _say_absent(axes)
        return
    for number, (key, name) in enumerate(rows):
        axes = figure.add_subplot(inner[number])
        if number == 0:
            axes.set_title(title)
        colour = COLOURS[number % len(COLOURS)]
        _draw(axes, metrics[key], colour, name, smooth)
        axes.locator_params(axis="y", nbins=4)
        axes.text(1.0, 1.03, name, ha="right", va="bottom", fontsize=9, color=colour, transform=axes.transAxes)
        last = number == len(rows) - 1
        axes.tick_params(axis="x", labelbottom=last)
        if last:
            axes.set_xlabel("step")


def _knn(axes: Axes, metrics: dict[str, Series], keys: Sequence[str], references: dict[str, float]) -> None:
    axes.set_title("k-NN accuracy of the teacher")
    axes.set_ylabel("%")
    axes.set_xlabel("step")
    for number, key in enumerate(keys):
        steps, values = metrics[key]
        label = f"k = {key.rsplit('_', 1)[1]}"
        axes.plot(steps, values, color=COLOURS[number % len(COLOURS)], lw=1.9, marker="o", ms=4, label=label)
    for (name, value), dash in zip(references.items(), ((4, 2), (1.5, 1.5), (6, 2, 1, 2)), strict=False):
        axes.axhline(value, color="#52606d", lw=1.2, dashes=dash, label=f"{name} ({value:.1f})")
    # Beside the curves' ends, which are what is looked at, there is no free corner that all runs share.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2)


def _say_absent(axes: Axes) -> None:
    axes.grid(False)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not logged", ha="center", va="center", color="#9aa5b1", transform=axes.transAxes)


def _entropy_name(key: str) -> str:
    who, _, what = key.partition("/entropy")
    return f"{who} {what.lstrip('_')}".strip()


def _sorted(points: dict[int, float]) -> Series:
    steps = np.array(sorted(points), np.float64)
    return steps, np.array([points[int(step)] for step in steps])


def _smooth(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Return the mean over ``2·window + 1`` neighbours, over fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - window, 0), np.minimum(places + window + 1, len(values))
    return (total[high] - total[low]) / (high - low)
