"""How all pictures look, and grids of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from numpy.typing import NDArray

STYLE: Any = {
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
COLOURS = ("#2f6690", "#e07a5f", "#3d9970", "#8e5ea2", "#c9a227", "#6b7a8f")
DPI = 120

Row = tuple[str, Sequence[NDArray[Any] | None]]
"""What stands left of a row of pictures, and the pictures (H, W, 3), (H, W) or None for an empty place."""


def picture_grid(
    rows: Sequence[Row], png: str | Path, side: float = 1.5, titles: Sequence[str] = (), colour_map: str = "magma"
) -> Path:
    """Draw rows of pictures, pixels as squares, and return the file.

    Args:
        side: of a picture, inches. titles: above the columns. colour_map: of pictures without colours.
    """
    columns = max(len(pictures) for _, pictures in rows)
    left, top = 0.34 if any(name for name, _ in rows) else 0.02, 0.24 if titles else 0.0
    width, height = side * columns + left, side * len(rows) + top
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(width, height), dpi=DPI)
        grid = GridSpec(
            len(rows), columns, figure, left / width, 0.004, 0.998, 0.996 - top / height, wspace=0.03, hspace=0.03
        )
        for row, (name, pictures) in enumerate(rows):
            for column in range(columns):
                picture = pictures[column] if column < len(pictures) else None
                axes = figure.add_subplot(grid[row, column])
                axes.set_xticks([])
                axes.set_yticks([])
                axes.spines[:].set_visible(False)
                if picture is not None:
                    axes.imshow(picture, interpolation="nearest", cmap=colour_map)
                if column == 0:
                    axes.set_ylabel(name, fontsize=10, color="#323f4b", labelpad=5)
                if row == 0 and column < len(titles):
                    axes.set_title(titles[column], fontsize=9, loc="center", fontweight="normal", pad=4)
        Path(png).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(png)
    return Path(png)
