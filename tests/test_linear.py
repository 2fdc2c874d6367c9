from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation import CPU, TableFeatures, TableSource, blobs
from ranks import run_on_ranks
from torch import nn

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from eval import linear
from eval.classes import classes_in, real_labels
from eval.heads import LinearHeads
from eval.linear import PUBLISHED_RATES, Settings, hold_out, inputs_of, probe

ALONE = World(0, 1, 0, CPU)
SMALL = Settings(
    resize=20, size=8, batch=16, rates=(1e-4, 1e-2, 1.0), blocks=(1, 2), train_batch=32, epochs=3, epoch_length=10,
    augment=False, held_out=0.2,
)  # fmt: skip


def reference_head(
    rows: torch.Tensor, labels: torch.Tensor, start: tuple[Any, Any], rate: float, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weight and bias after full-batch steps of torch's own SGD and cosine, in float64."""
    head = nn.Linear(rows.shape[1], int(labels.max()) + 1, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(start[0].T)
        head.bias.copy_(start[1])
    optimizer = torch.optim.SGD(head.parameters(), rate, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(head(rows.double()), labels).backward()
        optimizer.step()
        schedule.step()
    return head.weight.T.detach(), head.bias.detach()


def test_all_heads_follow_sgd_with_momentum_and_cosine() -> None:
    rows, labels = blobs(60, 1)
    heads = LinearHeads({"a": (0, 5), "b": (3, 12)}, [0.01, 0.5, 2.0], 4, steps=25, dtype=torch.float64)
    starts = [(weight.clone(), bias.clone()) for _, weight, bias in heads.each()]
    for _ in range(25):
        heads.train_step(rows, labels)
    for (head, weight, bias), start in zip(heads.each(), starts, strict=True):
        first, end = heads.inputs[head.input]
        expected = reference_head(rows[:, first:end], labels, start, head.rate, 25)
        torch.testing.assert_close(weight, expected[0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(bias, expected[1], rtol=1e-9, atol=1e-11)


def test_heads_start_as_published() -> None:
    heads = LinearHeads({"a": (0, 400)}, [0.1, 0.2], 50, steps=1)
    weights = [weight for _, weight, _ in heads.each()]
    assert abs(float(weights[0].std()) - 0.01) < 2e-4
    assert not torch.equal(weights[0], weights[1])
    assert all(float(bias.abs().max()) == 0 for _, _, bias in heads.each())


def test_inputs_are_the_published_ones() -> None:
    rows = torch.arange(5 * 3).float()[None]  # four class tokens and the mean patch, three numbers each
    found = {name: rows[0, first:end].tolist() for name, (first, end) in inputs_of((1, 4), 3).items()}
    assert found["1 blocks, cls"] == [9, 10, 11]
    assert found["1 blocks, cls+mean"] == [9, 10, 11, 12, 13, 14]
    assert found["4 blocks, cls"] == list(range(12))
    assert found["4 blocks, cls+mean"] == list(range(15))
    assert len(PUBLISHED_RATES) == 13


def test_the_split_holds_out_the_same_share_of_each_class() -> None:
    labels = np.repeat(np.arange(5), 40)
    indices = np.arange(0, 200, 2)
    held = hold_out(indices, labels, 0.1, seed=0)
    assert np.bincount(labels[indices[held]]).tolist() == [2] * 5
    assert np.array_equal(held, hold_out(indices, labels, 0.1, seed=0))
    assert not np.array_equal(held, hold_out(indices, labels, 0.1, seed=1))


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_a_split_that_leaves_nothing_is_refused(share: float) -> None:
    with pytest.raises(UserError, match="leaves one side without images"):
        hold_out(np.arange(50), np.zeros(50, np.int64), share, 0)


def task(settings: Settings = SMALL, world: World = ALONE, **more: Any) -> tuple[dict[str, float], dict[str, Any]]:
    """Probe a table whose class tokens tell the class in the last block and nothing in the one before."""
    rows, labels = blobs(300, 1, noise=1.2)
    noise = torch.randn(300, 12, generator=torch.Generator().manual_seed(0))
    features = TableFeatures(torch.stack([noise, rows], dim=1)[:, -max(settings.blocks) :], mean=noise)
    train: Any = TableSource(labels[:200].tolist(), spec="train")
    test: Any = TableSource(labels[200:].tolist(), first=200, spec="test", broken=more.pop("broken", ()))
    return probe(features, train, test, more.pop("also", ()), settings, world, progress=False, **more)


def test_the_head_is_chosen_on_held_out_images_and_both_choices_are_reported() -> None:
    metrics, found = task()
    listing = found["heads"]
    assert len(listing) == 2 * 2 * 3
    assert found["data"] == {"held_out_images": 40, "test_images": 100}
    best = max(range(12), key=lambda n: (listing[n]["held_out"], -n))
    assert found["head"] == listing[best]
    assert metrics["top1"] == pytest.approx(listing[best]["test"], abs=1e-3)
    assert metrics["top1_chosen_on_test"] == pytest.approx(max(entry["test"] for entry in listing), abs=1e-3)
    assert metrics["top1"] > 50
    assert min(entry["test"] for entry in listing) < metrics["top1"] - 10


def test_a_probe_agrees_with_torch_trained_on_the_same_images() -> None:
    settings = replace(SMALL, rates=(1e-1,), blocks=(1,), train_batch=160, epochs=20, epoch_length=1)
    _, found = task(settings)
    rows, labels = blobs(300, 1, noise=1.2)
    held = hold_out(np.arange(200), labels[:200].numpy(), 0.2, 0)
    kept = torch.from_numpy(np.flatnonzero(~held))
    heads = LinearHeads({"1 blocks, cls": (0, 12), "1 blocks, cls+mean": (0, 24)}, [0.0625], 4, 20)
    _, weight, bias = next(heads.each())
    # One step is one pass over all 160 kept images, so their order does not matter.
    weight, bias = reference_head(rows[:200][kept], labels[:200][kept], (weight, bias), 0.0625, 20)
    predicted = (rows[200:].double() @ weight + bias).argmax(dim=1)
    assert found["heads"][0]["test"] == pytest.approx(100 * float((predicted == labels[200:]).double().mean()))


def test_random_crops_train_as_well_as_kept_features_where_crops_do_not_matter() -> None:
    kept, _ = task()
    cropped, _ = task(replace(SMALL, augment=True))
    assert abs(cropped["top1"] - kept["top1"]) <= 6


def test_unreadable_test_images_count_neither_right_nor_wrong() -> None:
    with pytest.warns(UserWarning, match="test:3: truncated"):
        _, found = task(broken=(3, 50))
    assert found["data"]["test_images"] == 98


def test_another_test_set_may_hold_some_of_the_classes() -> None:
    some: Any = TableSource([0, 0, 1], first=200, classes=["class 3", "class 1"], spec="some")
    metrics, found = task(also=[("some", some)])
    assert found["data"]["some_images"] == 3
    assert classes_in(TableSource([0, 1, 2, 3]), some).tolist() == [3, 1]  # type: ignore[arg-type]
    # Restricted to two classes, chance is one half; the rows are of the classes 0, 1 and 2.
    assert metrics["some/top1"] in (0, pytest.approx(100 / 3), pytest.approx(200 / 3), 100)


def test_folders_named_by_numbers_are_classes_by_their_number() -> None:
    train: Any = TableSource(range(12), classes=[f"n{n:08d}" for n in range(12)])
    numbered: Any = TableSource(range(12), classes=sorted(map(str, range(12))))
    assert classes_in(train, numbered).tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]


def test_unknown_classes_of_another_test_set_are_named() -> None:
    other: Any = TableSource([0, 1], classes=["class 1", "zebra"], spec="other")
    with pytest.raises(UserError, match=r"'other' has classes that 'table' has not: zebra"):
        classes_in(TableSource([0, 1, 2]), other)  # type: ignore[arg-type]


def test_imagenet_real_counts_any_of_several_labels_and_skips_images_without(tmp_path: Path) -> None:
    file = tmp_path / "real.json"
    file.write_text(json.dumps([[0, 1, 2, 3], [], [9]] + [[0, 1, 2, 3]] * 97))

    class Validation(TableSource):
        def name(self, index: int) -> str:
            return f"val/n01440764/ILSVRC2012_val_{index + 1:08d}.JPEG"

    test: Any = Validation([0] * 100, first=200)
    sets = real_labels(file, test, 10)
    assert [entry.tolist() for entry in sets[:3]] == [[0, 1, 2, 3], [], [9]]
    with pytest.raises(UserError, match="classes beyond the 4"):
        real_labels(file, test, 4)
    with pytest.raises(UserError, match="table:0 is not"):
        real_labels(file, TableSource([0] * 100), 10)  # type: ignore[arg-type]


def test_a_probe_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, augment=True)
    whole, found = task(settings)
    taken: list[int] = []
    original = LinearHeads.train_step

    def stopping(self: LinearHeads, rows: torch.Tensor, labels: torch.Tensor) -> None:
        if len(taken) == 17 and not any(tmp_path.glob("stopped")):
            (tmp_path / "stopped").touch()
            raise InterruptedError
        taken.append(self.step)
        original(self, rows, labels)

    monkeypatch.setattr(LinearHeads, "train_step", stopping)
    with pytest.raises(InterruptedError):
        task(settings, partial=tmp_path)
    taken.clear()
    again, found_again = task(settings, partial=tmp_path)
    assert taken == list(range(10, 30))
    assert again == whole
    assert found_again["heads"] == found["heads"]


def test_heads_of_other_settings_are_not_gone_on_from(tmp_path: Path) -> None:
    heads = LinearHeads({"a": (0, 4)}, [0.1], 3, steps=9)
    heads.step = 5
    heads.save(tmp_path, "one")
    assert LinearHeads({"a": (0, 4)}, [0.1], 3, steps=9).load(tmp_path, "one")
    assert not LinearHeads({"a": (0, 4)}, [0.1], 3, steps=9).load(tmp_path, "two")


def test_heads_of_other_images_are_not_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, augment=False)
    task(settings, partial=tmp_path)
    steps: list[int] = []
    original = LinearHeads.train_step
    monkeypatch.setattr(LinearHeads, "train_step", lambda self, *rest: (steps.append(1), original(self, *rest))[1])
    task(settings, partial=tmp_path)
    assert not steps
    monkeypatch.setattr(TableSource, "__init__", _renamed(TableSource.__init__))
    task(settings, partial=tmp_path)
    assert steps


def _renamed(original: Any) -> Any:
    def renamed(self: TableSource, *positional: Any, spec: str, **named: Any) -> None:
        original(self, *positional, spec=f"other {spec}", **named)

    return renamed


def _on_a_rank(augment: bool) -> Any:
    import torch.distributed as dist

    world = World(dist.get_rank(), dist.get_world_size(), 0, CPU)
    return task(replace(SMALL, augment=augment, train_batch=31), world, broken=(3,))


@pytest.mark.distributed
@pytest.mark.parametrize("augment", [False, True])
def test_ranks_share_images_and_heads_and_find_what_one_finds(augment: bool) -> None:
    with pytest.warns(UserWarning, match="truncated"):
        alone, found = task(replace(SMALL, augment=augment, train_batch=31), broken=(3,))
    for metrics, more in run_on_ranks(_on_a_rank, 2, augment):
        assert metrics == pytest.approx(alone, abs=1e-6)
        assert more == found


def test_features_that_are_not_finite_are_refused() -> None:
    features = TableFeatures(torch.full((300, 2, 12), torch.nan))
    train: Any = TableSource([0, 1] * 50)
    with pytest.raises(UserError, match="not finite"):
        probe(features, train, train, (), SMALL, ALONE, progress=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--also", "v2"), "not of the form NAME=SPEC"),
        (("--also", "real=real:nowhere.json"), "nowhere.json does not exist"),
        (("--rates", "0"), "--rates 0.0 is impossible"),
        (("--test", "scenes:n=20,size=16,split=nowhere"), "split=nowhere"),
    ],
)
def test_mistakes_are_named_before_any_image_is_read(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval import command

    monkeypatch.setattr(linear, "probe", lambda *_, **__: pytest.fail("images were read"))
    monkeypatch.setattr(command, "_load", lambda *_: command.Subject("pixels", None, 0, None, None, None, ALONE))
    data = ("--train", "scenes:n=60,size=16", "--test", "scenes:n=20,size=16,split=test")
    arguments = linear._parser().parse_args(["--weights", "x", *data, "--size", "16", "--resize", "16", *words])
    with pytest.raises(UserError, match=message):
        linear.run(arguments)
