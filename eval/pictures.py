"""Two pictures of a run: its training curves, and what its patch features see.

python eval/pictures.py --run runs/NAME      # writes runs/NAME/pictures/curves.png and pca.png
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec, SubplotSpec
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.weights import load_backbone, untrained_backbone
from eval.features import choose_device, frozen, normalise, prepare, subset

Series = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Steps and the values that were logged at them."""

_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": "#52606d",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "xtick.color": "#52606d",
    "ytick.color": "#52606d",
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_COLOURS = ("#2f6690", "#e07a5f", "#3d9970", "#8e5ea2", "#c9a227", "#6b7a8f")
_DPI = 120


# ---------------------------------------------------------------------------------------------------------------------
# Training curves.


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

    Args:
        references: horizontal lines in the k-NN panel, percent, e.g. ``{"raw pixels": 21.0}``.

    Raises:
        UserError: there is nothing to draw.
    """
    metrics = read_metrics(metrics_jsonl)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(15, 8.5), dpi=_DPI, layout="constrained")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=14, fontweight="bold")
        grid = figure.add_gridspec(2, 3)
        _lines(figure.add_subplot(grid[0, 0]), metrics, "Total loss", {"loss": "loss"})
        terms = {key: key.removeprefix("loss/") for key in sorted(metrics) if key.startswith("loss/")}
        _loss_terms(figure, grid[0, 1], metrics, terms)
        entropies = {key: _entropy_name(key) for key in sorted(metrics, reverse=True) if "/entropy" in key}
        _lines(figure.add_subplot(grid[0, 2]), metrics, "Entropy of the outputs", entropies, unit="nats")
        _knn(figure.add_subplot(grid[1, 0]), metrics, references or {})
        _schedules(figure, grid[1, 1], metrics)
        _lines(figure.add_subplot(grid[1, 2]), metrics, "Speed", {"img_per_s": ""}, unit="images / s", bottom=0)
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
        _draw(axes, metrics[key], _COLOURS[number % len(_COLOURS)], names[key])
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
        colour = _COLOURS[number % len(_COLOURS)]
        _draw(axes, metrics[key], colour, name, smooth)
        axes.locator_params(axis="y", nbins=4)
        axes.text(1.0, 1.03, name, ha="right", va="bottom", fontsize=9, color=colour, transform=axes.transAxes)
        last = number == len(rows) - 1
        axes.tick_params(axis="x", labelbottom=last)
        if last:
            axes.set_xlabel("step")


def _knn(axes: Axes, metrics: dict[str, Series], references: dict[str, float]) -> None:
    keys = sorted((key for key in metrics if "knn_" in key), key=lambda key: int(key.rsplit("_", 1)[1]))
    axes.set_title("k-NN accuracy of the teacher")
    axes.set_ylabel("%")
    axes.set_xlabel("step")
    if not keys and not references:
        _say_absent(axes)
        return
    for number, key in enumerate(keys):
        steps, values = metrics[key]
        label = f"k = {key.rsplit('_', 1)[1]}"
        axes.plot(steps, values, color=_COLOURS[number % len(_COLOURS)], lw=1.9, marker="o", ms=4, label=label)
    for (name, value), dash in zip(references.items(), ((4, 2), (1.5, 1.5), (6, 2, 1, 2)), strict=False):
        axes.axhline(value, color="#52606d", lw=1.2, dashes=dash, label=f"{name} ({value:.1f})")
    axes.legend(loc="best")


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


# ---------------------------------------------------------------------------------------------------------------------
# Principal components of the patch features (DINOv2, figure 1 and section 7.5).


def pca_patches(
    models: nn.Module | Mapping[str, nn.Module],
    images: Sequence[Image.Image],
    png: str | Path,
    size: int,
    device: torch.device,
    foreground: bool = False,
) -> Path:
    """Draw a row of images and below it, for each model, the first three components of its patches; return the file.

    The components are shared by all images of a row, so that one colour means one thing everywhere in it. Each is
    scaled so that its 1st and 99th percentiles are black and full.

    Args:
        models: a backbone, or several by the name of their row.
        size: side of the central crop that is shown, pixels; a multiple of the patch. A size above the training's gives
            finer maps.
        foreground: keep only the patches on one side of the first component, and find the colours among those.

    Raises:
        UserError: there are no images, or the patch does not divide the size.
    """
    if not images:
        raise UserError("there are no images to draw; give at least one")
    rows = models if isinstance(models, Mapping) else {"patch features": models}
    crops = np.stack([prepare(image, size, size) for image in images])
    maps = {name: pca_colours(_patch_tokens(model, crops, size, device), foreground) for name, model in rows.items()}

    width, height, left, gap = 1.5 * len(crops), 1.5 * (1 + len(maps)), 0.34, 0.03
    with matplotlib.rc_context(_STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(width + left, height), dpi=_DPI)
        grid = GridSpec(
            1 + len(maps), len(crops), figure, left / (width + left), 0.004, 0.998, 0.996, wspace=gap, hspace=gap
        )
        shown: list[tuple[str, NDArray[Any]]] = [("image", crops), *maps.items()]
        for row, (name, pictures) in enumerate(shown):
            for column, picture in enumerate(pictures):
                axes = figure.add_subplot(grid[row, column])
                axes.imshow(picture, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if column == 0:
                    axes.set_ylabel(name, fontsize=11, color="#323f4b", labelpad=5)
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png)
    return Path(png)


def pca_colours(tokens: NDArray[np.float32], foreground: bool = False) -> NDArray[np.float32]:
    """Return the colours (images, rows, columns, 3) in [0, 1] of patch features (images, rows, columns, D)."""
    flat = tokens.reshape(-1, tokens.shape[-1]).astype(np.float64)
    keep = np.ones(len(flat), bool)
    if foreground:
        keep = _foreground(_components(flat, 1)[:, 0].reshape(tokens.shape[:3])).ravel()
    colours = np.zeros((len(flat), 3))
    parts = _components(flat[keep], 3)
    low, high = np.percentile(parts, [1, 99], axis=0)
    colours[keep, : parts.shape[1]] = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1)
    return colours.reshape(*tokens.shape[:3], 3).astype(np.float32)


def _components(rows: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return the first principal components (n, count); the sign is such that the longer tail is positive."""
    centred = rows - rows.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    parts = centred @ axes[:, ::-1][:, :count]
    tails = np.sum(parts**3, axis=0)
    return parts * np.where(tails < 0, -1.0, 1.0)


