"""One step of self-distillation: teacher → targets → student → losses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.stochastic_depth import DepthPlan, draw_plan
from dinov2_fsdp.rng import generator
from dinov2_fsdp.ssl.centering import build_centering
from dinov2_fsdp.ssl.losses import dino_loss, entropy, ibot_loss, koleo_loss, softmax_entropy
from dinov2_fsdp.ssl.network import Network


@dataclass
class Targets:
    """What the teacher says of one microbatch: ``dino`` (2·B, K) and ``ibot`` (masked, K) probabilities."""

    dino: Tensor
    ibot: Tensor


class SelfDistillation:
    """The method on top of two networks that somebody else has built, sharded and initialised."""

    def __init__(self, config: Config, student: Network, teacher: Network, device: torch.device) -> None:
        self.config, self.student, self.teacher = config, student, teacher
        loss, heads = config.loss, {"dino": config.dino_head, "ibot": config.ibot_head}
        if not config.ibot_head.separate:
            heads["ibot"] = config.dino_head
        self.centerings = {
            name: build_centering(
                loss.centering, head.prototypes, loss.centre_momentum, loss.sinkhorn_iterations, device
            )
            for name, head in heads.items()
        }
        if loss.ibot == 0:
            del self.centerings["ibot"]

    def targets(self, microbatches: list[Microbatch], temperature: float) -> Iterator[Targets]:
        """Yield the teacher's targets for a rank's microbatches of one step, one after the other.

        With an EMA centre the teacher sees a microbatch when its targets are asked for, so that only one microbatch's
        targets exist at a time; Sinkhorn–Knopp needs the logits of the whole step first.
        """
        joint = any(centering.joint for centering in self.centerings.values())
        chunks = [microbatches] if joint else [[batch] for batch in microbatches]
        for number, chunk in enumerate(chunks):
            targets = self._chunk_targets(chunk, temperature)
            if number == len(chunks) - 1:
                for centering in self.centerings.values():
                    centering.reduce()
            yield from targets

    @torch.no_grad()
    def _chunk_targets(self, chunk: list[Microbatch], temperature: float) -> list[Targets]:
        outputs = [self.teacher([batch.normalised_globals()], None, batch.masked_patches) for batch in chunk]
        dino = self.centerings["dino"].targets([output["dino"] for output in outputs], temperature)
        if "ibot" not in self.centerings:
            return [Targets(target, target[:0]) for target in dino]
        ibot = self.centerings["ibot"].targets([output["ibot"] for output in outputs], temperature)
        return [Targets(d, i) for d, i in zip(dino, ibot, strict=True)]

    def loss(self, batch: Microbatch, targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one microbatch's loss, a 0-d tensor, and its meters, 0-d tensors without gradient."""
        weights, temperature, images = self.config.loss, self.config.loss.student_temperature, batch.images
        crops = [batch.normalised_globals()]
        if batch.local_crops.shape[0]:
            crops.append(batch.normalised_locals())
        output = self.student(crops, batch.masks, batch.masked_patches, self._depth_plan(batch, crops))

        dino = dino_loss(output["dino"], targets.dino, images, temperature)
        total = weights.dino * dino
        meters = {"loss/dino": dino}
        if weights.ibot > 0:
            ibot = ibot_loss(output["ibot"], targets.ibot, batch.mask_weights, 2 * images, temperature)
            total = total + weights.ibot * ibot
            meters["loss/ibot"] = ibot
            meters["teacher/entropy_ibot"] = entropy(targets.ibot)
        if weights.koleo > 0:
            koleo = koleo_loss(output["cls"], images, weights.koleo_global)
            total = total + weights.koleo * koleo
            meters["loss/koleo"] = koleo
        with torch.no_grad():
            meters["student/entropy_dino"] = softmax_entropy(output["dino"][: 2 * images], temperature)
            meters["teacher/entropy_dino"] = entropy(targets.dino)
            # Collapse to one output shows here first: the mean target's entropy falls to zero.
            meters["teacher/entropy_mean_target"] = entropy(targets.dino.mean(dim=0, keepdim=True))
        return total, {"loss": total.detach(), **{name: value.detach() for name, value in meters.items()}}

    def _depth_plan(self, batch: Microbatch, crops: list[Tensor]) -> DepthPlan | None:
        backbone = self.student.backbone
        layout: Layout = backbone.layout_of(crops)
        rng = generator(self.config.seed, "depth", batch.step, batch.index)
        plan = draw_plan(layout, len(backbone.blocks), self.config.model.drop_path, rng)
        return plan.to(crops[0].device) if plan is not None else None

    def commit(self, skip: Tensor) -> None:
        """End the step for the centres; a non-zero ``skip`` leaves them as they were."""
        for centering in self.centerings.values():
            centering.commit(skip)

    def centre_norms(self) -> dict[str, Tensor]:
        """Return the norm of each centre, 0-d; the centres of the step before, as nothing waits for the exchange."""
        return {f"centre_norm/{name}": centering.norm() for name, centering in self.centerings.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint holds, and fills on loading."""
        return {
            f"centering.{name}.{key}": tensor
            for name, centering in self.centerings.items()
            for key, tensor in centering.tensors().items()
        }
