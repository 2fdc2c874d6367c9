"""Checkpoints hold everything of a run, whatever its ranks, and nothing loads by halves."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import differing, metrics, saved_steps, saved_tensors, tiny_run, train_alone, train_as_rank

import dinov2_fsdp.checkpoint.checkpointer as checkpointer_module
from dinov2_fsdp.checkpoint import SaveFailed, Superseded, begin_life, find_checkpoint, list_checkpoints
from dinov2_fsdp.checkpoint.folder import checkpoint_folder, digest, write_manifest
from dinov2_fsdp.config import Config, from_dict
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.ssl.step import SelfDistillation
from dinov2_fsdp.train import train
from dinov2_fsdp.weights import export_backbone, load_backbone, untrained_backbone

STEPS, MIDDLE = 6, 3


def six_steps(run_dir: Path, **overrides: Any) -> Config:
    """A run of six steps that saves after the third, in the middle of a window of metrics."""
    settings = {"train__duration": f"{STEPS}it", "checkpoint__every": f"{MIDDLE}it", "model__drop_path": 0.3}
    return tiny_run(run_dir, **{**settings, **overrides})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; tests must not change it."""
    run_dir = tmp_path_factory.mktemp("run") / "run"
    train_alone(six_steps(run_dir))
    return run_dir


def interrupted(run_dir: Path, copy: Path) -> Config:
    """Return the config of a copy of a run that died after its checkpoint of step 3."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    return six_steps(copy)


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    config = interrupted(run, tmp_path / "resumed")
    assert saved_steps(tmp_path / "resumed") == [MIDDLE]
    train_alone(config)
    resumed = saved_tensors(tmp_path / "resumed")
    assert differing(saved_tensors(run), resumed) == []
    for part in ("student.", "teacher.", "optimizer.", "centering.", "scaler."):
        assert any(name.startswith(part) for name in resumed), part
    assert differing(saved_tensors(run), saved_tensors(run, MIDDLE)) != []


def test_a_resumed_run_writes_the_metrics_of_an_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    train_alone(interrupted(run, tmp_path / "resumed"))
    lines = metrics(tmp_path / "resumed")
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert lines == metrics(run)


def test_a_checkpoint_says_of_which_run_and_which_moment_it_is(run: Path) -> None:
    state = find_checkpoint(run, MIDDLE).state()
    assert from_dict(yaml.safe_load(state["config"])) == six_steps(run)
    assert state["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert {"numpy", "pillow", "torchvision"} <= state["versions"].keys()
    assert state["stream"] == {"seed": 0, "step": MIDDLE, "images": MIDDLE * 8}
    assert (state["step"], state["data"]["images"], state["world_size"]) == (MIDDLE, 24, 1)
    assert state["monitor"]["clock"]["elapsed"] > 0


def test_a_save_reports_its_stall_among_the_metrics(tmp_path: Path) -> None:
    train_alone(six_steps(tmp_path, checkpoint__asynchronous=False))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    reported = {line["step"]: line for line in lines if "checkpoint/stall_s" in line}
    assert MIDDLE in reported
    assert 0 < reported[MIDDLE]["checkpoint/stall_s"] < reported[MIDDLE]["seconds"]
    assert reported[MIDDLE]["checkpoint/writing_s"] > 0
    assert reported[MIDDLE]["checkpoint/gib"] > 0


@pytest.mark.slow
def test_a_save_that_failed_ends_the_run_before_the_next_one_is_due(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpointer_module.dcp, "save", disk_full)
    config = six_steps(tmp_path, train__duration="60it", checkpoint__every="20it", log__every="1it")
    with pytest.raises(SaveFailed, match="rank 0 could not write the checkpoint of step 20: No space left on device"):
        train_alone(config)
    assert 20 <= metrics(tmp_path)[-1]["step"] < 40


def test_a_run_whose_next_life_has_begun_ends_at_its_next_line_of_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off on another node, it would step on beside its successor, and write into the same files."""
    original = SelfDistillation.loss

    def loss(self: SelfDistillation, batch: Any, targets: Any) -> Any:
        if (batch.step, batch.index) == (3, 0):
            begin_life(tmp_path, None)
        return original(self, batch, targets)

    monkeypatch.setattr(SelfDistillation, "loss", loss)
    config = six_steps(tmp_path, train__duration="20it", checkpoint__every="0it", log__every="2it")
    with pytest.raises(Superseded, match=r"this is life 1 .* life 2 has begun"):
        train_alone(config)
    assert metrics(tmp_path)[-1]["step"] == 4
    assert saved_steps(tmp_path) == []


