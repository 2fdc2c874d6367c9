from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from evaluation import CPU, TableFeatures, TableSource, blobs
from ranks import run_on_ranks
from sklearn.linear_model import LogisticRegression

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.parallel.world import World
from eval import logistic
from eval.logistic import Settings, check, fit, path, regress

ALONE = World(0, 1, 0, CPU)
SMALL = Settings(resize=20, size=8, batch=16, c_powers=(-4.0, 2.0), c_values=4, held_out=0.2)


@pytest.mark.parametrize("c", [1e-6, 1e-2, 1.0, 1e5])
def test_the_fit_is_that_of_scikit_learn_to_four_digits(c: float) -> None:
    rows, labels = blobs(200, 1)
    ours = fit(rows.double(), labels, 4, c)
    theirs = LogisticRegression(C=c, tol=1e-12, max_iter=20_000, solver="newton-cg").fit(
        rows.double().numpy(), labels.numpy()
    )
    assert np.abs(ours.weight.numpy() - theirs.coef_).max() < 1e-4 * max(1, np.abs(theirs.coef_).max())
    assert np.abs(ours.bias.numpy() - theirs.intercept_).max() < 1e-4
    probabilities = torch.softmax(rows.double() @ ours.weight.T + ours.bias, dim=1).numpy()
    assert np.abs(probabilities - theirs.predict_proba(rows.double().numpy())).max() < 1e-4


def test_the_gradient_vanishes_where_the_fit_ends() -> None:
    rows, labels = blobs(200, 1)
    rows = rows.double()
    found = fit(rows, labels, 4, 0.3)
    weight, bias = found.weight.clone().requires_grad_(), found.bias.clone().requires_grad_()
    loss = 0.3 * torch.nn.functional.cross_entropy(rows @ weight.T + bias, labels, reduction="sum")
    (loss + weight.square().sum() / 2).backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert max(float(weight.grad.abs().max()), float(bias.grad.abs().max())) < 1e-6


def test_the_path_has_the_published_45_values_and_ends_where_single_fits_end() -> None:
    rows, labels = blobs(80, 1, noise=2.5)
    found = path(rows.double(), labels, 4, replace(Settings(), max_iterations=300))
    assert len(found) == 45
    assert (found[0][0], found[-1][0]) == (pytest.approx(1e-6), pytest.approx(1e5))
    assert found[22][0] == pytest.approx(10**-0.5)
    alone = fit(rows.double(), labels, 4, found[22][0])
    torch.testing.assert_close(found[22][1].weight, alone.weight, rtol=0, atol=1e-6)


def test_a_path_that_was_interrupted_goes_on_from_the_last_value_of_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, found = task()
    fitted: list[float] = []

    def stopping(*positional: Any, **named: Any) -> Any:
        if len(fitted) == 2:
            fitted.append(0.0)
            raise InterruptedError
        fitted.append(positional[3])
        return fit(*positional, **named)

    monkeypatch.setattr(logistic, "fit", stopping)
    with pytest.raises(InterruptedError):
        task(partial=tmp_path)
    fitted[:] = [0.0] * 3
    again, found_again = task(partial=tmp_path)
    assert fitted[3:] == pytest.approx([1.0, 100.0, found["c"]])
    assert again == whole
    assert found_again["path"] == found["path"]
    fitted[:] = [0.0] * 3
    task(settings=replace(SMALL, max_iterations=5), partial=tmp_path)
    assert len(fitted) == 3 + 5, "classifiers of other settings were gone on from"


def task(world: World = ALONE, settings: Settings = SMALL, **more: Any) -> tuple[dict[str, float], dict[str, Any]]:
    rows, labels = blobs(300, 1, noise=1.8)
    train: Any = TableSource(labels[:200].tolist(), spec="train")
    test: Any = TableSource(labels[200:].tolist(), first=200, spec="test")
    return regress(TableFeatures(rows[:, None]), train, test, settings, world, progress=False, **more)


def test_c_is_chosen_on_held_out_images_and_the_last_fit_sees_all_training_images() -> None:
    metrics, more = task()
    rows, labels = blobs(300, 1, noise=1.8)
    theirs = LogisticRegression(C=more["c"], tol=1e-12, max_iter=20_000).fit(rows[:200], labels[:200])
    assert metrics["top1"] == pytest.approx(100 * theirs.score(rows[200:], labels[200:]))
    best = max(more["path"], key=lambda entry: entry["held_out"])
    assert more["c"] == best["c"]
    assert metrics["top1_held_out"] == pytest.approx(best["held_out"], abs=1e-3)
    assert more["data"] == {"train_images": 200, "held_out_images": 40, "test_images": 100}
    assert len({entry["held_out"] for entry in more["path"]}) > 1


def _on_a_rank() -> Any:
    return task(World(dist.get_rank(), dist.get_world_size(), 0, CPU))


@pytest.mark.distributed
def test_ranks_with_uneven_shares_find_what_one_finds() -> None:
    alone, found = task()
    for metrics, more in run_on_ranks(_on_a_rank, 3):
        assert metrics == pytest.approx(alone)
        assert (more["c"], more["data"]) == (found["c"], found["data"])


def test_one_class_is_no_task() -> None:
    one: Any = TableSource([0] * 30, classes=["only"])
    with pytest.raises(UserError, match="only 1 class"):
        check(one, one, SMALL)


def test_classes_that_differ_are_named() -> None:
    first: Any = TableSource([0, 1] * 20, spec="first")
    second: Any = TableSource([0, 1, 2] * 20, spec="second")
    with pytest.raises(UserError, match=r"(?s)'first' and 'second' differ.*only in the second: class 2"):
        check(first, second, SMALL)
