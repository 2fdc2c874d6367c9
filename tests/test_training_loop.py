"""The whole loop against one written out in plain PyTorch: losses, centre, schedules, clipping, AdamW, EMA, cadence.

Shared with the code under test are only the data (:class:`Microbatches`) and the network's forward pass; both have
references of their own.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_network
from torch import Tensor
from training import saved_tensors, tiny_run, train_on_ranks

from dinov2_fsdp import native
from dinov2_fsdp.config import Config
from dinov2_fsdp.data.loader import Microbatches
from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.parallel.place import Place
from dinov2_fsdp.parallel.pulse import Pulse
from dinov2_fsdp.parallel.world import end_world, start_world
from dinov2_fsdp.signals import StopSignals
from dinov2_fsdp.train import run, train

STEPS, WARMUP, DEPTH = 6, 2, 2
SETTINGS: dict[str, Any] = {
    "train__duration": f"{STEPS}it",
    "crops__implementation": "reference",  # the same images with and without compiled code
    "optim__lr": 0.02,
    "optim__warmup": f"{WARMUP}it",
    "optim__layer_decay": 0.8,
    "optim__clip": 0.5,
    "optim__weight_decay": [0.1, 0.4],
    "optim__freeze_prototypes": "2it",
    "loss__teacher_temperature_start": 0.04,
    "loss__teacher_temperature": 0.08,
    "loss__teacher_temperature_warmup": "3it",
    "loss__koleo": 0.3,
    "loss__centre_momentum": 0.7,
    "teacher__momentum": [0.8, 1.0],
    "log__every": "1it",
}


class PlainRun:
    """DINOv2's training loop on one process, without sharding, written from the papers."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config = config
        self.student, self.teacher = tiny_network(config), tiny_network(config)
        for network in (self.student, self.teacher):
            network.backbone.set_attention_backend("math")
        self.data = Microbatches(config, open_source(config.data.train, folder))
        self.centres = {"dino": torch.zeros(40), "ibot": torch.zeros(40)}
        self.optimizer = torch.optim.AdamW(
            [{"params": [p], "name": n, "lr": 0.0} for n, p in self.student.named_parameters()],
            betas=(0.9, 0.999), eps=1e-8,
        )  # fmt: skip
        self.losses: list[dict[str, float]] = []

    def step(self, t: int) -> None:
        config = self.config
        batches = [self.data[t, number] for number in range(config.train.batch // config.train.microbatch)]
        temperature = 0.04 + 0.04 * min(t / 2, 1)
        seen: dict[str, list[Tensor]] = {"dino": [], "ibot": []}
        terms: dict[str, float] = {"dino": 0.0, "ibot": 0.0, "koleo": 0.0}
        self.optimizer.zero_grad()
        for batch in batches:
            with torch.no_grad():
                taught = self.teacher([normalised(batch.global_crops)], None, batch.masked_patches)
            targets = {}
            for name, centre in self.centres.items():
                seen[name].append(taught[name])
                targets[name] = ((taught[name] - centre) / temperature).softmax(1)
            found = self.losses_of(batch, targets)
            (found["dino"] + found["ibot"] + 0.3 * found["koleo"]).div(len(batches)).backward()
            for name, value in found.items():
                terms[name] += value.item() / len(batches)
        for name, logits in seen.items():
            if rows := torch.cat(logits).shape[0]:
                self.centres[name] = 0.7 * self.centres[name] + 0.3 * torch.cat(logits).sum(0) / rows
        self.update(t)
        with torch.no_grad():
            momentum = cosine(0.8, 1.0, t, STEPS)
            for old, new in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                old.mul_(momentum).add_(new, alpha=1 - momentum)
        self.losses.append(terms)

    def losses_of(self, batch: Any, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        images = len(batch.global_crops) // 2
        crops = [normalised(batch.global_crops), normalised(batch.local_crops)]
        output = self.student(crops, batch.masks, batch.masked_patches)
        log_p = (output["dino"] / 0.1).log_softmax(1).split(images)
        pairs = [(s, t) for s in range(len(log_p)) for t in range(2) if s != t]
        taught = targets["dino"].split(images)
        dino = sum(-(taught[t] * log_p[s]).sum(1).mean() for s, t in pairs) / len(pairs)
        ibot = torch.zeros(())
        patches = batch.masks.shape[1]
        for row, patch in enumerate(batch.masked_patches.tolist()):
            of_crop = batch.masks[patch // patches].sum()
            ibot = ibot - (targets["ibot"][row] * (output["ibot"][row] / 0.1).log_softmax(0)).sum() / of_crop
        koleo = torch.zeros(())
        for crop in output["cls"].split(images)[:2]:
            points = F.normalize(crop, dim=1)
            for i in range(images):
                others = [(points[i] - points[j] + 1e-8).norm() for j in range(images) if j != i]
                koleo = koleo - (min(others, key=lambda distance: distance.item()) + 1e-8).log() / images
        return {"dino": dino, "ibot": ibot / (2 * images), "koleo": koleo}  # type: ignore[dict-item]

    def update(self, t: int) -> None:
        config = self.config
        for part in ("backbone", "dino_head"):
            torch.nn.utils.clip_grad_norm_(getattr(self.student, part).parameters(), 0.5)
        peak = config.optim.lr * math.sqrt(config.train.batch / 1024)
        rate = peak * t / (WARMUP - 1) if t < WARMUP else cosine(peak, 1e-6, t - WARMUP, STEPS - WARMUP)
        for group in self.optimizer.param_groups:
            name, parameter = group["name"], group["params"][0]
            block = re.search(r"blocks\.(\d+)", name)
            above = DEPTH - int(block[1]) if block else DEPTH + 1 if re.search("embed|token", name) else 0
            group["lr"] = rate * 0.8**above * (0.2 if "patch_embed" in name else 1)
            if "last_layer" in name and t < 2:
                group["lr"] = 0.0
            exempt = name.endswith("bias") or "norm" in name or "gamma" in name or parameter.ndim == 1
            group["weight_decay"] = 0.0 if exempt else cosine(0.1, 0.4, t, STEPS)
        self.optimizer.step()


def normalised(images: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (images / 255 - mean[:, None, None]) / std[:, None, None]


def cosine(start: float, end: float, step: int, steps: int) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * step / steps))


def logged(run_dir: Path, key: str) -> dict[int, float]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.mark.slow
def test_a_run_is_the_plain_loop(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", **SETTINGS)
    # AdamW's first steps turn the last bits of small gradients into whole steps: torch's roundings on both sides.
    with native.switched_off():
        train(config, console=False)
    plain = PlainRun(config, tmp_path)
    start = {name: p.detach().clone() for name, p in plain.student.named_parameters()}
    for t in range(STEPS):
        plain.step(t)
    for term in ("dino", "ibot", "koleo"):
        found = logged(tmp_path / "run", f"loss/{term}")
        assert [found[t + 1] for t in range(STEPS)] == pytest.approx([loss[term] for loss in plain.losses], rel=2e-5)
    saved = saved_tensors(tmp_path / "run")
    for role, network in (("student", plain.student), ("teacher", plain.teacher)):
        for name, parameter in network.named_parameters():
            # What a parameter has moved, not what it is: most of that is the same initial value.
            moved, expected = saved[f"{role}.{name}"] - start[name], parameter.detach() - start[name]
            assert expected.norm() > 0, name
            assert (moved - expected).norm() < 2e-3 * expected.norm(), f"{role}.{name}"
    for name, centre in plain.centres.items():
        torch.testing.assert_close(saved[f"centering.{name}.centre"], centre, rtol=1e-4, atol=1e-6)
    # By compiled code, where there is some: the same until such steps have been taken, and near it afterwards.
    train(tiny_run(tmp_path / "compiled", **SETTINGS), console=False)
    for term in ("dino", "ibot", "koleo"):
        found, expected = logged(tmp_path / "compiled", f"loss/{term}"), [loss[term] for loss in plain.losses]
        assert [found[1], found[2]] == pytest.approx(expected[:2], rel=2e-5)
        assert [found[t + 1] for t in range(STEPS)] == pytest.approx(expected, rel=5e-3)


def evaluated(config: Config) -> list[int]:
    """Run a config whose one evaluation counts its calls; return the steps at which it ran."""

    def evaluation(*_: Any) -> dict[str, float]:
        return {"calls": 1.0}

    with StopSignals() as signals:
        world = start_world(config.parallel, Place())
        try:
            with Pulse(world, config.parallel.timeout) as pulse:
                run(config, world, {"knn": evaluation}, False, signals, pulse)
        finally:
            end_world()
    return sorted(logged(Path(config.output_dir), "eval/calls"))


@pytest.mark.slow
@pytest.mark.parametrize(("every", "expected"), [("3it", [0, 3, 6, 10]), ("0it", []), ("10it", [0, 10])])
def test_evaluations_come_at_the_start_at_every_interval_and_at_the_end(
    tmp_path: Path, every: str, expected: list[int]
) -> None:
    config = tiny_run(tmp_path / "run", train__duration="10it", eval__every=every, eval__test="scenes:n=10,size=16")
    assert evaluated(config) == expected


def test_an_epoch_is_what_the_config_says(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "run", train__duration="2ep", train__epoch=3)
    train(config, console=False)
    assert max(logged(tmp_path / "run", "loss")) == 6


@pytest.mark.slow
@pytest.mark.distributed
def test_koleo_may_look_for_neighbours_on_other_ranks(tmp_path: Path) -> None:
    """Two ranks of four images that search together find what one rank of eight finds."""
    found = {}
    for ranks, microbatch, across in ((1, 8, False), (2, 4, True), (2, 4, False)):
        name = f"{ranks} {across}"
        train_on_ranks(
            tiny_run(tmp_path / name, loss__koleo_global=across, train__microbatch=microbatch, log__every="1it"), ranks
        )
        found[name] = list(logged(tmp_path / name, "loss/koleo").values())
    assert found["2 True"] == pytest.approx(found["1 False"], rel=1e-3)
    assert found["2 False"] != pytest.approx(found["1 False"], rel=1e-3)
