"""Kill a run at random moments, start it again by the same command each time, and compare its end with that of a run
that nothing happened to.

    python benchmarks/chaos.py --kills 30

Every kill is a SIGKILL to all processes at once, as when a node loses power: at start-up, in the middle of a step,
while a checkpoint is being written. At the end all weights, moments, centres and metrics must be equal, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

CONFIG = """
data: {train: "scenes:n=48,size=32", workers: 1}
crops: {global_size: 16, local_size: 8, local_number: 2}
model: {arch: vits, patch: 4, dim: 48, depth: 3, heads: 3, drop_path: 0.3, layer_scale: 0.1}
dino_head: {prototypes: 64, hidden: 64, bottleneck: 16}
loss: {teacher_temperature_warmup: 10%}
optim: {warmup: 10%, freeze_prototypes: 5%}
train: {batch: 8, microbatch: 4, precision: fp32, deterministic: true}
parallel: {device: cpu, threads: 1}
log: {every: 1it, tensorboard: false}
"""
CLOCK = ("seconds", "time", "img_per_s", "eta", "data_wait", "memory", "core_hours")


def command(folder: Path, name: str, arguments: argparse.Namespace) -> list[str]:
    return [
        sys.executable, str(ROOT / "launchers" / "local.py"), "--config", str(folder / "chaos.yaml"),
        "--nproc", str(arguments.ranks), "--output-dir", str(folder / name),
        f"train.duration={arguments.steps}it", f"checkpoint.every={arguments.every}it",
    ]  # fmt: skip


def start(command: list[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def last_step(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith(b"}")]
    return max(steps, default=0)


def finish(command: list[str]) -> float:
    begin = time.monotonic()
    code = start(command).wait()
    if code != 0:
        raise SystemExit(f"the run ended with exit code {code}: {' '.join(command)}")
    return time.monotonic() - begin


def compare(first: Path, second: Path) -> tuple[int, list[str]]:
    """Return the number of tensors compared and the names of those that differ; metrics count as one more."""
    import torch
    import torch.distributed.checkpoint as dcp

    from dinov2_fsdp.checkpoint import find_checkpoint

    def tensors(run_dir: Path) -> dict[str, Any]:
        reader = dcp.HuggingFaceStorageReader(str(find_checkpoint(run_dir).path))
        saved = reader.read_metadata().state_dict_metadata
        found = {name: torch.empty(s.size, dtype=s.properties.dtype) for name, s in saved.items()}  # type: ignore[union-attr]
        dcp.load(found, storage_reader=reader, no_dist=True)
        return found

    def metrics(run_dir: Path) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        timed = (*CLOCK, "time/", "pause/")
        return [
            {key: value for key, value in line.items() if not key.startswith(timed)}
            for line in lines
            if "checkpoint/stall_s" not in line
        ]

    one, other = tensors(first), tensors(second)
    differing = [name for name in sorted(one.keys() | other.keys()) if not torch.equal(one[name], other[name])]
    if metrics(first) != metrics(second):
        differing.append("metrics.jsonl")
    return len(one), differing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs to survive")
    parser.add_argument("--steps", type=int, default=600, help="steps of the run")
    parser.add_argument("--every", type=int, default=10, help="steps between two checkpoints")
    parser.add_argument("--ranks", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where the runs go; by default a temporary folder")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chaos.yaml").write_text(CONFIG)

    seconds = finish(command(folder, "undisturbed", arguments))
    print(f"undisturbed: {arguments.steps} steps in {seconds:.0f} s")
    chaotic, killed_at = folder / "chaotic", []
    begin = time.monotonic()
    for number in range(arguments.kills):
        process = start(command(folder, "chaotic", arguments))
        # Some kills hit the start, which takes seconds; most wait until this life has made some steps.
        wait_for = last_step(chaotic) + moments.randint(1, max(2, 2 * arguments.steps // arguments.kills))
        startup = moments.random() < 0.2
        deadline = time.monotonic() + (moments.uniform(0.5, 12.0) if startup else 600.0)
        while process.poll() is None and time.monotonic() < deadline and (startup or last_step(chaotic) < wait_for):
            time.sleep(0.01)
        time.sleep(moments.uniform(0.0, 0.3))
        if process.poll() is not None:
            print(f"the run was complete before kill {number + 1}", flush=True)
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        killed_at.append(last_step(chaotic))
        print(f"kill {number + 1}/{arguments.kills} after step {killed_at[-1]}", flush=True)
    finish(command(folder, "chaotic", arguments))
    minutes = (time.monotonic() - begin) / 60
    count, differing = compare(folder / "undisturbed", chaotic)
    print(f"{len(killed_at)} kills in {minutes:.1f} minutes; {count} tensors and all metrics compared: ", end="")
    print("all equal, bit for bit" if not differing else f"DIFFERENT: {', '.join(differing[:8])}")
    return 1 if differing or len(killed_at) < arguments.kills else 0


if __name__ == "__main__":
    raise SystemExit(main())
