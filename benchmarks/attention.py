"""The attention backends against each other, on the packed shapes that a config's step gives to one block.

    python benchmarks/attention.py                                    # configs/bench.yaml, on the GPU if there is one
    python benchmarks/attention.py --config configs/vitl16_in1k.yaml configs/vitg14.yaml --json attention.json
    python benchmarks/attention.py --rounds 0 parallel.device=cpu     # what is right and wrong, no times

Of one microbatch: the student's crops, global and local, as many of them as stochastic depth keeps, forward and
backward; the teacher's global crops, forward alone. Everything counts from the packed output of the qkv layer to the
gradient in it, with what a backend needs to bring its operands into order. (On a CPU training goes another way where
it can, :mod:`dinov2_fsdp.models.frugal_attention`, with the same products between those of its neighbours.)

    TFLOP/s     useful operations: 4·n²·d for a sequence of n tokens and a head of d channels (q·kᵀ, then ·v), twice
                that backward (two products for each of these). Fused kernels also compute q·kᵀ again on their way
                back; whoever counts that as useful says 2.5 times.
    error       greatest absolute difference from float64, over a few sequences by themselves
    seen        whether changing one sequence changes a single bit of the outputs of others, or their gradients

Ends with code 1 if a backend is wrong, sees what it must not, or cannot run although the trainer would choose it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dinov2_fsdp.config import Config, load, width_depth_heads
from dinov2_fsdp.counts import tokens_of
from dinov2_fsdp.errors import UserError, run_cli
from dinov2_fsdp.models.attention import attend, resolve_backend
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import kept_sequences
from dinov2_fsdp.parallel.place import available_cores, check_devices
from dinov2_fsdp.parallel.sharding import PRECISIONS

ROOT = Path(__file__).resolve().parent.parent
BACKWARD = 2
"""Useful operations of a backward pass over those of a forward pass."""
ALLOWED = {"fp32": 1e-4, "bf16": 0.03, "fp16": 0.005}
"""Greatest error, as a share of the greatest absolute value of the reference."""
WARM_UP = 2
ROW = 0.02
"""Seconds of a row of repetitions that is timed as one."""
OVERRIDE = re.compile(r"[a-z_]\w*(\.\w+)*=.*", re.DOTALL)

Row = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A backend of the model, for ``sdpa`` also with the one kernel that torch may take."""

    name: str
    backend: str
    kernel: SDPBackend | None = None

    def chosen(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)


WAYS = (
    Way("math", "math"),
    Way("sdpa, as torch chooses", "sdpa"),
    Way("sdpa, flash", "sdpa", SDPBackend.FLASH_ATTENTION),
    Way("sdpa, cuDNN", "sdpa", SDPBackend.CUDNN_ATTENTION),
    Way("sdpa, memory-efficient", "sdpa", SDPBackend.EFFICIENT_ATTENTION),
    Way("xformers", "xformers"),
    Way("varlen", "varlen"),
)


@dataclass(frozen=True)
class Case:
    """What attention gets in one network's pass; ``trained``: whether a backward pass follows."""

    network: str
    layout: Layout
    heads: int
    head_dim: int
    precision: str
    trained: bool

    @property
    def flops(self) -> int:
        """Useful operations of the forward pass."""
        pairs = sum(sequences * length**2 for sequences, length in self.layout.groups)
        return 4 * pairs * self.heads * self.head_dim

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the packed q, k and v, ``(tokens, 3, heads, head_dim)``, and a gradient of the result."""
        rng = torch.Generator().manual_seed(0)
        shape = (self.layout.total_tokens, 4, self.heads, self.head_dim)
        drawn = torch.randn(shape, generator=rng).to(device, PRECISIONS[self.precision])
        return drawn[:, :3].contiguous().requires_grad_(self.trained), drawn[:, 3].contiguous()


def cases(config: Config) -> list[Case]:
    """Return the student's and the teacher's pass over one microbatch."""
    images, crops, drop = config.train.microbatch, config.crops, config.model.drop_path
    dim, _, heads = width_depth_heads(config.model)
    whole = [(2 * images, tokens_of(config, crops.global_size))]
    if crops.local_number:
        whole.append((crops.local_number * images, tokens_of(config, crops.local_size)))
    kept = tuple((kept_sequences(sequences, drop), length) for sequences, length in whole)
    shape = (heads, dim // heads, config.train.precision)
    return [
        Case("student", Layout(kept), *shape, trained=True),
        Case("teacher", Layout((whole[0],)), *shape, trained=False),
    ]


# -- what is right ----------------------------------------------------------------------------------------------------


def places(layout: Layout, few: Sequence[float]) -> list[slice]:
    """Return the rows of some sequences of every group, each given as its place between the first (0) and last (1)."""
    return [
        slice(start + number * length, start + (number + 1) * length)
        for start, _, sequences, length in layout.spans()
        for number in sorted({round(place * (sequences - 1)) for place in few})
    ]


def reference(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return one sequence's attention and the gradient in its q, k and v, in float64."""
    exact = qkv.detach().double().requires_grad_()
    query, key, value = exact.unbind(1)
    weights = (torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5).softmax(dim=-1)
    out = torch.einsum("hqk,khd->qhd", weights, value)
    return out.detach(), torch.autograd.grad(out, exact, grad.double())[0]


