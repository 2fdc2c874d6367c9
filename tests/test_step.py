from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import tiny_batch, tiny_config, tiny_network
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dinov2_fsdp.config import Config
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.ssl import ema as ema_module
from dinov2_fsdp.ssl.centering import SoftmaxCentering
from dinov2_fsdp.ssl.ema import PARAMETERS_AT_ONCE, Ema
from dinov2_fsdp.ssl.losses import dino_loss, entropy, ibot_loss, koleo_loss
from dinov2_fsdp.ssl.network import Network
from dinov2_fsdp.ssl.step import SelfDistillation

CPU = torch.device("cpu")
GO, SKIP = torch.zeros(()), torch.ones(())

VARIANTS: dict[str, dict[str, Any]] = {
    "shared head": {},
    "separate iBOT head": {"ibot_head__separate": True},
    "BatchNorm": {"dino_head__batch_norm": True},
    "separate heads with BatchNorm": {
        "dino_head__batch_norm": True, "ibot_head__batch_norm": True, "ibot_head__separate": True,
    },
    "LayerNorm": {"dino_head__layer_norm": True},
    "no iBOT": {"loss__ibot": 0.0},
    "no iBOT but a separate head asked for": {"loss__ibot": 0.0, "ibot_head__separate": True},
    "no DINO": {"loss__dino": 0.0},
    "no DINO but separate heads": {"loss__dino": 0.0, "ibot_head__separate": True},
    "no KoLeo": {"loss__koleo": 0.0},
    "no local crops": {"crops__local_number": 0},
    "registers": {"model__registers": 4},
    "SwiGLU": {"model__ffn": "swiglu"},
    "no LayerScale": {"model__layer_scale": 0.0},
    "stochastic depth": {"model__drop_path": 0.4},
    "Sinkhorn–Knopp": {"loss__centering": "sinkhorn"},
    "no centering": {"loss__centering": "none"},
}  # fmt: skip


def _method(config: Config) -> SelfDistillation:
    """Student and teacher of different weights, so that neither can be taken for the other."""
    student, teacher = tiny_network(config, seed=0), tiny_network(config, seed=1)
    return SelfDistillation(config, student, teacher.requires_grad_(False), CPU)


def _run(method: SelfDistillation, batch: Microbatch, temperature: float = 0.05) -> tuple[Tensor, dict[str, Tensor]]:
    (targets,) = method.targets([batch], temperature)
    loss, meters = method.loss(batch, targets)
    method.commit(GO)
    return loss, meters


# -- gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_of_the_student_gets_a_gradient(variant: str, masked: bool) -> None:
    """One without would make the ranks' collectives differ, and would not be part of the optimizer's state."""
    config = tiny_config(**VARIANTS[variant])
    method = _method(config)
    loss, _ = _run(method, tiny_batch(config, masked=masked))
    loss.backward()
    without = [name for name, p in method.student.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in method.student.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", ["shared head", "separate iBOT head", "BatchNorm", "separate heads with BatchNorm"])
def test_one_masked_patch_is_enough(variant: str) -> None:
    config = tiny_config(**VARIANTS[variant])
    batch = tiny_batch(config, masked=False)
    batch.masks[3, 5] = True
    batch = replace(batch, masked_patches=torch.tensor([3 * 16 + 5]), mask_weights=torch.ones(1))
    method = _method(config)
    loss, _ = _run(method, batch)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.student.parameters())


def test_the_teacher_never_gets_gradients() -> None:
    config = tiny_config(ibot_head__separate=True)
    student, teacher = tiny_network(config, seed=0), tiny_network(config, seed=1)  # not frozen by the caller
    method = SelfDistillation(config, student, teacher, CPU)
    batch = tiny_batch(config)
    (targets,) = method.targets([batch], 0.05)
    assert not targets.dino.requires_grad
    assert not targets.ibot.requires_grad
    method.loss(batch, targets)[0].backward()
    assert [name for name, p in teacher.named_parameters() if p.grad is not None] == []


def test_the_teacher_keeps_nothing_for_a_backward_pass() -> None:
    config = tiny_config()
    method, modes = _method(config), []
    method.teacher.register_forward_hook(lambda *_: modes.append(torch.is_grad_enabled()))
    list(method.targets([tiny_batch(config)], 0.05))
    assert modes == [False]


def test_only_masked_patches_teach_the_mask_token() -> None:
    config = tiny_config()
    gradients = []
    for masked in (True, False):
        method = _method(config)
        _run(method, tiny_batch(config, masked=masked))[0].backward()
        gradients.append(method.student.backbone.mask_token.grad)
    assert [gradient is not None and bool(gradient.any()) for gradient in gradients] == [True, False]


# -- what teacher and student see -------------------------------------------------------------------------------------


def test_the_teacher_sees_the_unmasked_global_crops_only() -> None:
    config = tiny_config()
    batch, method = tiny_batch(config), _method(config)
    (targets,) = method.targets([batch], 0.05)
    output = method.teacher([batch.normalised_globals()], None, batch.masked_patches)
    torch.testing.assert_close(targets.dino, (output["dino"] / 0.05).softmax(dim=-1))
    torch.testing.assert_close(targets.ibot, (output["ibot"] / 0.05).softmax(dim=-1))
    assert len(targets.dino) == 2 * batch.images
    assert len(targets.ibot) == len(batch.masked_patches)


