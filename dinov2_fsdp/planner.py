"""What a run will take, for people to read before it starts. No torch."""

from __future__ import annotations

from dinov2_fsdp.config import Config, microbatches_per_rank
from dinov2_fsdp.counts import count_parameters, state_bytes, step_flops_per_image
from dinov2_fsdp.duration import Duration
from dinov2_fsdp.footprint import footprint, traffic, ways_to_fit
from dinov2_fsdp.optim.schedules import scaled_learning_rate

GIB = 2**30
GPUS = {"A100": 312e12, "H100 or H200": 989e12}
"""Dense bf16 operations a second, as their maker states them."""
EFFICIENCY = 0.4
"""What part of it a run is taken to reach; not measured here."""
USABLE = 0.9
"""What part of a GPU's memory a step may fill: libraries, fragments and the step's temporaries need the rest."""


def plan(config: Config, processes: int, kind: str, images: int | None, gpu_gib: float = 80.0) -> str:
    """Return the plan of a run, for people.

    Args:
        processes: ranks. kind: ``cpu`` or ``cuda``. images: size of the data set, None where nobody has counted.
        gpu_gib: memory of one GPU, above which a warning names what would fit.
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
        seconds = {
            name: flops * config.train.batch * total / (processes * EFFICIENCY * peak) for name, peak in GPUS.items()
        }
        lines["time"] = f"at {EFFICIENCY:.0%} of the GPUs' peak (an assumption): " + ", ".join(
            f"{needed / 3600:,.1f} hours on {name}" for name, needed in seconds.items()
        )
    width = max(map(len, lines))
    text = "\n".join(f"{name:<{width}}  {value}" for name, value in lines.items())
    if kind == "cuda" and held.total > USABLE * gpu_gib * GIB:
        ways = ways_to_fit(config, processes, kind, USABLE * gpu_gib * GIB)
        text += f"\nwarning: that is too much for a GPU of {gpu_gib:g} GiB; "
        text += (
            f"what would fit: {', or '.join(ways)}"
            if ways
            else "no smaller microbatch makes it fit; use a smaller model or crops"
        )
    return text
