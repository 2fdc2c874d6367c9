"""What an installation shows in some minutes: ``python launchers/demo.py`` trains on rendered scenes and evaluates.

It starts a real run (``launchers/local.py --config configs/demo.yaml``) and then compares the k-NN accuracy of raw
pixels, of the untrained backbone and of the trained teacher on scenes that the run has not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.signals import STOPPING
from launchers.local import end_with_parent

ROOT = Path(__file__).resolve().parents[1]

_K = 20
_SUMMARY = "summary.json"


def clear(folder: Path) -> None:
    """Remove a finished demo; leave an unfinished one, which the trainer resumes.

    Raises:
        UserError: ``folder`` holds something that is no run.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} exists but is no run directory, so it is left alone; use another --output-dir")
    if (folder / _SUMMARY).is_file() and (folder / "checkpoints").is_dir():
        shutil.rmtree(folder)


def train_command(folder: Path, overrides: list[str]) -> list[str]:
    """Return the command that trains the demo, to be run from the repository's root."""
    local = [sys.executable, "launchers/local.py", "--config", "configs/demo.yaml"]
    return [*local, "--output-dir", str(folder), *overrides]


def train(command: list[str]) -> int:
    """Run the trainer to its end and return its exit code; hand on the signals that ask it to save and stop.

    It gets each once: in a session of its own a terminal's Ctrl-C does not reach it by another way too.
    """
    trainer: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, _frame: object) -> None:
        if trainer is None:
            raise KeyboardInterrupt
        trainer.send_signal(number)

    earlier = {number: signal.signal(number, hand_on) for number in STOPPING}
    try:
        # Without the terminal as its input: with one, several ranks would wait for that to interrupt them.
        trainer = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=end_with_parent
        )
        return trainer.wait()
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def evaluate(folder: Path) -> dict[str, float]:
    """Return k-NN accuracy, percent, as ``knn_pixels``, ``knn_untrained`` and ``knn_trained``; draw both pictures."""
    import torch

    from dinov2_fsdp.weights import load_backbone, untrained_backbone
    from eval.features import choose_device, frozen, pixel_features
    from eval.knn import Settings, counts_of, describe, features_of_both, open_both
    from eval.neighbours import knn_accuracy
    from eval.pictures import draw_curves, draw_pca
    from eval.results import record

    started = time.monotonic()
    loaded = load_backbone(folder)
    config = loaded.config
    assert config is not None
    device = choose_device(config.parallel.device)
    settings = Settings.of(config.eval)
    train, test = open_both(config)
    models = {
        "pixels": pixel_features,
        "untrained": frozen(untrained_backbone(config), settings.size, device),
        "trained": frozen(loaded.model, settings.size, device),
    }
    widths: list[int] = []

    def all_of_them(images: torch.Tensor) -> dict[str, torch.Tensor]:
        tokens = [model(images)["x_norm_clstoken"].float() for model in models.values()]
        widths[:] = [part.shape[1] for part in tokens]
        return {"x_norm_clstoken": torch.cat(tokens, dim=1)}

    # One pass over the images for all three: drawing the scenes costs more than looking at them.
    bank, queries = features_of_both(
        all_of_them, train, test, settings, device, workers=config.data.workers, progress=True
    )
    parts = zip(bank.features.split(widths, dim=1), queries.features.split(widths, dim=1), strict=True)
    accuracy = {
        name: knn_accuracy(known, bank.labels, asked, queries.labels, (*settings.k, _K), settings.temperature)
        for name, (known, asked) in zip(models, parts, strict=True)
    }
    metrics = {f"knn_{k}": percent for k, percent in accuracy["trained"].items()}
    counts = counts_of(bank, queries)
    results = describe("teacher", settings, device, metrics, train, test, counts, time.monotonic() - started)
    record(results | {"checkpoint": loaded.source, "step": loaded.step}, "knn", f"knn_{_K}", folder)
    references = {"raw pixels": accuracy["pixels"][_K], "untrained": accuracy["untrained"][_K]}
    draw_curves(folder, references)
    draw_pca(folder, device)
    return {f"knn_{name}": round(percent[_K], 2) for name, percent in accuracy.items()}


def machine() -> dict[str, Any]:
    """Return what the numbers were measured on: cores, the processor's name, the GPU's if there is one."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cores": cores, "cpu": _processor(), "gpu": gpu, "system": platform.platform(), "torch": torch.__version__}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _show(summary: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    table.add_column("")
    for key, name in (("knn_pixels", "raw pixels"), ("knn_untrained", "untrained"), ("knn_trained", "trained")):
        style = "bold green" if key == "knn_trained" else ""
        table.add_row(name, f"{summary[key]:.1f} %", "█" * round(summary[key] / 2.5), style=style)
    console.print(f"\nk-NN accuracy (k = {_K}) on scenes never seen", style="bold")
    console.print(table)
    minutes, seconds = divmod(round(summary["seconds_total"]), 60)
    where = summary["machine"]["gpu"] or f"{summary['machine']['cores']} cores of {summary['machine']['cpu']}"
    console.print(f"\n{minutes} min {seconds:02d} s on {where}")
    for label, path in (
        ("training curves", folder / "pictures" / "curves.png"),
        ("what patches see", folder / "pictures" / "pca.png"),
        ("all numbers", folder / _SUMMARY),
    ):
        console.print(f"{label:<17} {path}", soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="launchers/demo.py",
        description="Train on rendered scenes for some minutes, then show what was learnt.",
    )
    parser.add_argument(
        "--output-dir", metavar="DIR", type=Path, default=Path("runs/demo"), help="run directory (default: runs/demo)"
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the command that trains")
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", help="changes to configs/demo.yaml")
    return parser


def main() -> int:
    """Run the command line; return the trainer's exit code if it fails."""
    arguments = _parser().parse_intermixed_args()
    folder = arguments.output_dir.resolve()
    command = train_command(folder, arguments.overrides)
    print(f"+ {shlex.join(command)}", flush=True)
    if arguments.dry_run:
        return 0
    clear(folder)
    started = time.monotonic()
    code = train(command)
    if code:
        return code
    trained = time.monotonic()
    numbers = evaluate(folder)
    summary = {
        **numbers,
        "k": _K,
        "seconds_train": round(trained - started, 1),
        "seconds_total": round(time.monotonic() - started, 1),
        "command": shlex.join(["python", *command[1:]]),
        "machine": machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    (folder / _SUMMARY).write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    _show(summary, arguments.output_dir)
    return 0


if __name__ == "__main__":
    run_cli(main)