def test_the_network_reads_the_class_tokens_and_the_chosen_patches() -> None:
    config = tiny_config(ibot_head__separate=True, model__registers=4)
    network, batch = tiny_network(config), tiny_batch(config)
    large, small = batch.normalised_globals(), batch.normalised_locals()
    output = network([large, small], batch.masks, batch.masked_patches)
    whole = network.backbone.forward_features(large, batch.masks)
    cls = torch.cat([whole["x_norm_clstoken"], network.backbone(small)])
    torch.testing.assert_close(output["cls"], cls)
    torch.testing.assert_close(output["dino"], network.dino_head(cls))
    assert network.ibot_head is not None
    chosen = whole["x_norm_patchtokens"].flatten(0, 1)[batch.masked_patches]
    torch.testing.assert_close(output["ibot"], network.ibot_head(chosen))


def test_a_shared_head_serves_both_losses() -> None:
    network, batch = tiny_network(tiny_config()), tiny_batch(tiny_config())
    assert network.ibot_head is None
    large = batch.normalised_globals()
    output = network([large], batch.masks, batch.masked_patches)
    patches = network.backbone.forward_features(large, batch.masks)["x_norm_patchtokens"]
    torch.testing.assert_close(output["ibot"], network.dino_head(patches.flatten(0, 1)[batch.masked_patches]))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 0.1), (0.5, 2.0, 0.0), (1.0, 0.0, 0.3), (0.0, 3.0, 1.0)])
def test_the_loss_is_the_weighted_sum(weights: tuple[float, float, float]) -> None:
    dino, ibot, koleo = weights
    config = tiny_config(loss__dino=dino, loss__ibot=ibot, loss__koleo=koleo)
    batch, method = tiny_batch(config), _method(config)
    (targets,) = method.targets([batch], 0.05)
    loss, meters = method.loss(batch, targets)
    output = method.student([batch.normalised_globals(), batch.normalised_locals()], batch.masks, batch.masked_patches)
    expected = dino * dino_loss(output["dino"], targets.dino, 4, 0.1)
    if ibot:
        expected = expected + ibot * ibot_loss(output["ibot"], targets.ibot, batch.mask_weights, 8, 0.1)
    if koleo:
        expected = expected + koleo * koleo_loss(output["cls"], 4)
    torch.testing.assert_close(loss, expected)
    shown = sum(
        weight * meters[f"loss/{name}"]
        for name, weight in zip(("dino", "ibot", "koleo"), weights, strict=True)
        if weight
    )
    torch.testing.assert_close(meters["loss"], shown)
    assert not any(meter.requires_grad for meter in meters.values())


def test_the_student_drops_other_branches_at_every_place() -> None:
    config = tiny_config(model__drop_path=0.5)
    method, batch = _method(config), tiny_batch(config)
    (targets,) = method.targets([batch], 0.05)

    def loss(step: int, index: int) -> float:
        return method.loss(replace(batch, step=step, index=index), targets)[0].item()

    assert loss(0, 0) == loss(0, 0)
    assert len({loss(0, 0), loss(0, 1), loss(1, 0)}) == 3


# -- targets ----------------------------------------------------------------------------------------------------------


def test_the_teacher_is_sharper_than_the_student_for_the_same_logits() -> None:
    config = tiny_config(loss__centering="none")
    network = tiny_network(config)
    method = SelfDistillation(config, network, network, CPU)
    batch = tiny_batch(config, masked=False)
    for temperature in (config.loss.teacher_temperature_start, config.loss.teacher_temperature):
        (targets,) = method.targets([batch], temperature)
        _, meters = method.loss(batch, targets)
        assert meters["teacher/entropy_dino"] < meters["student/entropy_dino"]


@pytest.mark.parametrize("separate", [False, True])
def test_both_centres_move_at_every_step(separate: bool) -> None:
    config = tiny_config(ibot_head__separate=separate)
    method, means = _method(config), {"dino": [], "ibot": []}  # type: ignore[var-annotated]
    for step in range(3):
        batch = tiny_batch(config, step)
        output = method.teacher([batch.normalised_globals()], None, batch.masked_patches)
        for name, rows in means.items():
            rows.append(output[name].double().mean(dim=0))
        _run(method, batch)
        for name, rows in means.items():
            centre = torch.zeros(40, dtype=torch.float64)
            for mean in rows:
                centre = 0.9 * centre + 0.1 * mean
            found = method.tensors()[f"centering.{name}.centre"]
            torch.testing.assert_close(found.double(), centre, rtol=1e-4, atol=1e-6)
            assert found.norm() > 0


def test_a_skipped_step_leaves_both_centres() -> None:
    config = tiny_config()
    method = _method(config)
    _run(method, tiny_batch(config))
    before = {name: tensor.clone() for name, tensor in method.tensors().items()}
    (targets,) = method.targets([tiny_batch(config, 1)], 0.05)
    method.loss(tiny_batch(config, 1), targets)
    method.commit(SKIP)
    assert all(torch.equal(before[name], tensor) for name, tensor in method.tensors().items())
    assert len(before) == 2


