"""Everything that wants a GPU, in one call: what is right first, then how fast it is.

    python benchmarks/gpu.py --seconds 540 --output runs/gpu
    python benchmarks/gpu.py --seconds 540 --output runs/gpu_2 --parts recipes step
    python benchmarks/gpu.py --device cpu --small       # the harness itself, in about a minute; --list: the parts

Each part is a process of its own with its own limit. What it prints is kept in the folder, as NAME.txt and NAME.log,
and ``summary.md`` there is written anew after every part, so that a call that is cut off loses nothing. Needs no
network and no images. Ends with code 1 if a check failed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dinov2_fsdp.errors import RunFailed, UserError, run_cli
from dinov2_fsdp.parallel.place import available_cores, check_devices, visible_gpus

if TYPE_CHECKING:
    from torch import Tensor

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs"
RESERVE = 90.0
"""Seconds that a part keeps for what it has begun, of a longer limit than twice that."""
SHOWN = 200
"""Lines of a part's output that the summary repeats."""


@dataclass(frozen=True)
class Part:
    """One process; ``{left}`` in its command stands for the seconds after which it should begin nothing new."""

    name: str
    what: str
    command: tuple[str, ...]
    limit: float = 120.0
    least: float = 10.0
    """Seconds without which it is not worth starting."""
    check: bool = False
    """Whether its failure means that something is wrong, and not only unknown."""
    skipped: str = ""
    """Why it does not run at all."""


@dataclass(frozen=True)
class Result:
    verdict: str
    seconds: float = 0.0
    failed: bool = False


# -- the parts --------------------------------------------------------------------------------------------------------

SMALL = (
    "crops.global_size=32", "crops.local_size=16", "crops.local_number=2", "model.patch=8", "model.dim=48",
    "model.depth=2", "model.heads=3", "model.ffn=mlp", "dino_head.prototypes=64", "dino_head.hidden=32",
    "dino_head.bottleneck=16", "train.batch=8", "train.microbatch=4", "parallel.threads=1",
)  # fmt: skip
"""A model to try the harness itself with."""


def parts(device: str, small: bool, output: Path) -> list[Part]:
    """Return all parts in their order."""
    cpu = "needs CUDA" if device == "cpu" else ""
    common = (f"parallel.device={device}", *(SMALL if small else ()))

    def check(name: str, what: str, **more: Any) -> Part:
        return Part(name, what, (str(HERE / "gpu.py"), "--check", name, *common), check=True, **more)

    def tool(name: str, *words: str) -> tuple[str, ...]:
        return (str(HERE / f"{name}.py"), *words, *common)

    def configs(*names: str) -> tuple[str, ...]:
        return ("--config", *(str(CONFIGS / f"{name}.yaml") for name in (("debug",) if small else names)))

    # The recipes name images that are not here.
    images = ("data.train=scenes:n=4096", f"data.workers={min(8, available_cores() - 1)}")
    kinds = ("vitl16_in1k", "vitg14", "vits14", "vitb14", "vitl14")
    wide = "--attention xformers sdpa varlen --compile on --microbatch 32 64 128 --colours device"
    varied = ("--steps 4 --attention math sdpa" if small else wide).split()
    return [
        check("environment", "versions, device, driver"),
        Part(
            "attention_bf16", "every attention backend is right and sees one sequence alone",
            tool("attention", "--rounds", "0", *configs("bench", "vitl16_in1k", "vitg14"), "train.precision=bf16"),
            check=True,
        ),
        Part(
            "attention_fp32", "the same in fp32",
            tool("attention", "--rounds", "0", *configs("bench"), "train.precision=fp32"), check=True,
        ),
        check("agreement", "losses and gradients of a small run in fp32 are those of a CPU"),
        check("repetition", "two runs with the same seed: how far they are apart"),
        check("determinism", "two runs with the same seed and train.deterministic are equal bit for bit"),
        check("resumption", "a run that is resumed equals one that was not interrupted"),
        check("colours", "crops.colours=device gives the values of a CPU bit for bit"),
        check("waits", "nothing in the training loop waits for the device", skipped=cpu),
        Part(
            "profile", "where a step's time goes",
            tool("step_profile", *configs("vitl16_in1k"), "--picture", str(output / "profile.png"), *images),
        ),
        Part(
            "attention", "how fast the attention backends are",
            tool("attention", *configs(*kinds), "--rounds", "3", "--json", str(output / "attention.json")),
            limit=150, least=30,
        ),
        Part(
            "recipes", "how fast the trainer is with the recipes",
            tool("recipes", *configs(*kinds), *varied, "--seconds", "{left}", "--json", str(output / "recipes.json")),
            limit=330, least=20,
        ),
        Part(
            "step", "the step of configs/bench.yaml, as on a CPU",
            tool(
                "step", "--rounds", "1", "--steps", "6", "--precision", "bf16", "--lightly", "none",
                "--output", str(output / "step.json"),
            ),
            least=300, skipped="takes minutes whatever the size; run benchmarks/step.py" if small else "",
        ),
    ]  # fmt: skip


