"""What a run will take, for people to read before it starts. No torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from dinov2_fsdp.config import Config, frees_gathered, microbatches_per_rank
from dinov2_fsdp.counts import count_parameters, state_bytes, step_flops_per_image
from dinov2_fsdp.duration import Duration
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.footprint import footprint
from dinov2_fsdp.optim.schedules import scaled_learning_rate
from dinov2_fsdp.units import traffic

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU: its memory in GiB, and the dense bf16 operations a second that its maker states."""

    name: str
    gib: float
    flops: float


GPUS = (
    Gpu("A100", 80, 312e12),
    Gpu("A100-40GB", 40, 312e12),
    Gpu("H100", 80, 989e12),
    Gpu("H200", 140, 989e12),
    Gpu("B200", 180, 2250e12),
    Gpu("L40S", 44, 362e12),
    Gpu("RTX4090", 24, 165e12),
)
USUAL = {"A100": 312e12, "H100 or H200": 989e12}
USUAL_GIB = 80.0
"""What a plan is for where nobody said which GPU."""


def gpu_of(text: str) -> Gpu:
    """Return the GPU of a name, upper or lower case, or of ``GIB,TFLOPS``, as ``48,155``.

    Raises:
        UserError: it is neither.
    """
    for gpu in GPUS:
        if text.upper() == gpu.name.upper():
            return gpu
    try:
        gib, tflops = (float(number) for number in text.split(","))
    except ValueError:
        gib = tflops = math.nan
    if 0 < gib < math.inf and 0 < tflops < math.inf:
        return Gpu(f"a GPU of {tflops:g} TFLOP/s", gib, tflops * 1e12)
    names = ", ".join(gpu.name for gpu in GPUS)
    raise UserError(f"--gpu {text} is unknown; valid: {names}, or memory and speed as GIB,TFLOPS (bf16, dense): 48,155")


EFFICIENCY = 0.4
"""What part of it a run is taken to reach; not measured here."""
USABLE = 0.9
"""What part of a GPU's memory a step may fill: libraries, fragments and the step's temporaries need the rest."""