def test_microbatches_of_a_step_share_a_centre_and_move_it_together() -> None:
    config = tiny_config()
    method, batches = _method(config), [tiny_batch(config, 0, 0), tiny_batch(config, 0, 1)]
    list(method.targets(batches, 0.05))
    method.commit(GO)
    outputs = [method.teacher([b.normalised_globals()], None, b.masked_patches) for b in batches]
    for name, rows in (("dino", 16), ("ibot", sum(len(b.masked_patches) for b in batches))):
        logits = torch.cat([output[name] for output in outputs])
        assert len(logits) == rows
        torch.testing.assert_close(method.tensors()[f"centering.{name}.centre"], 0.1 * logits.mean(dim=0))


def test_the_centres_exchange_starts_with_the_last_microbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    config, calls = tiny_config(), []
    monkeypatch.setattr(SoftmaxCentering, "reduce", lambda self: calls.append(self))
    method = _method(config)
    targets = method.targets([tiny_batch(config, 0, 0), tiny_batch(config, 0, 1)], 0.05)
    next(targets)
    assert calls == []
    next(targets)
    assert calls == list(method.centerings.values())


def test_sinkhorn_balances_all_microbatches_of_a_step() -> None:
    config = tiny_config(loss__centering="sinkhorn")
    method, batches = _method(config), [tiny_batch(config, 0, 0), tiny_batch(config, 0, 1)]
    apart = torch.cat([target.dino for batch in batches for target in method.targets([batch], 0.07)])
    together = torch.cat([target.dino for target in method.targets(batches, 0.07)])
    logits = [method.teacher([b.normalised_globals()], None, b.masked_patches)["dino"] for b in batches]
    plan = (torch.cat(logits).double() / 0.07).exp().T
    for _ in range(3):
        plan = plan / plan.sum(dim=1, keepdim=True) / 40
        plan = plan / plan.sum(dim=0, keepdim=True) / 16
    torch.testing.assert_close(together.double(), (16 * plan).T, rtol=1e-3, atol=1e-5)
    assert (apart - together).abs().max() > 1e-3


def test_collapse_shows_in_the_entropy_of_the_mean_target() -> None:
    config = tiny_config(loss__centering="none")
    method, batch = _method(config), tiny_batch(config)
    (targets,) = method.targets([batch], 0.05)
    one_output = replace(targets, dino=torch.eye(40)[torch.zeros(8, dtype=torch.int64)])
    spread = replace(targets, dino=torch.eye(40)[torch.arange(8)])
    assert method.loss(batch, one_output)[1]["teacher/entropy_mean_target"] == 0
    mean = method.loss(batch, spread)[1]["teacher/entropy_mean_target"]
    torch.testing.assert_close(mean, entropy(torch.full((1, 8), 1 / 8)))


# -- EMA --------------------------------------------------------------------------------------------------------------


def _pair(count: int = 3) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(nn.ModuleList(nn.Linear(5, 4) for _ in range(count)) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("readable", [True, False], ids=["CPU", "as on a GPU"])
@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.992, 0.999999, 1.0])
def test_the_teacher_is_the_students_moving_average(
    momentum: float, readable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ema_module, "has_memory", lambda _: readable)
    student, teacher = _pair(PARAMETERS_AT_ONCE)  # more parameters than one fused update takes
    expected = [t.double() for t in teacher.parameters()]
    ema = Ema(student, teacher)
    for _ in range(3):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
        expected = [
            momentum * t + (1 - momentum) * s.double() for t, s in zip(expected, student.parameters(), strict=True)
        ]
        ema.update(momentum, GO)
    for found, value in zip(teacher.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), value, rtol=1e-5, atol=1e-6)


def test_a_skipped_step_leaves_the_teacher() -> None:
    student, teacher = _pair()
    with torch.no_grad():
        next(student.parameters()).fill_(torch.inf)
    before = [t.clone() for t in teacher.parameters()]
    Ema(student, teacher).update(0.5, SKIP)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_a_copied_teacher_is_the_student() -> None:
    student, teacher = _pair()
    Ema(student, teacher).copy()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))
    assert not {p.data_ptr() for p in student.parameters()} & {p.data_ptr() for p in teacher.parameters()}


def test_an_ema_leaves_the_student_alone() -> None:
    student, teacher = _pair()
    before = [s.clone() for s in student.parameters()]
    Ema(student, teacher).update(0.9, GO)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))


def test_activation_checkpointing_does_not_hide_the_students_parameters() -> None:
    config = tiny_config()
    student, teacher = tiny_network(config, 0), tiny_network(config, 1)
    for index in range(2):
        student.backbone.blocks[index] = checkpoint_wrapper(student.backbone.blocks[index])
    Ema(student, teacher).copy()
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), teacher.parameters(), strict=True))


def test_networks_that_differ_are_refused() -> None:
    with pytest.raises(AssertionError, match="ibot_head"):
        Ema(Network(tiny_config()), Network(tiny_config(ibot_head__separate=True)))