def check(case: Case, backend: str, device: torch.device) -> Row:
    """Return the errors of a backend on a few sequences, whether they are small, and what one sequence sees."""
    qkv, grad = case.inputs(device)
    with torch.set_grad_enabled(case.trained):
        out = attend(qkv, case.layout, backend)
        found = [out.detach(), *(torch.autograd.grad(out, qkv, grad) if case.trained else ())]
    errors, within = [0.0] * len(found), True
    for rows in places(case.layout, (0.0, 0.5, 1.0)):
        for number, (ours, exact) in enumerate(zip(found, reference(qkv[rows], grad[rows]), strict=False)):
            error = float((ours[rows].double() - exact).abs().max())
            # Not max(): it would lose a NaN.
            errors[number] = error if not error <= errors[number] else errors[number]
            within &= error <= ALLOWED[case.precision] * float(exact.abs().max())
    seen = what_is_seen(case, backend, qkv, grad, found[0])
    return {
        "error": errors[0],
        "gradient_error": errors[1] if case.trained else None,
        "seen": seen,
        "right": within and seen == "nothing",
    }


def what_is_seen(case: Case, backend: str, qkv: Tensor, grad: Tensor, before: Tensor) -> str:
    """Return ``nothing`` if each sequence sees itself alone, or what is wrong."""
    with torch.set_grad_enabled(case.trained):
        if not torch.equal(attend(qkv, case.layout, backend), before):
            return "another result of the same"
        # First and last ones too: a wrong boundary shows where one group ends and the next begins.
        for rows in places(case.layout, (0.0, 0.5, 1.0)):
            others = torch.ones(len(qkv), dtype=torch.bool, device=qkv.device)
            others[rows] = False
            changed = qkv.detach().clone()
            changed[rows] = 1 - changed[rows]
            after = attend(changed.requires_grad_(case.trained), case.layout, backend)
            if not torch.equal(after[others], before[others]):
                return "another sequence"
            if torch.equal(after[rows], before[rows]):
                return "not even itself"
            if case.trained:
                alone = torch.where(others[:, None, None], 0, grad)
                (gradient,) = torch.autograd.grad(after, changed, alone)
                if gradient[others].any():
                    return "another's gradient"
    return "nothing"


# -- how fast ---------------------------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Return how long ``work`` takes, the mean of a row of repetitions in the best of so many rounds."""
    for _ in range(WARM_UP):
        work()
    repetitions = max(1, round(ROW / max(_row_seconds(work, device, 1), 1e-6)))
    return min(_row_seconds(work, device, repetitions) for _ in range(rounds))


def _row_seconds(work: Callable[[], object], device: torch.device, repetitions: int) -> float:
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(repetitions):
            work()
        return (time.perf_counter() - started) / repetitions
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    for _ in range(repetitions):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000 / repetitions


def timed(case: Case, backend: str, device: torch.device, rounds: int) -> Row:
    """Return milliseconds and TFLOP/s of both passes, and on a GPU the most memory beside q, k, v and the gradient."""
    qkv, grad = case.inputs(device)
    row: Row = {}

    def measured(name: str, work: Callable[[], object], flops: int) -> None:
        seconds = seconds_of(work, device, rounds)
        row.update({f"{name}_ms": 1000 * seconds, f"{name}_tflops": flops / seconds / 1e12})

    with torch.set_grad_enabled(case.trained):
        measured("forward", lambda: attend(qkv, case.layout, backend), case.flops)
        if case.trained:
            out = attend(qkv, case.layout, backend)

            def backward() -> object:
                return torch.autograd.grad(out, qkv, grad, retain_graph=True)

            measured("backward", backward, BACKWARD * case.flops)
            del out
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            held = torch.cuda.memory_allocated(device)
            out = attend(qkv, case.layout, backend)
            if case.trained:
                torch.autograd.grad(out, qkv, grad)
            row["peak_mib"] = (torch.cuda.max_memory_allocated(device) - held) / 2**20
    return row