def at_a_late_step(run_dir: Path, step: int) -> None:
    """Let a run's only checkpoint be that of a much later step."""
    (checkpoint,) = list_checkpoints(run_dir)
    late = checkpoint.path.rename(checkpoint_folder(run_dir, step))
    state = checkpoint_folder(run_dir, step) / "state.json"
    text = json.loads(state.read_text()) | {"step": step}
    text["monitor"]["step"] = step
    state.write_text(json.dumps(text))
    files = {path.name: digest(path) for path in late.iterdir() if path.name != "manifest.json"}
    write_manifest(late, step, 1, files)


@pytest.mark.slow
def test_a_run_resumes_at_a_late_step_as_fast_as_at_an_early_one(run: Path, tmp_path: Path) -> None:
    seconds = []
    for name, step in (("early", MIDDLE), ("late", 10**6)):
        interrupted(run, tmp_path / name)
        at_a_late_step(tmp_path / name, step)
        start = time.monotonic()
        train_alone(six_steps(tmp_path / name, train__duration=f"{step + 3}it"))
        seconds.append(time.monotonic() - start)
        assert metrics(tmp_path / name)[-1]["step"] == step + 3
    assert seconds[1] < 3 * seconds[0] + 2


def test_a_finished_run_started_again_does_nothing(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "again")
    before = saved_tensors(tmp_path / "again")
    train_alone(six_steps(tmp_path / "again"))
    assert differing(before, saved_tensors(tmp_path / "again")) == []
    assert metrics(tmp_path / "again") == metrics(run)


def test_a_data_set_that_has_changed_is_noticed_on_resume(run: Path, tmp_path: Path) -> None:
    interrupted(run, tmp_path / "resumed")
    changed = {"data__train": "scenes:n=25,size=32", "data__allow_change": False}
    with pytest.raises(UserError, match=r"other images than when this run was saved: 25 now, 24 then"):
        train_alone(six_steps(tmp_path / "resumed", **changed))
    train_alone(six_steps(tmp_path / "resumed", **{**changed, "data__allow_change": True}))
    assert saved_steps(tmp_path / "resumed") == [MIDDLE, STEPS]


def test_fp16_finds_its_loss_scale_without_counting_that_as_trouble(tmp_path: Path) -> None:
    """KoLeo's gradient overflows at the first scales, more often than the steps in a row that are borne."""
    train_alone(six_steps(tmp_path / "run", train__precision="fp16", model__layer_scale=1e-5, train__max_nonfinite=1))
    saved = saved_tensors(tmp_path / "run")
    assert saved["scaler.scale"].item() < 2.0**15
    assert saved["skipped_in_a_row"].item() == 0


@pytest.mark.distributed
def test_a_checkpoint_of_two_ranks_resumes_on_one(run: Path, tmp_path: Path) -> None:
    """One rank with two microbatches learns what two ranks with one do, so the end must be the same, bit for bit."""
    run_on_ranks(train_as_rank, 2, six_steps(tmp_path / "two"))
    config = interrupted(tmp_path / "two", tmp_path / "resumed")
    train_alone(config)
    assert differing(saved_tensors(run), saved_tensors(tmp_path / "resumed")) == []
    # The line of step 4 is a mean over steps of both lives, in which the numbers of a rank weigh differently.
    for index in (0, -1):
        assert metrics(run)[index] == pytest.approx(metrics(tmp_path / "resumed")[index], rel=1e-6)


