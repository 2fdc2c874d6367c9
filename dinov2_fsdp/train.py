"""A pretraining run, from a config to its last checkpoint. Read it top to bottom.

Started by ``launchers/local.py`` (or by torchrun or SLURM through it), one call of :func:`train` per process.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinov2_fsdp import native
from dinov2_fsdp.checkpoint import (
    Checkpointer,
    begin_life,
    check_life,
    module_tensors,
    optimizer_tensors,
    write_durably,
)
from dinov2_fsdp.config import Config, microbatches_per_rank, to_yaml
from dinov2_fsdp.data.loader import build_loader
from dinov2_fsdp.data.sources import Source, open_source
from dinov2_fsdp.duration import Duration, due
from dinov2_fsdp.errors import FILE_ONLY, RunFailed, UserError
from dinov2_fsdp.models.attention import resolve_backend
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.monitor.environment import write_environment
from dinov2_fsdp.monitor.logs import setup_logging
from dinov2_fsdp.monitor.monitor import Monitor
from dinov2_fsdp.monitor.nonfinite import NonFiniteSteps, write_report
from dinov2_fsdp.optim.build import build_optimizer
from dinov2_fsdp.optim.clip import clip_, gradient_norms
from dinov2_fsdp.optim.groups import apply_step_values, parameter_groups
from dinov2_fsdp.optim.scaler import LossScaler
from dinov2_fsdp.parallel.agreement import Agreed, Agreement
from dinov2_fsdp.parallel.place import place_from_environment
from dinov2_fsdp.parallel.pulse import Pulse, is_loss_of_another
from dinov2_fsdp.parallel.sharding import build_networks
from dinov2_fsdp.parallel.world import World, end_world, start_world
from dinov2_fsdp.signals import StopSignals
from dinov2_fsdp.ssl.ema import Ema
from dinov2_fsdp.ssl.step import SelfDistillation
from dinov2_fsdp.timetable import lengths, schedules
from dinov2_fsdp.weights.initial import start_from

logger = logging.getLogger(__name__)

Features = Callable[[Tensor], dict[str, Tensor]]
Evaluation = Callable[[Features, Config, int, int, torch.device], Mapping[str, float]]
"""(collective forward of the teacher's backbone, config, rank, world size, device) → metrics by name."""


class NonFiniteRun(RunFailed):
    """Too many steps in a row had no finite gradient."""


class _Stopped(Exception):
    """A signal asks to stop, in the middle of an evaluation."""


def train(config: Config, evaluations: Mapping[str, Evaluation] | None = None, console: bool = True) -> bool:
    """Run to the end of the config's duration, continuing from the run directory's newest whole checkpoint.

    Returns True when the run is complete, False when a signal (of signals.py, to any rank) ended it early,
    after a save; the same call continues it then.

    Args:
        evaluations: what ``eval.tasks`` may name.
        console: show progress (rank 0).

    Raises:
        UserError: what the config asks for cannot be had here.
        RunFailed: a rank, a disk or the run itself failed. The message names rank and cause; ``silent`` is set on all
            ranks but one.
    """
    place = place_from_environment()
    with StopSignals() as signals:
        world = start_world(config.parallel, place, config.train.deterministic)
        try:
            with Pulse(world, config.parallel.timeout, f"{place.life}.{place.attempt}") as pulse:
                try:
                    return run(config, world, evaluations or {}, console, signals, pulse, place.life)
                except (UserError, RunFailed) as error:
                    error.silent = not pulse.claim(str(error))
                    raise
                except Exception as error:
                    logger.error("this rank has failed", exc_info=True, extra=FILE_ONLY)
                    raise _explained(error, world, pulse) from error
        finally:
            end_world()


def _explained(error: Exception, world: World, pulse: Pulse) -> RunFailed:
    if world.size > 1 and is_loss_of_another(error):
        text, mine = pulse.explain_loss()
    else:
        cause = (str(error).strip().splitlines() or ["no message"])[0]
        where = f"rank {world.rank} ({socket.gethostname()}, {pulse.place()})"
        text = f"{where} failed: {type(error).__name__}: {cause}; the traceback is in logs/rank_{world.rank}.log"
        mine = pulse.claim(text)
    failed = RunFailed(text)
    failed.silent = not mine
    return failed


def run(
    config: Config,
    world: World,
    evaluations: Mapping[str, Evaluation],
    console: bool,
    signals: StopSignals,
    pulse: Pulse,
    life: int | None = None,
) -> bool:
    """Be one rank of a run; see :func:`train`."""
    # -- inputs -------------------------------------------------------------------------------------------------------
    run_dir = Path(config.output_dir)
    unknown = [task for task in config.eval.tasks if task not in evaluations]
    if unknown and Duration.parse(config.eval.every).value > 0:
        raise UserError(f"eval.tasks={unknown} cannot run during training; valid: {', '.join(evaluations) or 'none'}")
    setup_logging(run_dir, world.rank)
    agreement = Agreement(world)
    # Recorded once the ranks have met: what is left of an earlier life may not touch the run from here on.
    life_now: int = agreement.gather(begin_life(run_dir, life) if world.rank == 0 else 0)[0]
    source = open_source(config.data.train, config.data.cache)
    length = lengths(config, len(source))
    per_rank = microbatches_per_rank(config, world.size)
    schedule = schedules(config, length)

    # -- model --------------------------------------------------------------------------------------------------------
    pulse.at("building the model", 0)
    student, teacher = build_networks(config, world)
    ema = Ema(student, teacher)
    method = SelfDistillation(config, student, teacher, world.device)
    groups = parameter_groups(
        student.named_parameters(), len(student.backbone.blocks), config.optim.layer_decay, config.optim.patch_embed_lr
    )
    optimizer = build_optimizer(groups, config.optim.name, config.optim.betas, 1e-8, config.optim.momentum)
    scaler = LossScaler(config.train.precision == "fp16", world.device)
    nonfinite = NonFiniteSteps(config.train.max_nonfinite, world.device)

    # -- checkpoint ---------------------------------------------------------------------------------------------------
    checkpointer = Checkpointer(
        run_dir, world, config.checkpoint.keep, length.keep, config.checkpoint.asynchronous, life_now
    )  # fmt: skip

    def updated_tensors() -> dict[str, Tensor]:
        """What the optimizer and the EMA change, and nothing before them."""
        return {
            **module_tensors(student, "student", buffers=False),
            **module_tensors(teacher, "teacher", buffers=False),
            **optimizer_tensors(optimizer),
        }

    def other_tensors() -> dict[str, Tensor]:
        return {
            **module_tensors(student, "student", parameters=False),
            **module_tensors(teacher, "teacher", parameters=False),
            **method.tensors(),
            **scaler.tensors(),
            "skipped_in_a_row": nonfinite.in_a_row,
        }

    start, evaluated, state = 0, -1, None
    bad_images: dict[str, str] = {}
    pulse.at("reading the checkpoint", 0)
    checkpointer.sweep()
    if saved := checkpointer.newest():
        state = checkpointer.load(saved, {**updated_tensors(), **other_tensors()})
        start, evaluated, bad_images = saved.step, state["evaluated"], state["bad_images"]
        _check_data_is_the_same(config, source, state["data"])
    else:
        initialise(student, config.seed, config.model.layer_scale)
        if config.init.backbone:
            logger.info("%s", start_from(config.init.backbone, config.model, student.backbone))
        ema.copy()

    step_now = start
    monitor = Monitor(
        run_dir, world.rank, world.size, length.total, config.train.batch, world.device, length.log,
        config.log.tensorboard, start, console, length.epoch, on_phase=lambda name: pulse.at(name, step_now + 1),
    )  # fmt: skip
    if state is not None:
        monitor.load_state_dict(state["monitor"])
        monitor.message(
            f"{run_dir} is complete: it holds step {start}, its last; a new run needs another output_dir"
            if start >= length.total
            else f"resuming {run_dir} from step {start}"
        )
    if world.rank == 0:
        backend = resolve_backend(config.parallel.attention, world.device, config.train.precision)
        write_durably(run_dir / "config.yaml", to_yaml(config).encode())
        write_environment(run_dir, world.size, world.device, {"attention": backend, "life": life_now})
        parameters = sum(p.numel() for p in student.backbone.parameters())
        compiled = f" (compiled code: {native.variant()})" if world.device.type == "cpu" else ""
        monitor.message(
            f"{world.size} process(es) on {world.device.type}{compiled}, {torch.get_num_threads()} thread(s) each, "
            f"attention {backend}, {config.train.precision}; backbone "
            f"{parameters / 1e6:.1f} M parameters; {len(source):,} images, {length.total:,} steps of "
            f"{config.train.batch}, {length.epoch} steps an epoch"
        )

    # -- update step --------------------------------------------------------------------------------------------------
    parts: dict[str, list[Tensor]] = {}
    for group in groups:
        part = "all" if config.optim.clip_scope == "all" else group["part"]
        parts.setdefault(part, []).extend(group["params"])

    def update(step: int) -> Agreed:
        values = schedule(step)
        apply_step_values(optimizer, values)
        with monitor.phase("data"):
            batches = [next(loader).to(world.device) for _ in range(per_rank)]
        if config.crops.colours == "device":
            with monitor.phase("colours"):
                batches = [batch.coloured() for batch in batches]
        targets = method.targets(batches, values.teacher_temperature)
        losses: dict[str, Tensor] = {}
        for number, batch in enumerate(batches):
            student.set_requires_gradient_sync(number == per_rank - 1)  # type: ignore[operator]
            with monitor.phase("teacher"):
                target = next(targets)
            with monitor.phase("student"):
                loss, meters = method.loss(batch, target)
            with monitor.phase("backward"):
                scaler.scaled(loss / per_rank).backward()
            monitor.record(step + 1, meters)
            losses |= {key: value + losses.get(key, 0) for key, value in meters.items() if key.startswith("loss")}
        new_bad_images = {name: reason for batch in batches for name, reason in batch.bad if name not in bad_images}
        unheard_bad_images.update(new_bad_images)
        agreement.propose(
            Agreed(
                stop=signals.requested is not None,
                save_failed=checkpointer.failed(),
                nonfinite=nonfinite.too_many(),
                bad_images=len(new_bad_images),
            )
        )
        with monitor.phase("optimizer"):
            checkpointer.before_update()
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
            # An overflow that only lowers fp16's loss scale is part of finding it, and no sign of trouble.
            trouble = skip * (scaler.scale <= 1)
            scaler.update(skip)
        with monitor.phase("ema"):
            ema.update(values.teacher_momentum, skip)
            method.commit(skip)
        norms_by_name = {f"grad_norm/{part}": norm for part, norm in norms.items()}
        nonfinite.add(step + 1, trouble, {**losses, **norms_by_name}, [batch.samples for batch in batches])
        monitor.record(
            step + 1,
            {
                **norms_by_name,
                **method.centre_norms(),
                "skipped": skip,
                "lr": values.learning_rate,
                "lr_backbone": values.learning_rate * values.backbone_factor,
                "lr_prototypes": values.prototype_learning_rate,
                "weight_decay": values.weight_decay,
                "teacher_momentum": values.teacher_momentum,
                "teacher_temperature": values.teacher_temperature,
                "loss_scale": scaler.scale,
            },
        )
        return agreement.result()

    unheard_bad_images: dict[str, str] = {}

    def share_bad_images() -> None:
        """Let every rank know all of them, so that all count the same."""
        for found in agreement.gather(dict(unheard_bad_images)):
            for name, reason in found.items():
                if name not in bad_images and world.rank == 0:
                    logger.warning("unreadable image replaced: %s (%s)", name, reason)
                bad_images[name] = reason
        unheard_bad_images.clear()
        if len(bad_images) > config.data.max_bad_images:
            raise RunFailed(
                f"{len(bad_images)} images of {config.data.train} cannot be read, more than data.max_bad_images="
                f"{config.data.max_bad_images} (which may be raised); the last one: {name} ({reason})"
            )

    def save(step: int) -> None:
        with monitor.phase("checkpoint"):
            state = {
                "monitor": monitor.state_dict(),
                "world_size": world.size,
                "evaluated": evaluated,
                "bad_images": bad_images,
                # Randomness is a function of the seed and the place in the run: there is no generator to save.
                "stream": {"seed": config.seed, "step": step, "images": step * config.train.batch},
                "data": {"images": len(source), "fingerprint": source.fingerprint},
                "config": to_yaml(config),
                "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "numpy", "pillow")},
            }
            checkpointer.save(step, updated_tensors(), other_tensors(), state)

    def features(images: Tensor) -> dict[str, Tensor]:
        agreement.propose(Agreed(stop=signals.requested is not None))
        pulse.at("evaluation", step_now + 1)
        if agreement.result().stop:
            raise _Stopped
        return teacher.features(images)

    def evaluate(step: int) -> int:
        with monitor.phase("evaluation"):
            results: dict[str, float] = {}
            for task in config.eval.tasks:
                found = evaluations[task](features, config, world.rank, world.size, world.device)
                results |= {f"eval/{name}": value for name, value in found.items()}
        monitor.event(step, results)
        return step

    def stop_for_nonfinite() -> None:
        by_rank: list[Any] = agreement.gather(nonfinite.last_steps(source.name))
        path, line = write_report(run_dir, by_rank) if world.rank == 0 else (None, "")
        line = str(agreement.gather(f"{line}; report: {path}")[0])
        raise NonFiniteRun(line)

    # -- loop ---------------------------------------------------------------------------------------------------------
    loader = build_loader(config, source, start, length.total, world.rank, per_rank, world.device.type == "cuda")
    student.train()
    teacher.eval()
    done = start
    try:
        if evaluated < start and (
            due(start, length.evaluation, length.total, last=length.evaluation > 0)
            or (start == 0 and length.evaluation > 0)
        ):
            evaluated = evaluate(start)
            if start == length.total:
                save(start)
        for step_now in range(start, length.total):
            agreed = update(step_now)
            done = step_now + 1
            if agreed.bad_images:
                share_bad_images()
            if agreed.save_failed:
                checkpointer.finish()
            if agreed.nonfinite:
                stop_for_nonfinite()
            if (report := checkpointer.report()) is not None:
                monitor.event(report.step, report.metrics(), quiet=True)
            if due(done, length.log, length.total):
                monitor.record(done, {"param_norm": _norm(ema.student), "bad_images": len(bad_images)})
                monitor.flush(done)
                if world.rank == 0:
                    check_life(run_dir, life_now)
            if agreed.stop and done < length.total:
                raise _Stopped
            if due(done, length.evaluation, length.total, last=length.evaluation > 0):
                evaluated = evaluate(done)
            if due(done, length.checkpoint, length.total):
                save(done)
        checkpointer.finish()
        return True
    except _Stopped:
        if done > start:
            save(done)
        checkpointer.finish()
        monitor.message(
            f"stopped by {_who(agreement, signals)} after step {done}, which is saved; the same command continues"
        )
        return False
    finally:
        monitor.close()
        checkpointer.close()


def _check_data_is_the_same(config: Config, source: Source, earlier: dict[str, Any]) -> None:
    if earlier["fingerprint"] != source.fingerprint and not config.data.allow_change:
        raise UserError(
            f"data.train={config.data.train} lists other images than when this run was saved: {len(source):,} now, "
            f"{earlier['images']:,} then, or others\nrestore them, or go on with data.allow_change=true: epochs, and "
            "all schedules that count in them, change with the number of images"
        )


def _who(agreement: Agreement, signals: StopSignals) -> str:
    asked = [f"{name} to rank {rank}" for rank, name in enumerate(agreement.gather(signals.requested)) if name]
    return ", ".join(asked[:3])


def _norm(parameters: list[Tensor]) -> Tensor:
    return gradient_norms({"all": parameters})["all"]
