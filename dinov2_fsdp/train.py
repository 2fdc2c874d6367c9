"""A pretraining run, from a config to its last checkpoint. Read it top to bottom.

Started by ``launchers/local.py`` (or by torchrun or SLURM through it), one call of :func:`train` per process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dinov2_fsdp.checkpoint import Checkpointer, list_checkpoints, module_tensors, optimizer_tensors
from dinov2_fsdp.config import Config, microbatches_per_rank, to_yaml
from dinov2_fsdp.data.loader import build_loader
from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.duration import Duration, due
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.attention import resolve_backend
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.monitor.environment import write_environment
from dinov2_fsdp.monitor.logs import setup_logging
from dinov2_fsdp.monitor.monitor import Monitor
from dinov2_fsdp.optim.build import build_optimizer
from dinov2_fsdp.optim.clip import clip_, gradient_norms
from dinov2_fsdp.optim.groups import apply_step_values, parameter_groups
from dinov2_fsdp.optim.scaler import LossScaler
from dinov2_fsdp.optim.schedules import Schedules, build_schedules, scaled_learning_rate
from dinov2_fsdp.parallel.place import place_from_environment
from dinov2_fsdp.parallel.sharding import build_mesh, parallelise
from dinov2_fsdp.parallel.world import World, end_world, start_world
from dinov2_fsdp.ssl.ema import Ema
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.ssl.step import SelfDistillation

logger = logging.getLogger(__name__)

Features = Callable[[Tensor], dict[str, Tensor]]
Evaluation = Callable[[Features, Config, int, int, torch.device], Mapping[str, float]]
"""(collective forward of the teacher's backbone, config, rank, world size, device) → metrics by name."""


class NonFiniteRun(RuntimeError):
    """Too many steps in a row had no finite gradient."""


@dataclass(frozen=True)
class Lengths:
    """A run's durations in steps."""

    total: int
    epoch: int
    log: int
    checkpoint: int
    keep: int
    evaluation: int


def lengths(config: Config, images: int) -> Lengths:
    """Return a config's durations in steps, for a data set of ``images``."""
    epoch = config.train.epoch or max(1, images // config.train.batch)
    total = Duration.parse(config.train.duration).steps(config.train.batch, epoch, None)

    def steps(text: str) -> int:
        return Duration.parse(text).steps(config.train.batch, epoch, total)

    return Lengths(
        total,
        epoch,
        max(1, steps(config.log.every)),
        steps(config.checkpoint.every),
        steps(config.checkpoint.keep_every),
        steps(config.eval.every),
    )


def schedules(config: Config, length: Lengths) -> Schedules:
    """Return the schedules of a run."""

    def steps(text: str) -> int:
        return Duration.parse(text).steps(config.train.batch, length.epoch, length.total)

    return build_schedules(
        total_steps=length.total,
        warmup_steps=steps(config.optim.warmup),
        learning_rate=scaled_learning_rate(config.optim.lr, config.train.batch, config.optim.lr_scaling),  # type: ignore[arg-type]
        min_learning_rate=config.optim.min_lr,
        weight_decay=config.optim.weight_decay[0],
        weight_decay_end=config.optim.weight_decay[1],
        teacher_momentum=config.teacher.momentum[0],
        teacher_momentum_end=config.teacher.momentum[1],
        teacher_temperature_start=config.loss.teacher_temperature_start,
        teacher_temperature=config.loss.teacher_temperature,
        teacher_temperature_warmup_steps=steps(config.loss.teacher_temperature_warmup),
        freeze_prototypes_steps=steps(config.optim.freeze_prototypes),
    )


def build_networks(config: Config, world: World) -> tuple[Network, Network]:
    """Return the sharded student and teacher, on the meta device until every shard knows its place, then filled."""
    mesh = build_mesh(config.parallel, world)
    networks = []
    for trained in (True, False):
        with torch.device("meta"):
            network = Network(config)
        network.backbone.set_attention_backend(resolve_backend(config.parallel.attention, world.device))
        if not trained:
            network.requires_grad_(False)
        parallelise(network, config.parallel, mesh, config.train.precision, trained)
        network.to_empty(device=world.device)
        networks.append(network)
    return networks[0], networks[1]


def train(config: Config, evaluations: Mapping[str, Evaluation] | None = None, console: bool = True) -> None:
    """Run to the end of the config's duration, continuing from the run directory's newest checkpoint.

    Args:
        evaluations: what ``eval.tasks`` may name.
        console: show progress (rank 0).

    Raises:
        UserError: what the config asks for cannot be had here.
        NonFiniteRun: more than ``train.max_nonfinite`` steps in a row were skipped.
    """
    world = start_world(config.parallel, place_from_environment(), config.train.deterministic)
    try:
        _train(config, world, evaluations or {}, console)
    finally:
        end_world()


def _train(config: Config, world: World, evaluations: Mapping[str, Evaluation], console: bool) -> None:
    # -- inputs -------------------------------------------------------------------------------------------------------
    run_dir = Path(config.output_dir)
    unknown = [task for task in config.eval.tasks if task not in evaluations]
    if unknown and Duration.parse(config.eval.every).value > 0:
        raise UserError(f"eval.tasks={unknown} cannot run during training; valid: {', '.join(evaluations) or 'none'}")
    setup_logging(run_dir, world.rank)
    source = open_source(config.data.train, config.data.cache)
    length = lengths(config, len(source))
    per_rank = microbatches_per_rank(config, world.size)
    schedule = schedules(config, length)

    # -- model --------------------------------------------------------------------------------------------------------
    student, teacher = build_networks(config, world)
    ema = Ema(student, teacher)
    method = SelfDistillation(config, student, teacher, world.device)
    groups = parameter_groups(
        student.named_parameters(), len(student.backbone.blocks), config.optim.layer_decay, config.optim.patch_embed_lr
    )
    optimizer = build_optimizer(groups, config.optim.name, config.optim.betas, 1e-8, config.optim.momentum)
    scaler = LossScaler(config.train.precision == "fp16", world.device)
    skipped_in_a_row = torch.zeros((), device=world.device)

    # -- checkpoint ---------------------------------------------------------------------------------------------------
    checkpointer = Checkpointer(run_dir, world, config.checkpoint.keep, length.keep)

    def tensors() -> dict[str, Tensor]:
        return {
            **module_tensors(student, "student"),
            **module_tensors(teacher, "teacher"),
            **optimizer_tensors(optimizer),
            **method.tensors(),
            **scaler.tensors(),
            "skipped_in_a_row": skipped_in_a_row,
        }

    start, state = 0, None
    if saved := list_checkpoints(run_dir):
        start = saved[-1].step
        state = checkpointer.load(saved[-1], tensors())
    else:
        initialise(student, config.seed, config.model.layer_scale)
        ema.copy()

    monitor = Monitor(
        run_dir, world.rank, world.size, length.total, config.train.batch, world.device, length.log,
        config.log.tensorboard, start, console, length.epoch,
    )  # fmt: skip
    if state is not None:
        monitor.load_state_dict(state["monitor"])
        monitor.message(f"resuming {run_dir} from step {start}")
    if world.rank == 0:
        (run_dir / "config.yaml").write_text(to_yaml(config))
        backend = resolve_backend(config.parallel.attention, world.device)
        write_environment(run_dir, world.size, world.device, {"attention": backend})
        parameters = sum(p.numel() for p in student.backbone.parameters())
        monitor.message(
            f"{world.size} process(es) on {world.device.type}, {torch.get_num_threads()} thread(s) each, "
            f"attention {backend}, {config.train.precision}; backbone "
            f"{parameters / 1e6:.1f} M parameters; {len(source):,} images, {length.total:,} steps of "
            f"{config.train.batch}, {length.epoch} steps an epoch"
        )

    # -- update step --------------------------------------------------------------------------------------------------
    parts: dict[str, list[Tensor]] = {}
    for group in groups:
        part = "all" if config.optim.clip_scope == "all" else group["part"]
        parts.setdefault(part, []).extend(group["params"])

    def update(step: int) -> None:
        values = schedule(step)
        apply_step_values(optimizer, values)
        with monitor.phase("data"):
            batches = [next(loader).to(world.device) for _ in range(per_rank)]
        targets = method.targets(batches, values.teacher_temperature)
        for number, batch in enumerate(batches):
            student.set_requires_gradient_sync(number == per_rank - 1)  # type: ignore[operator]
            with monitor.phase("teacher"):
                target = next(targets)
            with monitor.phase("student"):
                loss, meters = method.loss(batch, target)
            with monitor.phase("backward"):
                scaler.scaled(loss / per_rank).backward()
            monitor.record(step + 1, meters)
            _count_bad_images(batch.bad)
        with monitor.phase("optimizer"):
            grads = {part: [p.grad for p in parameters if p.grad is not None] for part, parameters in parts.items()}
            scaler.unscale_(grads)
            norms = gradient_norms(grads)
            # One rank's NaN makes these norms NaN on all, so all skip the same step, without asking each other.
            skip = 1.0 - torch.stack(list(norms.values())).isfinite().all().float()
            if config.optim.clip > 0:
                clip_(grads, norms, config.optim.clip)
            optimizer.found_inf, optimizer.grad_scale = skip, None  # type: ignore[attr-defined]
            optimizer.step()
            optimizer.zero_grad()
            scaler.update(skip)
        with monitor.phase("ema"):
            ema.update(values.teacher_momentum, skip)
            method.commit(skip)
        skipped_in_a_row.add_(skip).mul_(skip)
        monitor.record(
            step + 1,
            {
                **{f"grad_norm/{part}": norm for part, norm in norms.items()},
                **method.centre_norms(),
                "skipped": skip,
                "lr": values.learning_rate,
                "lr_prototypes": values.prototype_learning_rate,
                "weight_decay": values.weight_decay,
                "teacher_momentum": values.teacher_momentum,
                "teacher_temperature": values.teacher_temperature,
                "loss_scale": scaler.scale,
            },
        )

    bad_images: dict[str, str] = {}

    def _count_bad_images(bad: tuple[tuple[str, str], ...]) -> None:
        for name, reason in bad:
            if name not in bad_images:
                bad_images[name] = reason
                logger.warning("unreadable image replaced: %s (%s)", name, reason)
        if len(bad_images) > config.data.max_bad_images:
            raise RuntimeError(
                f"{len(bad_images)} images of {config.data.train} cannot be read, more than data.max_bad_images="
                f"{config.data.max_bad_images}; the last one: {name} ({reason})"
            )

    def save(step: int) -> None:
        with monitor.phase("checkpoint"):
            checkpointer.save(step, tensors(), {"monitor": monitor.state_dict(), "world_size": world.size})

    def evaluate(step: int) -> None:
        with monitor.phase("evaluation"):
            results: dict[str, float] = {}
            for task in config.eval.tasks:
                found = evaluations[task](teacher.features, config, world.rank, world.size, world.device)
                results |= {f"eval/{name}": value for name, value in found.items()}
        monitor.event(step, results)

    # -- loop ---------------------------------------------------------------------------------------------------------
    loader = iter(build_loader(config, source, start, length.total, world.rank, per_rank, world.device.type == "cuda"))
    student.train()
    teacher.eval()
    try:
        if start == 0 and length.evaluation:
            evaluate(0)
        for step in range(start, length.total):
            update(step)
            done = step + 1
            if due(done, length.log, length.total):
                # The sum over ranks: a flush takes the mean.
                monitor.record(done, {"param_norm": _norm(ema.student), "bad_images": len(bad_images) * world.size})
                monitor.flush(done)
                if skipped_in_a_row.item() > config.train.max_nonfinite:
                    raise NonFiniteRun(
                        f"{int(skipped_in_a_row.item())} steps in a row had no finite gradient (step {done}); "
                        f"the last good checkpoint is in {run_dir / 'checkpoints'}"
                    )
            if due(done, length.evaluation, length.total, last=length.evaluation > 0):
                evaluate(done)
            if due(done, length.checkpoint, length.total):
                save(done)
    finally:
        monitor.close()


def _norm(parameters: list[Tensor]) -> Tensor:
    return gradient_norms({"all": parameters})["all"]