def test_a_checkpoint_holds_safetensors_and_json_only(run: Path) -> None:
    files = [path for path in find_checkpoint(run).path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    for path in files:
        if path.suffix == ".json":
            json.loads(path.read_text())
        else:
            load_file(path)


def test_a_step_that_was_not_saved_is_refused_with_those_that_were(run: Path) -> None:
    with pytest.raises(UserError, match=f"no checkpoint of step 5 in .*; steps there: {MIDDLE}, {STEPS}"):
        find_checkpoint(run, 5)


# ---------------------------------------------------------------------------------------------------------------------
# Backbones in and out.


def backbone_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def saved_backbone(run_dir: Path, which: str, step: int | None = None) -> dict[str, Tensor]:
    prefix = f"{which}.backbone."
    saved = saved_tensors(run_dir, step)
    return {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_backbone_comes_from_a_run(run: Path, which: str) -> None:
    loaded = load_backbone(run, which=which)
    assert differing(backbone_tensors(loaded.model), saved_backbone(run, which)) == []
    assert loaded.step == STEPS
    assert not loaded.model.training


def test_a_backbone_comes_from_the_checkpoint_that_is_asked_for(run: Path) -> None:
    by_step = load_backbone(run, step=MIDDLE)
    by_folder = load_backbone(run / "checkpoints" / f"step_{MIDDLE:08d}")
    expected = saved_backbone(run, "teacher", MIDDLE)
    for loaded in (by_step, by_folder):
        assert differing(backbone_tensors(loaded.model), expected) == []
        assert loaded.step == MIDDLE


def test_a_checkpoint_folder_may_be_named_from_within_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run / "checkpoints")
    assert load_backbone(f"step_{MIDDLE:08d}").step == MIDDLE


def test_an_export_reads_back_as_the_same_backbone(run: Path, tmp_path: Path) -> None:
    original = load_backbone(run)
    export_backbone(original, tmp_path / "exports" / "teacher.safetensors")
    loaded = load_backbone(tmp_path / "exports" / "teacher.safetensors")
    assert differing(backbone_tensors(loaded.model), backbone_tensors(original.model)) == []
    images = torch.linspace(-1, 1, 2 * 3 * 24 * 16).view(2, 3, 24, 16)
    with torch.no_grad():
        assert torch.equal(loaded.model(images), original.model(images))
    assert loaded.step == STEPS


def test_an_export_has_the_published_names(run: Path, tmp_path: Path) -> None:
    export_backbone(load_backbone(run), tmp_path / "teacher.safetensors")
    names = load_file(tmp_path / "teacher.safetensors").keys()
    assert {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "blocks.1.attn.qkv.weight",
        "blocks.0.ls1.gamma",
    } <= names


def test_an_untrained_backbone_is_what_a_run_starts_from(tmp_path: Path) -> None:
    images = torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)
    found: dict[str, Tensor] = {}

    def first(features: Any, config: Config, *_: Any) -> Mapping[str, float]:
        with torch.no_grad():
            found.setdefault("class token", features(images)["x_norm_clstoken"].clone())
        return {}

    overrides = {"eval__every": "1it", "eval__test": "scenes:n=2", "eval__tasks": ["first"], "train__duration": "1it"}
    config = tiny_run(tmp_path, eval__size=16, optim__warmup="0it", **overrides)
    train(config, {"first": first}, console=False)
    backbone = untrained_backbone(config)
    backbone.set_attention_backend("math")
    assert torch.equal(backbone(images), found["class token"])


def test_what_is_neither_run_nor_checkpoint_nor_export_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    for path, expected in (
        (tmp_path / "nowhere", "is no run directory, checkpoint folder or exported file"),
        (tmp_path, "is no run directory, checkpoint folder or exported file"),
        (tmp_path / "text.safetensors", "is not a readable safetensors file"),
        (tmp_path / "foreign.safetensors", "holds no backbone that is known here"),
    ):
        with pytest.raises(UserError, match=expected) as caught:
            load_backbone(path)
        assert str(path) in str(caught.value)


def test_an_export_that_lacks_a_tensor_is_refused(run: Path, tmp_path: Path) -> None:
    loaded = load_backbone(run)
    export_backbone(loaded, tmp_path / "whole.safetensors")
    held = load_file(tmp_path / "whole.safetensors")
    del held["cls_token"]
    metadata = {
        "format": "dinov2_fsdp",
        "model": json.dumps(dataclasses.asdict(loaded.config.model)),  # type: ignore[union-attr]
        "image_size": "16",
        "step": "6",
    }
    save_file(held, tmp_path / "lacking.safetensors", metadata=metadata)
    with pytest.raises(UserError, match=r"missing \(1\): cls_token"):
        load_backbone(tmp_path / "lacking.safetensors")


def test_a_checkpoint_of_another_architecture_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run", copy_function=os.link)
    text = (run / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").unlink()
    for depth, complaint in ((3, r"missing \(14\): teacher.backbone.blocks.2"), (1, r"unexpected \(14\): teacher")):
        (tmp_path / "run" / "config.yaml").write_text(text.replace("depth: 2", f"depth: {depth}"))
        with pytest.raises(UserError, match=complaint):
            load_backbone(tmp_path / "run")