def plan(
    config: Config,
    processes: int,
    kind: str,
    images: int | None,
    gpu: Gpu | None = None,
    memory: float | None = None,
) -> str:
    """Return the plan of a run, for people.

    Args:
        processes: ranks. kind: ``cpu`` or ``cuda``. images: size of the data set, None where nobody has counted.
        gpu: what the hours are for; a warning names what would fit into its memory. None: two usual ones, of 80 GiB.
        memory: bytes for each process on a CPU, for the same warning; None where they are not known.
    """
    held = footprint(config, processes, kind)
    parameters = count_parameters(config)
    per_rank = microbatches_per_rank(config, processes)
    epoch = config.train.epoch or max(1, (images or 0) // config.train.batch)
    known = images is not None or config.train.epoch > 0
    duration, warming = Duration.parse(config.train.duration), Duration.parse(config.optim.warmup)
    total = duration.steps(config.train.batch, epoch, None)
    warmup = f"{warming.steps(config.train.batch, epoch, total):,} steps" if known else str(warming)
    rate = scaled_learning_rate(config.optim.lr, config.train.batch, config.optim.lr_scaling)  # type: ignore[arg-type]
    states = state_bytes(config)
    shards = max(1, processes // config.parallel.replicate)
    flops = step_flops_per_image(config)
    lines = {
        "run directory": config.output_dir,
        "data": config.data.train if images is None else f"{config.data.train}: {images:,} images",
        "backbone": f"{config.model.arch}/{config.model.patch}, {parameters.backbone / 1e6:.1f} M parameters",
        "heads": f"DINO {parameters.dino_head / 1e6:.1f} M, iBOT "
        + (f"{parameters.ibot_head / 1e6:.1f} M" if parameters.ibot_head else "shared"),
        "processes": f"{processes} on {kind}, {shards} shards × {config.parallel.replicate}",
        "step": f"{config.train.batch} images = {processes} processes × {per_rank} microbatches "
        f"× {config.train.microbatch}",
        "length": f"{total:,} steps = {total * config.train.batch:,} images"
        + (f" = {total * config.train.batch / images:,.1f} passes over the data" if images else "")
        + f"; `ep` counts {epoch:,} steps"
        if known
        else f"{duration}, in steps once the data is counted",
        "learning rate": f"{rate:.3g} after {warmup} of warm-up",
        "operations": f"{flops / 1e9:,.1f} GFLOP per image"
        + (f", {flops * config.train.batch * total / 1e15:,.3g} PFLOP in all" if known else ""),
        "states per process": ", ".join(f"{name} {size / shards / GIB:.2f} GiB" for name, size in states.items())
        + f"; {sum(states.values()) / shards / GIB:.2f} GiB",
        "memory per process": f"about {held.total / GIB:.1f} GiB: states {held.states / GIB:.2f}, gathered weights "
        f"{held.gathered / GIB:.2f}, activations {held.activations / GIB:.2f}, logits and targets "
        f"{held.logits / GIB:.2f}, gradients {held.gradients / GIB:.2f}, working memory {held.working / GIB:.2f}",
    }
    if moved := traffic(config, processes):
        parts = ", ".join(f"{name} {amount / GIB:.3g}" for name, amount in moved.items())
        lines["traffic per step"] = f"{sum(moved.values()) / GIB:.3g} GiB into each process: {parts}"
    if kind == "cuda" and known:
        times = [(gpu.name, gpu.flops)] if gpu else USUAL.items()
        work = flops * config.train.batch * total / (processes * EFFICIENCY)
        lines["time"] = f"at {EFFICIENCY:.0%} of the GPUs' peak (an assumption): " + ", ".join(
            f"{work / peak / 3600:,.1f} hours on {name}" for name, peak in times
        )
    width = max(map(len, lines))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
    gib = (gpu.gib if gpu else USUAL_GIB) if kind == "cuda" else memory and memory / GIB
    if gib and held.total > USABLE * gib * GIB:
        ways = ways_to_fit(config, processes, kind, USABLE * gib * GIB)
        if kind == "cuda":
            text += f"\nwarning: that is too much for a GPU of {gib:g} GiB; "
        else:  # more processes would share the same memory
            ways = [way for way in ways if "processes" not in way]
            text += f"\nwarning: that is too much for the {round(gib, 1):g} GiB that this machine allows each process; "
        text += (
            f"what would fit: {', or '.join(ways)}"
            if ways
            else "no smaller microbatch makes it fit; use a smaller model, crops or train.batch"
        )
    return text


def ways_to_fit(config: Config, processes: int, kind: str, limit: float) -> list[str]:
    """Return changes of the config, each by itself, that bring a rank below ``limit`` bytes; the mildest first."""
    found, also = [], ""
    if not frees_gathered(config.parallel, processes // config.parallel.replicate, kind):
        freed = replace(config, parallel=replace(config.parallel, reshard_after_forward=True))
        if footprint(freed, processes, kind).total < limit:
            found.append("parallel.reshard_after_forward=true")
        else:  # it costs less than any other, so it goes with all of them
            config, also = freed, "parallel.reshard_after_forward=true "
    if config.parallel.activation_checkpointing != "full":
        changed = replace(config, parallel=replace(config.parallel, activation_checkpointing="full"))
        if footprint(changed, processes, kind).total < limit:
            found.append(f"{also}parallel.activation_checkpointing=full")
    for size in (s for s in range(config.train.microbatch - 1, 0, -1) if config.train.microbatch % s == 0):
        changed = replace(config, train=replace(config.train, microbatch=size))
        if footprint(changed, processes, kind).total < limit:
            found.append(f"{also}train.microbatch={size}")
            break
    for more in (2, 4, 8, 16):
        microbatches = config.train.batch // config.train.microbatch
        if microbatches % (processes * more) == 0 and footprint(config, processes * more, kind).total < limit:
            found.append(f"{also}{processes * more} processes")
            break
    return found
