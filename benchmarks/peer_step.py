"""How long LightlyTrain's DINOv2 step takes for the images, crops, batch, prototypes and precision of a config.

    python benchmarks/peer_step.py --config configs/bench.yaml --steps 8 [key=value …]

Needs ``pip install lightly-train``; with ``--python`` that of another environment does, into which this project need
not be installed. Prints one line of JSON: the seconds of each step without the wait for data, and the process's memory
before anything is saved. ``benchmarks/step.py --lightly`` runs it in turn with our own steps.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}
"""What the peer calls its precisions: it keeps fp32 weights and casts in each operation."""


def settings(config: Any, folder: Path, steps: int) -> dict[str, Any]:
    """Return what the peer's ``pretrain`` must be called with to do the work of ``config``.

    Raises:
        SystemExit: the peer cannot do what the config says.
    """
    if config.model.arch != "vits" or config.model.patch != 14 or config.model.registers or config.ibot_head.separate:
        raise SystemExit("the comparison is for ViT-S/14 without registers and one head for both losses")
    if config.train.batch != config.train.microbatch:
        raise SystemExit("the comparison is for one microbatch a step")
    crops, head = config.crops, config.dino_head
    return {
        "out": str(folder / "out"),
        "data": str(folder / "images"),
        "model": "dinov2/vits14-noreg-notpretrained",
        "model_args": {"drop_path_rate": config.model.drop_path},
        "method": "dinov2",
        "method_args": {
            "output_dim": head.prototypes,
            "hidden_dim": head.hidden,
            "dino_bottleneck_dim": head.bottleneck,
            "student_freeze_last_layer_steps": 1,
            "mask_probability": config.masks.probability,
            "mask_ratio_min": config.masks.ratio[0],
            "mask_ratio_max": config.masks.ratio[1],
        },
        "transform_args": {
            "image_size": (crops.global_size, crops.global_size),
            "local_view": {
                "num_views": crops.local_number,
                "view_size": (crops.local_size, crops.local_size),
            },
        },
        "epochs": 1,
        "batch_size": config.train.batch,
        "num_workers": 0,
        "devices": 1,
        "precision": PRECISIONS[config.train.precision],
        "trainer_args": {"limit_train_batches": steps},
    }


def write_images(config: Any, folder: Path, count: int) -> None:
    """Write the first ``count`` images of the config's data into ``folder``."""
    from dinov2_fsdp.data.sources import open_source

    source = open_source(config.data.train, config.data.cache)
    folder.mkdir(parents=True)
    for number in range(count):
        source.image(number % len(source)).save(folder / f"{number:05d}.png")


def run_peer(arguments: dict[str, Any]) -> dict[str, Any]:
    """Run the peer's training in this process and return the times of its steps."""
    import lightly_train
    import torch
    from lightly_train._methods.dinov2.dinov2 import DINOv2

    seconds, started, before, after = [], [0.0], DINOv2.on_train_batch_start, DINOv2.on_train_batch_end

    def start(self: Any, *args: Any, **kwargs: Any) -> Any:
        plugin = self.trainer.precision_plugin
        if self.device.type == "cpu" and arguments["precision"] != PRECISIONS["fp32"]:
            # The peer sets its mixed precision up for CUDA alone; without, it trains in fp32, with a warning.
            if not hasattr(plugin, "device"):
                raise SystemExit(f"{type(plugin).__name__} does not say on which device it computes in less than fp32")
            plugin.device = "cpu"
        started[0] = time.perf_counter()
        return before(self, *args, **kwargs)

    def end(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = after(self, *args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds.append(time.perf_counter() - started[0])
        if self.device.type == "cuda":
            peak.append(torch.cuda.max_memory_allocated(self.device) / 2**30)
        else:
            peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
        return result

    peak: list[float] = []
    DINOv2.on_train_batch_start, DINOv2.on_train_batch_end = start, end
    lightly_train.pretrain(**arguments)
    return {"version": metadata.version("lightly-train"), "seconds": seconds, "memory": peak[-1]}


def peer(config: Any, steps: int, python: str) -> dict[str, Any]:
    """Return the peer's times, run in a process of its own by the interpreter ``python``.

    Raises:
        SystemExit: it failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(config, folder / "images", steps * config.train.batch)
        call = json.dumps(settings(config, folder, steps))
        command = [python, str(Path(__file__).resolve()), "--call", call]
        done = subprocess.run(command, capture_output=True, text=True, cwd=name, check=False)
        if done.returncode:
            raise SystemExit(f"LightlyTrain ended with code {done.returncode}:\n{done.stderr[-2000:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/peer_step.py", description="LightlyTrain's step.")
    parser.add_argument("--config", default=str(ROOT / "configs" / "bench.yaml"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--python", default=sys.executable, help="of the environment that has lightly-train")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    if arguments.call:
        print(json.dumps(run_peer(json.loads(arguments.call))))
        return 0
    sys.path.insert(0, str(ROOT))
    # Not where this file runs inside the peer's environment.
    from dinov2_fsdp.config import load
    from dinov2_fsdp.errors import UserError, show

    try:
        config = load(arguments.config, arguments.overrides)
    except UserError as error:
        return show(error)
    print(json.dumps(peer(config, arguments.steps, arguments.python)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