def _foreground(first: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return the side of the first component (images, rows, columns) that touches the images' borders less."""
    side = first > 0
    border = np.ones(first.shape[1:], bool)
    border[1:-1, 1:-1] = False
    inside_share = side[:, ~border].mean() if (~border).any() else 0.5
    chosen = side if side[:, border].mean() <= inside_share else ~side
    return chosen if chosen.sum() > 3 else np.ones_like(side)


def _patch_tokens(model: nn.Module, crops: NDArray[np.uint8], size: int, device: torch.device) -> NDArray[np.float32]:
    forward = frozen(model, size, device)
    side = size // int(model.patch_size)  # type: ignore[arg-type]
    tokens = []
    with torch.no_grad():
        for crop in crops:
            outputs = forward(normalise(torch.from_numpy(crop[None]).to(device)))
            tokens.append(outputs["x_norm_patchtokens"].float().cpu().numpy())
    return np.concatenate(tokens).reshape(len(crops), side, side, -1)


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def draw_curves(run: Path, references: dict[str, float] | None = None) -> Path:
    """Draw ``run/pictures/curves.png`` from the run's metrics and return the file."""
    return training_curves(run / "metrics.jsonl", run / "pictures" / "curves.png", references, title=run.name)


def draw_pca(
    run: Path,
    device: torch.device,
    *,
    step: int | None = None,
    images: int = 8,
    size: int = 0,
    data: str | None = None,
    foreground: bool = False,
    untrained: bool = True,
) -> Path:
    """Draw ``run/pictures/pca.png`` and return the file; ``size`` 0 takes twice the run's evaluation size.

    Raises:
        UserError: there is no checkpoint, or no image can be read.
    """
    loaded = load_backbone(run, step=step)
    config = loaded.config
    if config is None:
        raise UserError(f"{run} holds no config; give a run directory")
    models = {"untrained": untrained_backbone(config)} if untrained else {}
    models["trained" if untrained else f"step {loaded.step}"] = loaded.model
    source = open_source(data or config.eval.test or config.data.train, config.data.cache)
    pictures = [source.image(int(index)) for index in subset(source, images)]
    return pca_patches(
        models, pictures, run / "pictures" / "pca.png", size or 2 * config.eval.size, device, foreground=foreground
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="eval/pictures.py", description="Training curves and principal components of patch features, as PNG files."
    )
    add = parser.add_argument
    add("--run", metavar="DIR", required=True, help="a run directory; pictures go to DIR/pictures")
    add("--step", type=int, help="which checkpoint; by default the newest")
    add("--images", type=int, default=8, help="images in the picture of components (default: 8)")
    add("--size", type=int, default=0, help="side of those images, pixels; by default twice the run's eval.size")
    add("--data", metavar="SPEC", help="where the images come from; by default eval.test, else data.train")
    add("--foreground", action="store_true", help="colour only one side of the first component")
    add("--no-untrained", action="store_true", help="leave out the row of the untrained backbone")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)")
    return parser


def main() -> int:
    """Run the command line."""
    arguments = _parser().parse_args()
    run = Path(arguments.run)
    if not run.is_dir():
        raise UserError(f"--run {run} does not exist; give the directory of a run, e.g. runs/demo")
    tasks: Iterable[Callable[[], Path]] = (
        lambda: draw_curves(run),
        lambda: draw_pca(
            run,
            choose_device(arguments.device),
            step=arguments.step,
            images=arguments.images,
            size=arguments.size,
            data=arguments.data,
            foreground=arguments.foreground,
            untrained=not arguments.no_untrained,
        ),
    )
    for task in tasks:
        print(f"written to {task()}")
    return 0


if __name__ == "__main__":
    run_cli(main)
