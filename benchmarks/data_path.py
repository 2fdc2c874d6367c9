"""How fast images become crops: the reference path and the fast one side by side; the table of docs/performance.md.

    python benchmarks/data_path.py --images tar:PATH
    python benchmarks/data_path.py --images folder:/my/photos --rounds 3 crops.local_size=96 --lightly

Both paths, and the fast one without the colours that ``crops.colours=device`` leaves to the device, get the same
images and draws in turn, a few at a time and several times over; of each few the best round counts. Times are CPU
time of one process, prepared as a data worker is (``prepare_worker``), so that a core shared with others does not
show, and images a second are those of one core. What the device needs for the colours is timed apart: on a GPU if
there is one (``parallel.device``), by its own clock.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_image

from dinov2_fsdp.config import Config, load
from dinov2_fsdp.data import augment, fast_augment
from dinov2_fsdp.data.augment import CropParameters
from dinov2_fsdp.data.batch import IMAGE_MEAN, IMAGE_STD
from dinov2_fsdp.data.loader import Microbatches, prepare_worker
from dinov2_fsdp.data.sources import Source, open_source
from dinov2_fsdp.data.sources.decoding import LazyImage
from dinov2_fsdp.errors import run_cli
from dinov2_fsdp.parallel.place import check_devices
from dinov2_fsdp.rng import generator

STAGES = ("read", "open, draw", "decode", "crop, resize", "colour, flip", "blur")
"""Timed one by one, apart from the whole: with colder caches, so that they add up to some per cent more."""

PATHS: dict[str, dict[str, str]] = {
    "reference": {"implementation": "reference", "colours": "worker"},
    "fast": {"implementation": "fast", "colours": "worker"},
    "colours=device": {"implementation": "fast", "colours": "device"},
}
"""Settings of the crops that are compared; of the last, only what a worker does, flips in with its resampling."""

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "lightly-train")

Times = dict[str, float]


def without(parameters: CropParameters, colour: bool, blur: bool) -> CropParameters:
    """Return the parameters with colours (flip and solarisation too) or blur left out."""
    if colour:
        parameters = replace(parameters, flip=False, jitter=(), gray=False, solarize_threshold=None)
    return replace(parameters, blur_sigma=None) if blur else parameters


def stages(microbatches: Microbatches, place: tuple[int, int]) -> Times:
    """Return the CPU seconds that one microbatch spends in each of ``STAGES``, and in all of them (``whole``)."""
    config, source, crops = microbatches.config, microbatches.source, microbatches.crops
    fast, by_device = config.crops.implementation == "fast", config.crops.colours == "device"
    step, size = place[0], config.train.microbatch
    sizes = [config.crops.global_size] * 2 + [config.crops.local_size] * config.crops.local_number
    marks, opened = np.zeros(len(STAGES)), []
    # Several are opened before the first is decoded, as the loader does.
    for i, sample in enumerate(microbatches.stream.samples(step, place[1] * size, size).tolist()):
        clock = [time.process_time()]
        data, name = source.encoded(sample), source.name(sample)
        clock.append(time.process_time())
        image = LazyImage.of(source.image(sample)) if data is None else LazyImage(data, name)
        opened.append((image, crops.draw(image.width, image.height, generator(config.seed, "augment", step, i))))
        clock.append(time.process_time())
        marks[:2] += np.diff(clock)
    for image, parameters in opened:
        started = time.process_time()
        apply: Callable[[Any, CropParameters, int], Any] = augment.apply
        pixels: Any
        if fast:
            apply = fast_augment.apply
            factor = fast_augment.reduction(parameters, sizes) if image.reducible else 1
            pixels = image.pixels(factor)
            parameters = [replace(d, box=fast_augment.reduced_box(d.box, factor, pixels)) for d in parameters]
        else:
            pixels = image.rgb()
        marks[2] += time.process_time() - started
        ways = [
            [without(d, *left_out) for d in parameters] for left_out in ((True, True), (False, True), (False, False))
        ]
        if by_device:
            ways = [[fast_augment.uncoloured(drawn) for drawn in parameters]]
        for number, chosen in enumerate(ways, 3):
            started = time.process_time()
            for drawn, side in zip(chosen, sizes, strict=True):
                apply(pixels, drawn, side)
            marks[number] += time.process_time() - started
    if by_device:
        marks[4:] = marks[3]
    started = time.process_time()
    microbatches[place]
    whole = time.process_time() - started
    read, drawn, decoded, resized, coloured, blurred = marks.tolist()
    split = (read, drawn, decoded, resized, coloured - resized, blurred - coloured)
    return {**dict(zip(STAGES, split, strict=True)), "whole": whole}


def measure(config: Config, source: Source, count: int, few: int, rounds: int) -> dict[str, Times]:
    """Return each path's milliseconds per image and stage, the best of ``rounds`` for every ``few`` images."""
    paths = {
        name: Microbatches(replace(config, crops=replace(config.crops, **changes)), source)
        for name, changes in PATHS.items()
    }
    best: dict[str, list[dict[int, float]]] = {name: [{} for _ in (*STAGES, "whole")] for name in paths}
    for _ in range(rounds):
        for step in range(count // few):
            for name, microbatches in paths.items():
                found = stages(microbatches, (step, 0))
                for kept, seconds in zip(best[name], found.values(), strict=True):
                    kept[step] = min(kept.get(step, seconds), seconds)
    images = count // few * few
    return {
        name: {
            stage: 1000 * sum(kept.values()) / images
            for stage, kept in zip((*STAGES, "whole"), columns, strict=True)
        }
        for name, columns in best.items()
    }  # fmt: skip


def measure_device(config: Config, source: Source, device: torch.device, count: int, few: int, rounds: int) -> float:
    """Return the milliseconds per image of the colours on ``device``, the best of ``rounds`` for every ``few``."""
    microbatches = Microbatches(replace(config, crops=replace(config.crops, **PATHS["colours=device"])), source)
    best = [float("inf")] * (count // few)
    microbatches[0, 0].to(device).coloured()  # kernels are loaded, memory is obtained
    for _ in range(rounds):
        for step in range(count // few):
            batch = microbatches[step, 0].to(device)
            best[step] = min(best[step], seconds_on(device, batch.coloured))
    return 1000 * sum(best) / (count // few * few)


def seconds_on(device: torch.device, work: Callable[[], object]) -> float:
    """Return how long the device works: CPU time, or a GPU's time from the first kernel to the last."""
    if device.type == "cpu":
        started = time.process_time()
        work()
        return time.process_time() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def lightly(config: Config) -> Callable[[bytes], Any]:
    """Return LightlyTrain's way from a file to the config's crops: torchvision's decoder, the dinov2 transform."""
    from lightly_train._methods.dinov2.dinov2_transform import DINOv2ViTTransform

    crops = config.crops
    arguments = DINOv2ViTTransform.transform_args_cls()()
    arguments.image_size = (crops.global_size, crops.global_size)
    arguments.random_resize.min_scale, arguments.random_resize.max_scale = crops.global_scale
    arguments.local_view.num_views = crops.local_number
    arguments.local_view.view_size = (crops.local_size, crops.local_size)
    arguments.local_view.random_resize.min_scale, arguments.local_view.random_resize.max_scale = crops.local_scale
    arguments.resolve_auto()
    arguments.resolve_incompatible()
    transform = DINOv2ViTTransform(arguments)

    def crop(data: bytes) -> Any:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return transform({"image": decode_image(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()})

    return crop


def torchvision(config: Config) -> Callable[[bytes], Any]:
    """Return the released DINOv2 code's way from a file to the config's crops: Pillow, torchvision's transforms."""
    crops = config.crops
    jitter = transforms.ColorJitter(*crops.jitter_strength)
    colours = [transforms.RandomApply([jitter], crops.jitter), transforms.RandomGrayscale(crops.gray)]
    blur = transforms.GaussianBlur(9, (0.1, 2.0))
    ending = [transforms.ToTensor(), transforms.Normalize(IMAGE_MEAN, IMAGE_STD)]

    def view(size: int, scale: tuple[float, float], blur_p: float, *others: Any) -> Any:
        crop = transforms.RandomResizedCrop(size, scale, interpolation=transforms.InterpolationMode.BICUBIC)
        flip = transforms.RandomHorizontalFlip(crops.flip)
        return transforms.Compose([crop, flip, *colours, transforms.RandomApply([blur], blur_p), *others, *ending])

    p = augment.BLUR_PROBABILITIES[crops.blur]
    whole, part = (crops.global_size, crops.global_scale), (crops.local_size, crops.local_scale)
    solarize = transforms.RandomSolarize(128, crops.solarize)
    views = [view(*whole, p[0]), view(*whole, p[1], solarize), *[view(*part, p[2])] * crops.local_number]

    def crop(data: bytes) -> Any:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        return [one(image) for one in views]

    return crop


def measure_peer(crop: Callable[[bytes], Any], source: Source, count: int, few: int, rounds: int) -> float:
    """Return the milliseconds per image of somebody else's way from a file to crops, without stacking them."""
    best = [float("inf")] * (count // few)
    for _ in range(rounds):
        for step in range(count // few):
            started = time.process_time()
            for index in range(step * few, (step + 1) * few):
                crop(source.encoded(index) or b"")
            best[step] = min(best[step], time.process_time() - started)
    return 1000 * sum(best) / (count // few * few)


def table(found: dict[str, Times], peers: Times) -> str:
    """Return the measurements as a Markdown table."""
    reference, fast, worker = (found[name] for name in PATHS)
    rows = ["| ms an image | reference | fast | ratio | worker, colours=device |", "|---|---:|---:|---:|---:|"]
    for stage in (*STAGES, "whole"):
        ratio = f"{reference[stage] / fast[stage]:.1f} ×" if reference[stage] > 0 < fast[stage] else ""
        rows.append(f"| {stage} | {reference[stage]:.2f} | {fast[stage]:.2f} | {ratio} | {_cell(worker[stage])} |")
    rate = [1000 / times["whole"] for times in (reference, fast, worker)]
    rows.append(
        f"| **img/s per core** | **{rate[0]:.0f}** | **{rate[1]:.0f}** | **{rate[1] / rate[0]:.1f} ×** "
        f"| **{rate[2]:.0f}** |"
    )
    for name, peer in peers.items():
        rows.append(f"| {name} | {peer:.2f} ms | {1000 / peer:.0f} img/s | fast is {peer * rate[1] / 1000:.1f} × | |")
    return "\n".join(rows)


def _cell(milliseconds: float) -> str:
    return f"{milliseconds:.2f}" if milliseconds else "–"


COLOURS = ("#bbbbbb", "#888888", "#ccbb44", "#4477aa", "#228833", "#66ccee", "#dddddd")
"""Of the stages, and of what is left of the whole."""


def draw(found: dict[str, Times], peers: Times, images: int, path: str) -> None:
    """Draw each path's time as one horizontal bar of its stages, and the peers' as one of the whole."""
    from matplotlib.figure import Figure

    names = [*found, *peers]
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    starts = dict.fromkeys(found, 0.0)
    for stage, colour in zip((*STAGES, "masks, all else"), COLOURS, strict=True):
        if stage in STAGES:
            lengths = {name: times[stage] for name, times in found.items()}
        else:
            # Timed hot and one by one, stages may also add up to more than the whole.
            lengths = {name: max(0.0, found[name]["whole"] - start) for name, start in starts.items()}
        axes.barh(list(lengths), list(lengths.values()), left=list(starts.values()), color=colour, label=stage)
        starts = {name: starts[name] + length for name, length in lengths.items()}
    if peers:
        axes.barh(list(peers), list(peers.values()), color="white", edgecolor="#888888", hatch="///", label="not split")
    wholes = {**{name: times["whole"] for name, times in found.items()}, **peers}
    for name, whole in wholes.items():
        end = max(whole, starts.get(name, 0.0))
        axes.annotate(
            f"{whole:.2f} ms, {1000 / whole:.0f} a second", (end, name), (4, 0), textcoords="offset points", va="center"
        )
    axes.set_xlim(0, 1.3 * max(wholes.values()))
    axes.invert_yaxis()
    axes.set_xlabel("CPU time of an image, ms")
    axes.set_title(f"From a file to its crops, one core, {images} images", loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, fontsize="small", frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", required=True, help="as data.train: tar:PATH, folder:PATH, …")
    parser.add_argument("--config", help="whose crops; by default the framework's: 2 × 224 and 8 × 98")
    parser.add_argument("--count", type=int, default=300, help="images (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="times that each is measured (default: %(default)s)")
    parser.add_argument(
        "--few", type=int, default=20, help="images before the other path's turn (default: %(default)s)"
    )
    parser.add_argument("--torchvision", action="store_true", help="torchvision's transforms too, as DINOv2's code has")
    parser.add_argument("--lightly", action="store_true", help="LightlyTrain's transform too; it must be installed")
    parser.add_argument("--picture", help="draw it here (png, svg, pdf)")
    parser.add_argument("--json", default="runs/data_path.json", help="file to write (default: %(default)s)")
    parser.add_argument("overrides", nargs="*", help="key=value of the config")
    arguments = parser.parse_intermixed_args()

    torch.set_num_threads(1)
    prepare_worker()
    few, rounds = arguments.few, arguments.rounds
    config = load(
        arguments.config,
        [f"data.train={arguments.images}", *arguments.overrides, f"train.microbatch={few}", f"train.batch={few}"],
    )
    source = open_source(config.data.train, config.data.cache)
    count = max(few, min(arguments.count, len(source)))
    found = measure(config, source, count, few, rounds)
    device = torch.device(check_devices(config.parallel.device, 1, torch.cuda.device_count()))
    coloured = measure_device(config, source, device, count, few, rounds)
    chosen = {"torchvision": arguments.torchvision and torchvision, "LightlyTrain": arguments.lightly and lightly}
    if source.encoded(0) is None and any(chosen.values()):
        print("the peers read image files, and these images are none: left out", file=sys.stderr)
        chosen = {}
    peers = {
        name: measure_peer(made(config), source, count, few, rounds) for name, made in chosen.items() if made
    }  # fmt: skip
    print(table(found, peers))
    print(f"\ncolours of an image's crops on the device ({device.type}): {coloured:.2f} ms")
    if arguments.picture:
        draw(found, peers, count, arguments.picture)
    result = {
        "command": ["python", *sys.orig_argv[1:]],
        "date": date.today().isoformat(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "images": count,
        "rounds": rounds,
        "milliseconds": found,
        "colours": {"device": device.type, "milliseconds": coloured},
        "peers": peers,
    }
    Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.json).write_text(json.dumps(result, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    run_cli(main)
