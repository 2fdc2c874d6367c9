"""Where the time of a training step goes, by kind of operation: the profile of docs/performance.md.

    python benchmarks/step_profile.py --config configs/bench.yaml --picture profile.png [key=value …]

Runs the step of one microbatch (teacher, student, losses, backward pass) a few times without, then once with torch's
profiler, and sums up what each operation takes by itself; the same on a CPU and on a GPU, where kernels count.
``--trace FILE`` keeps the whole profile for a trace viewer. Also counted: operations that make the host wait for its
device; a step should have none.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from products import prepared
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from dinov2_fsdp import native
from dinov2_fsdp.config import Config, load
from dinov2_fsdp.errors import run_cli

ROOT = Path(__file__).resolve().parent.parent

KINDS = {
    "attention": ("attention", "fmha", "flash"),
    "linear layers with norms, GELU, residuals": ("feed_forward", "norm_linear", "scaled_linear"),
    "communication": ("nccl", "c10d", "gloo"),
    "matrix products": ("mm", "gemm", "cutlass", "sm80_xmma", "sm90_xmma", "nvjet", "linear", "mkldnn_convolution"),
    "GELU, gates": ("gelu", "silu"),
    "softmax, losses": ("softmax", "logsumexp", "special_entr", "aten::exp", "aten::log"),
    "norms": ("norm",),
    "copies, casts": ("copy", "cat", "memcpy", "to_copy", "clone", "fsdp::", "index", "_heads", "compiled::transpose"),
    "sums": ("sum", "reduce"),
    "additions, products, fills": ("add", "mul", "sub", "div", "fill", "zero", "elementwise", "lerp", "sqrt"),
}
"""Parts of operations' and kernels' names, in the order in which they are tried."""

WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "cudaStreamSynchronize")
"""What makes the host wait for a GPU."""


def kind_of(name: str) -> str:
    """Return the kind of an operation or kernel, ``everything else`` where nothing fits."""
    if name.startswith("_") and not name.startswith("_Z"):
        return "Python of our own branches"  # autograd functions, without what they call
    lowered = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in lowered for p in parts)), "everything else")


@contextmanager
def compiled_code_named() -> Iterator[None]:
    """Let the functions of compiled code appear in a profile, which would count them as Python."""
    library = native.parallel_library()
    names = library.names if library else ()
    before = {name: getattr(library, name) for name in names}

    def named(name: str) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            with record_function(f"compiled::{name}"):
                before[name](*arguments)

        return run

    try:
        for name in names:
            setattr(library, name, named(name))
        yield
    finally:
        for name, function in before.items():
            setattr(library, name, function)


def profile_step(config: Config, trace: str | None) -> tuple[Counter[str], Counter[str], str]:
    """Return the milliseconds of each kind of operation in a step, how often it waited, and the device's type."""
    with prepared(config) as (method, batch):
        device = batch.global_crops.device

        def step() -> None:
            (targets,) = method.targets([batch], config.loss.teacher_temperature)
            loss, _ = method.loss(batch, targets)
            loss.backward()
            method.student.zero_grad()

        for _ in range(2):
            step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
        with compiled_code_named(), profile(activities=activities) as profiled:
            step()
        if trace:
            profiled.export_chrome_trace(trace)
        return (*summed(profiled.key_averages(), device.type), device.type)


def summed(rows: Any, device: str) -> tuple[Counter[str], Counter[str]]:
    """Return milliseconds by kind and waits by name of a profile's rows."""
    kinds: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    for row in rows:
        if row.key in WAITS:
            waits[row.key] += row.count
        # A GPU's kernels have rows of their own, and count for the operations that start them too.
        if device == "cuda" and (row.device_type == DeviceType.CPU or row.is_user_annotation):
            continue
        own = row.self_device_time_total if device == "cuda" else row.self_cpu_time_total
        kinds[kind_of(row.key)] += own / 1e3  # type: ignore[assignment]
    return kinds, waits


def draw(kinds: Counter[str], title: str, path: str) -> None:
    """Draw the profile as one horizontal bar for each kind."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.add_subplot()
    names, values = zip(*reversed(kinds.most_common()), strict=True)
    total = sum(values)
    bars = axes.barh(names, [100 * value / total for value in values], color="#4878a8")
    axes.bar_label(bars, [f"{value:,.0f} ms, {100 * value / total:.1f} %" for value in values], padding=3)
    axes.set_xlim(0, 118 * max(values) / total)
    axes.set_xlabel("share of the step, %")
    axes.set_title(title, loc="left", fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/step_profile.py", description="Where a step's time goes.")
    parser.add_argument("--config", default=str(ROOT / "configs" / "bench.yaml"))
    parser.add_argument("--picture", help="draw it here (png, svg, pdf)")
    parser.add_argument("--trace", help="write the whole profile here (json)")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    config = load(arguments.config, arguments.overrides)
    kinds, waits, device = profile_step(config, arguments.trace)
    total = sum(kinds.values())
    print("| | ms | share |\n|---|---:|---:|")
    for kind, milliseconds in kinds.most_common():
        print(f"| {kind} | {milliseconds:,.0f} | {100 * milliseconds / total:.1f} % |")
    print(f"\nwaits of the host for its device: {dict(waits) or 'none'}")
    if arguments.picture:
        precision, images = config.train.precision, config.train.microbatch
        title = f"{config.model.arch}/{config.model.patch}, {images} images, {precision}, {device}: {total:,.0f} ms"
        draw(kinds, title, arguments.picture)
    return 0


if __name__ == "__main__":
    run_cli(main)
