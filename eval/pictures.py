"""Pictures of a run: training curves, patch features as colours, attention, nearest neighbours, training crops.

python eval/pictures.py --run runs/NAME                 # writes all of them to runs/NAME/pictures
python eval/pictures.py --run runs/NAME --only attention --size 448 --data folder:PATH
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.sources import BadImage, Source, open_source
from dinov2_fsdp.errors import Parser, UserError, nearest, run_cli
from dinov2_fsdp.weights import load_backbone, untrained_backbone
from eval.components import pca_patches
from eval.curves import draw_curves
from eval.features import choose_device, subset
from eval.views import draw_attention, draw_crops, draw_neighbours

__all__ = ["draw_curves", "draw_pca"]

KINDS = ("curves", "pca", "foreground", "attention", "neighbours", "crops")
_ATTENTION_IMAGES = 4


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

    With ``foreground`` the file is ``pca_foreground.png``.

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
    pictures = readable_images(source, images)
    png = run / "pictures" / ("pca_foreground.png" if foreground else "pca.png")
    return pca_patches(models, pictures, png, size or 2 * config.eval.size, device, foreground=foreground)


def readable_images(source: Source, count: int) -> list[Image.Image]:
    """Return at most ``count`` images, spread over the source; others stand in for those that cannot be read.

    Raises:
        UserError: none can be read.
    """
    found: list[Image.Image] = []
    complaint = ""
    first = subset(source, count)
    for index in [*first, *np.setdiff1d(subset(source, 4 * count + 100), first)]:
        if len(found) == count:
            break
        try:
            found.append(source.image(int(index)))
        except BadImage as error:
            complaint = f": {error}"
    if not found:
        raise UserError(f"'{source.spec}' has no image that can be read{complaint}")
    return found


def draw_all(
    run: Path,
    device: torch.device,
    kinds: Sequence[str] = KINDS,
    *,
    step: int | None = None,
    images: int = 8,
    size: int = 0,
    data: str | None = None,
    untrained: bool = True,
    references: dict[str, float] | None = None,
) -> list[Path]:
    """Draw pictures of the given kinds into ``run/pictures`` and return their files.

    Args:
        step: which checkpoint; by default the newest. images: how many are shown. size: of the shown crops, pixels;
            0: twice the run's evaluation size. data: where images come from; by default eval.test, else data.train.
        untrained: show the untrained backbone's components too.
        references: see :func:`eval.curves.training_curves`.

    Raises:
        UserError: a kind is unknown, there is no checkpoint, or no image can be read.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--only {kind} is unknown{nearest(kind, KINDS)}\nvalid: {', '.join(KINDS)}")
    pictures = run / "pictures"
    pca = {"step": step, "images": images, "size": size, "data": data, "untrained": untrained}

    def attention() -> Path:
        model, config = _load(run, step)
        source = open_source(data or config.eval.test or config.data.train, config.data.cache)
        chosen = readable_images(source, min(images, _ATTENTION_IMAGES))
        return draw_attention(model, chosen, pictures / "attention.png", size or 2 * config.eval.size, device)

    def neighbours() -> Path:
        model, config = _load(run, step)
        asked = open_source(data or config.eval.test or config.data.train, config.data.cache)
        gallery = open_source(config.eval.train or config.data.train, config.data.cache)
        chosen = readable_images(asked, images)
        e = config.eval
        return draw_neighbours(model, chosen, gallery, pictures / "neighbours.png", e.size, e.resize, device)

    def crops() -> Path:
        _, config = _load(run, step)
        return draw_crops(config, open_source(config.data.train, config.data.cache), pictures / "crops.png")

    drawing: dict[str, Callable[[], Path]] = {
        "curves": lambda: draw_curves(run, references),
        "pca": lambda: draw_pca(run, device, **pca),  # type: ignore[arg-type]
        "foreground": lambda: draw_pca(run, device, foreground=True, **pca),  # type: ignore[arg-type]
        "attention": attention,
        "neighbours": neighbours,
        "crops": crops,
    }
    return [drawing[kind]() for kind in dict.fromkeys(kinds)]


def _load(run: Path, step: int | None) -> tuple[torch.nn.Module, Config]:
    loaded = load_backbone(run, step=step)
    if loaded.config is None:
        raise UserError(f"{run} holds no config; give a run directory")
    return loaded.model, loaded.config


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="eval/pictures.py", description="Pictures of a run, as PNG files.", allow_abbrev=False)
    add = parser.add_argument
    add("--run", metavar="DIR", required=True, help="a run directory; pictures go to DIR/pictures")
    add("--only", metavar="KIND", nargs="+", default=list(KINDS), help=f"which ones: {', '.join(KINDS)} (default: all)")
    add("--step", type=int, help="which checkpoint; by default the newest")
    add("--images", type=int, default=8, help="images in a picture (default: 8)")
    add("--size", type=int, default=0, help="side of those images, pixels; by default twice the run's eval.size")
    add("--data", metavar="SPEC", help="where the images come from; by default eval.test, else data.train")
    add("--no-untrained", action="store_true", help="leave out the row of the untrained backbone")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where to compute (default: auto)")
    return parser


def main() -> int:
    """Run the command line."""
    arguments = _parser().parse_args()
    run = Path(arguments.run)
    if not run.is_dir():
        raise UserError(f"--run {run} does not exist; give the directory of a run, e.g. runs/demo")
    if arguments.images < 1:
        raise UserError(f"--images {arguments.images} is impossible; valid: a number above 0")
    files = draw_all(
        run,
        choose_device(arguments.device),
        arguments.only,
        step=arguments.step,
        images=arguments.images,
        size=arguments.size,
        data=arguments.data,
        untrained=not arguments.no_untrained,
    )
    for file in files:
        print(f"written to {file}")
    return 0


if __name__ == "__main__":
    run_cli(main)