# -- running them -----------------------------------------------------------------------------------------------------


def run_part(part: Part, output: Path, seconds: float) -> Result:
    """Run one part for at most its limit or ``seconds``; what it prints goes to NAME.txt, its log to NAME.log."""
    if part.skipped:
        return Result(f"not run: {part.skipped}")
    if seconds < part.least:
        return Result(f"not run: {max(0.0, seconds):.0f} s were left; --parts {part.name}")
    limit = min(part.limit, seconds)
    left = limit - min(RESERVE, limit / 2)
    command = [sys.executable, *(word.replace("{left}", f"{left:.0f}") for word in part.command)]
    started = time.monotonic()
    with open(output / f"{part.name}.txt", "w") as text, open(output / f"{part.name}.log", "w") as log:
        process = subprocess.Popen(command, stdout=text, stderr=log, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            return Result(f"stopped after {limit:.0f} s", time.monotonic() - started, failed=True)
        finally:
            # With the group, what the part has started: nothing may keep the device busy.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    verdict = f"FAILED (code {code})" if code else "passed" if part.check else "done"
    return Result(verdict, time.monotonic() - started, failed=code != 0)


def run_all(chosen: Sequence[Part], output: Path, seconds: float) -> dict[str, Result]:
    """Run the parts one after the other, and write the summary before the first and after each."""
    deadline = time.monotonic() + seconds
    results: dict[str, Result] = {}
    write_summary(chosen, results, output)
    for part in chosen:
        # The last one may as well use all that is left.
        alone = replace(part, limit=seconds) if part is chosen[-1] else part
        results[part.name] = run_part(alone, output, deadline - time.monotonic())
        write_summary(chosen, results, output)
        print(f"{part.name}: {results[part.name].verdict} ({results[part.name].seconds:.0f} s)", flush=True)
    return results


def write_summary(chosen: Sequence[Part], results: dict[str, Result], output: Path) -> None:
    """Write ``summary.md``: a table of the parts, then what each of them printed."""
    lines = ["| part | | result | s |", "|---|---|---|---:|"]
    for part in chosen:
        result = results.get(part.name, Result("not reached"))
        verdict = f"**{result.verdict}**" if result.failed else result.verdict
        lines.append(f"| {part.name} | {part.what} | {verdict} | {result.seconds:.0f} |")
    for part in chosen:
        if part.name not in results or part.skipped:
            continue
        lines += ["", f"## {part.name}", "", *_end_of(output / f"{part.name}.txt")]
        if results[part.name].failed:
            lines += ["", "```", *_end_of(output / f"{part.name}.log"), "```"]
        if (output / f"{part.name}.png").exists():
            lines += ["", f"![{part.what}]({part.name}.png)"]
    draft = output / "summary.md.tmp"
    draft.write_text("\n".join(lines) + "\n")
    draft.replace(output / "summary.md")


def _end_of(file: Path) -> list[str]:
    return file.read_text(errors="replace").splitlines()[-SHOWN:] if file.exists() else []


# -- the checks, each in its own process ------------------------------------------------------------------------------

RUN = (
    "data.train=scenes:n=64", "data.workers=0", "train.duration=4it", "optim.warmup=1it",
    "optim.freeze_prototypes=0it", "loss.teacher_temperature_warmup=1it", "checkpoint.every=0it",
    "eval.every=0it", "log.every=1it", "log.tensorboard=false", "model.layer_scale=1.0",
)  # fmt: skip
LOSS_APART, GRADIENT_APART = 1e-3, 1e-2
"""How far losses and gradient norms of a CPU and another device may lie apart, as a share, within four steps."""


def _config(overrides: Iterable[str]) -> Any:
    from dinov2_fsdp.config import load

    return load(str(CONFIGS / "debug.yaml"), [*RUN, *overrides])


def _train(run: Path, overrides: Iterable[str], evaluations: Any = None) -> list[dict[str, Any]]:
    """Run the trainer in this process and return its metrics; if it fails, show the end of its log."""
    from dinov2_fsdp.train import train

    try:
        train(_config([*overrides, f"output_dir={run}"]), evaluations, console=False)
    except RunFailed:
        print("\n".join(_end_of(run / "logs" / "rank_0.log")), file=sys.stderr)
        raise
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _saved(run: Path) -> dict[str, Tensor]:
    """Return the tensors of a run's last checkpoint, which one process saved."""
    from safetensors.torch import load_file

    from dinov2_fsdp.checkpoint import find_checkpoint

    files = sorted(find_checkpoint(run).path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _equal(first: Path, second: Path) -> bool:
    """Say whether two runs saved the same, and if not by how much they differ."""
    one, other = _saved(first), _saved(second)
    if one.keys() != other.keys():
        print(f"other tensors: {sorted(one.keys() ^ other.keys())[:5]}")
        return False
    apart = {name: float((one[name].double() - other[name].double()).abs().max()) for name in one if one[name].numel()}
    if differing := [name for name, value in apart.items() if value != 0]:
        worst = max(differing, key=lambda name: apart[name])
        print(f"{len(differing)} of {len(one)} tensors differ, {worst} most: {apart[worst]:.3g}")
    else:
        print(f"{len(one)} tensors, equal bit for bit")
    return not differing


def environment(overrides: list[str], folder: Path) -> bool:
    import torch

    from dinov2_fsdp.monitor.environment import write_environment

    device = _config(overrides).parallel.device
    print("\n".join(f"- {key}: {value}" for key, value in write_environment(folder, 1, device).items()))
    with contextlib.suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        print(f"- driver: {subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()}")
    for name in ("xformers.ops", "torch.nn.attention.varlen"):
        try:
            importlib.import_module(name)
            print(f"- {name}: can be imported")
        except Exception as error:  # whatever a library's compiled part does beside this torch
            print(f"- {name}: {type(error).__name__}: {error}")
    return bool(device == "cpu" or torch.cuda.is_available())


def agreement(overrides: list[str], folder: Path) -> bool:
    plain = ["train.precision=fp32", "model.drop_path=0.1"]
    expected = _train(folder / "cpu", [*overrides, *plain, "parallel.device=cpu", "parallel.attention=math"])
    keys = [key for key in expected[0] if key == "loss" or key.startswith("grad_norm")]
    titles = ["attention", "step", *(f"{key}, {what}" for key in keys for what in ("CPU", "apart"))]
    print(f"| {' | '.join(titles)} |\n|---|{'---:|' * (len(titles) - 1)}")
    agrees = True
    for attention in ("auto", "sdpa"):
        found = _train(folder / attention, [*overrides, *plain, f"parallel.attention={attention}"])
        for here, there in zip(expected, found, strict=True):
            apart = {key: abs(there[key] - here[key]) / abs(here[key]) for key in keys}
            agrees &= all(apart[key] <= (LOSS_APART if key == "loss" else GRADIENT_APART) for key in keys)
            cells = " | ".join(f"{here[key]:.6g} | {apart[key]:.1e}" for key in keys)
            print(f"| {attention} | {here['step']} | {cells} |")
    return agrees


def repetition(overrides: list[str], folder: Path) -> bool:
    for name in ("first", "second"):
        _train(folder / name, [*overrides, "train.precision=bf16"])
    equal = _equal(folder / "first", folder / "second")
    return equal or "train.deterministic=true" not in overrides


def determinism(overrides: list[str], folder: Path) -> bool:
    return repetition([*overrides, "train.deterministic=true"], folder)


def resumption(overrides: list[str], folder: Path) -> bool:
    from dinov2_fsdp.checkpoint import list_checkpoints

    saving = [*overrides, "train.deterministic=true", "train.duration=6it", "checkpoint.every=3it"]
    _train(folder / "whole", saving)
    shutil.copytree(folder / "whole", folder / "resumed")
    earlier, last = list_checkpoints(folder / "resumed")
    shutil.rmtree(last.path)
    before = earlier.path.stat().st_mtime_ns
    _train(folder / "resumed", saving)
    # A run that began anew would have the same end, and would have saved this one again.
    kept = earlier.path.stat().st_mtime_ns == before
    print(f"resumed from step {earlier.step}: {kept}")
    return _equal(folder / "whole", folder / "resumed") and kept


def colours(overrides: list[str], folder: Path) -> bool:
    import torch

    from dinov2_fsdp.data.loader import Microbatches
    from dinov2_fsdp.data.sources import open_source

    config = _config([*overrides, "crops.colours=device", "crops.solarize=0.5", "crops.gray=0.5"])
    microbatches, equal = Microbatches(config, open_source(config.data.train, config.data.cache)), True
    for step in range(4):
        there = microbatches[step, 0].to(torch.device(config.parallel.device)).coloured()
        here = microbatches[step, 0]
        assert here.global_colours is not None
        operations = sorted({segment.operation for segment in here.global_colours.segments})
        here = here.coloured()
        same = all(torch.equal(getattr(here, n), getattr(there, n).cpu()) for n in ("global_crops", "local_crops"))
        print(f"- {', '.join(operations)}: {'equal bit for bit' if same else 'DIFFERENT'}")
        equal &= same
    return equal


def waits(overrides: list[str], folder: Path) -> bool:
    """The loop of the trainer, between two evaluations that switch torch's own alarm on and off."""
    import torch

    modes = iter(("default", "error", "default", "default"))

    def switch(*_: object) -> dict[str, float]:
        torch.cuda.set_sync_debug_mode(next(modes))
        return {}

    # Metrics are read at the very end, behind the last evaluation that could be in their way: they have to wait.
    loop = ["train.duration=12it", "eval.every=4it", "eval.tasks=[switch]", "log.every=1000it", "crops.colours=device"]
    _train(folder / "run", [*overrides, "train.precision=bf16", *loop], {"switch": switch})
    print("steps 5 to 8: nothing that torch knows of made the host wait")
    return True


CHECKS: dict[str, Callable[[list[str], Path], bool]] = {
    function.__name__: function
    for function in (environment, agreement, repetition, determinism, resumption, colours, waits)
}


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.py", description="Checks and timings on a GPU.")
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=540.0, help="of all parts together (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the harness itself")
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument("--list", action="store_true", help="print the parts and end")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.check:
        with tempfile.TemporaryDirectory() as folder:
            return 0 if CHECKS[arguments.check](arguments.overrides, Path(folder)) else 1
    if arguments.overrides:
        raise UserError(f"{arguments.overrides[0]}: there is nothing to override here; --small is the only other size")
    named = arguments.list and arguments.device != "cpu"  # without a GPU too
    device = "cuda" if named else check_devices(arguments.device, 1, visible_gpus())
    if device == "cpu" and arguments.device == "auto":
        raise UserError("there is no GPU here; --device cpu --small tries the harness itself on a CPU")
    everything = parts(device, arguments.small, arguments.output.resolve())
    if unknown := set(arguments.parts or ()) - {part.name for part in everything}:
        names = ", ".join(part.name for part in everything)
        raise UserError(f"--parts {' '.join(sorted(unknown))}: there are no such parts; valid: {names}")
    chosen = [part for part in everything if arguments.parts is None or part.name in arguments.parts]
    if arguments.list:
        for part in chosen:
            print(f"{part.name}: {part.what}" + (f" ({part.skipped})" if part.skipped else ""))
        return 0
    arguments.output.mkdir(parents=True, exist_ok=True)
    if (arguments.output / "summary.md").exists():
        raise UserError(f"{arguments.output} holds an earlier call's results; choose another --output")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the part under way ends too
    results = run_all(chosen, arguments.output.resolve(), arguments.seconds)
    print(f"\n{arguments.output / 'summary.md'}")
    return 1 if any(results[part.name].failed for part in chosen if part.check) else 0


if __name__ == "__main__":
    run_cli(main)