def unavailable(way: Way, device: torch.device, precision: str) -> str | None:
    """Return why the trainer would refuse a way here, None if it would not."""
    try:
        resolve_backend(way.backend, device, precision)
    except UserError as error:
        return str(error).splitlines()[0]
    return None if way.kernel is None or device.type == "cuda" else "one kernel by itself: on CUDA only"


def measure(way: Way, case: Case, device: torch.device, rounds: int) -> Row:
    """Return a row of the table; ``reason`` says why there are no figures, ``right`` whether all is as it must be."""
    row: Row = {"network": case.network, "backend": way.name, "right": True, "reason": None}
    if reason := unavailable(way, device, case.precision):
        return {**row, "reason": reason}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            with way.chosen():
                row |= check(case, way.backend, device)
                return {**row, **(timed(case, way.backend, device, rounds) if rounds else {})}
        except Exception as error:  # whatever a library does when it cannot: the other rows go on
            texts = [f"{type(error).__name__}: {error}", *(str(warning.message) for warning in said)]
            # A kernel that torch refuses is no fault as long as nothing but it was allowed.
            reason = "; ".join(dict.fromkeys(" ".join(text.split())[:160] for text in texts[:4]))
            return {**row, "reason": reason, "right": way.kernel is not None}


# -- the table --------------------------------------------------------------------------------------------------------

COLUMNS = {
    "forward_ms": ("forward, ms", ".3f"),
    "backward_ms": ("backward, ms", ".3f"),
    "forward_tflops": ("forward, TFLOP/s", ".3g"),
    "backward_tflops": ("backward, TFLOP/s", ".3g"),
    "peak_mib": ("peak, MiB", ",.0f"),
    "error": ("error", ".1e"),
    "gradient_error": ("gradient's error", ".1e"),
    "seen": ("others seen", ""),
}


def table(rows: list[Row]) -> str:
    """Return the rows as a Markdown table; what is wrong is bold, a reason stands where the times would."""
    lines = [
        "| network | backend | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|---|" + "---:|" * len(COLUMNS),
    ]
    for row in rows:
        cells = [format(row[key], form) if row.get(key) is not None else "–" for key, (_, form) in COLUMNS.items()]
        if row["reason"]:
            cells[0] = row["reason"].replace("|", "/")
        name = row["backend"] if row["right"] else f"**{row['backend']}: WRONG**"
        lines.append(f"| {row['network']} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def title(config: Config, found: list[Case], device: torch.device) -> str:
    """Return a line that says what was measured, where, and which backend the trainer takes by itself."""
    shapes = [f"{c.network} {' + '.join(f'{n} × {length}' for n, length in c.layout.groups)} tokens" for c in found]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    model, auto = config.model, resolve_backend("auto", device, config.train.precision)
    return (
        f"{model.arch}/{model.patch}, {config.train.microbatch} images: {', '.join(shapes)}; {found[0].heads} heads of "
        f"{found[0].head_dim}, {config.train.precision}, {name}, torch {torch.__version__}; auto is {auto}"
    )


def parse(parser: argparse.ArgumentParser, words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return parsed arguments, ``key=value`` taken out first: an option with several values would swallow them."""
    words = sys.argv[1:] if words is None else words
    overrides = [word for word in words if OVERRIDE.fullmatch(word)]
    arguments = parser.parse_args([word for word in words if word not in overrides])
    # What is left over is no key=value: the config's loader says so.
    arguments.overrides = [*overrides, *(getattr(arguments, "overrides", None) or ())]
    return arguments


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/attention.py", description="Attention backends side by side.")
    parser.add_argument("--config", nargs="+", default=[str(ROOT / "configs" / "bench.yaml")])
    parser.add_argument("--rounds", type=int, default=5, help="the best counts; 0: only check (default: %(default)s)")
    parser.add_argument("--json", help="write all figures here")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parse(parser)
    everything: list[Row] = []
    for path in arguments.config:
        config = load(path, arguments.overrides)
        device = torch.device(check_devices(config.parallel.device, 1, torch.cuda.device_count()))
        torch.set_num_threads(config.parallel.threads or available_cores())
        found = cases(config)
        rows = [measure(way, case, device, arguments.rounds) for case in found for way in WAYS]
        everything += [{"config": Path(path).stem, **row} for row in rows]
        print(f"{title(config, found, device)}\n\n{table(rows)}\n", flush=True)
        if arguments.json:
            Path(arguments.json).write_text(json.dumps(everything, indent=2) + "\n")
    return 0 if all(row["right"] for row in everything) else 1


if __name__ == "__main__":
    run_cli(main)
