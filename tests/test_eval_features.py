from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from evaluation import CPU, TableFeatures, TableSource, blobs
from ranks import run_on_ranks
from tiny import tiny_backbone, tiny_images

from dinov2_fsdp.errors import UserError
from eval import rows as rows_module
from eval.features import BLOCKS, class_token, class_tokens_and_mean, extract, frozen, gather_rows, in_order, patch_grid


def reference_blocks(model: Any, images: torch.Tensor) -> list[torch.Tensor]:
    """Return the normalised tokens (B, tokens, D) after every block, one block after the other."""
    layout = model.layout([(len(images), *images.shape[2:])])
    tokens = model.embed(images).flatten(0, 1)
    found = []
    for block in model.blocks:
        tokens = block(tokens, layout)
        found.append(model.norm(tokens).unflatten(0, (len(images), -1)))
    return found


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_asked_for_blocks_are_the_normalised_outputs_of_those_blocks(registers: int) -> None:
    model = tiny_backbone(depth=5, registers=registers).eval()
    images = tiny_images(3, 16, 24)
    expected = reference_blocks(model, images)
    outputs = frozen(model, 16, CPU, blocks=(0, -2, -1))(images)
    for found, number in zip(outputs[BLOCKS], (0, 3, 4), strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(found, expected[number])
    torch.testing.assert_close(outputs["x_norm_clstoken"], expected[-1][:, 0])
    assert not model.blocks[0]._forward_hooks


@torch.no_grad()
def test_the_last_block_alone_is_the_plain_forward() -> None:
    model = tiny_backbone(depth=3).eval()
    images = tiny_images(2)
    assert BLOCKS not in frozen(model, 16, CPU, blocks=(-1,))(images)


@torch.no_grad()
def test_a_row_holds_the_class_tokens_from_low_to_high_and_the_last_mean_patch() -> None:
    model = tiny_backbone(depth=5, registers=4).eval()
    images = tiny_images(2)
    expected = reference_blocks(model, images)
    row = class_tokens_and_mean(frozen(model, 16, CPU, blocks=range(-4, 0))(images))
    parts = [*(block[:, 0] for block in expected[1:]), expected[-1][:, 5:].mean(dim=1)]
    torch.testing.assert_close(row, torch.cat(parts, dim=1))


@torch.no_grad()
def test_a_patch_grid_has_the_rows_and_columns_of_the_image() -> None:
    model = tiny_backbone(depth=2, registers=4).eval()
    images = tiny_images(2, 16, 24)
    expected = reference_blocks(model, images)
    grid = patch_grid(frozen(model, 16, CPU, blocks=(0, 1))(images), 4, 6)
    assert grid.shape == (2, 48, 4, 6)
    torch.testing.assert_close(grid[1, :24, 2, 3], expected[0][1, 5 + 2 * 6 + 3])
    torch.testing.assert_close(grid[1, 24:, 2, 3], expected[1][1, 5 + 2 * 6 + 3])


def test_blocks_that_a_backbone_has_not_are_named() -> None:
    with pytest.raises(UserError, match=r"blocks \[-4\] are wanted, but this backbone has 2"):
        frozen(tiny_backbone(depth=2), 16, CPU, blocks=(-4,))


def test_a_low_precision_forward_is_near_the_exact_one_and_not_it() -> None:
    model = tiny_backbone(depth=2).eval()
    with torch.no_grad():
        exact = frozen(model, 16, CPU)(tiny_images(4))["x_norm_clstoken"]
        rough = frozen(model, 16, CPU, precision="bf16")(tiny_images(4))["x_norm_clstoken"].float()
    assert 0 < float((exact - rough).abs().max()) < 0.3


# ---------------------------------------------------------------------------------------------------------------------
# An extraction that is interrupted.


class Interrupted(Exception):
    pass


def look(features: Any, source: Any, partial: Path | None = None, key: Any = None, **more: Any) -> Any:
    return extract(features, source, resize=20, size=8, batch=4, device=CPU, partial=partial, key=key, **more)


def stopping_after(features: TableFeatures, calls: int) -> Any:
    def forward(images: torch.Tensor) -> dict[str, Any]:
        if len(features.calls) == calls:
            raise Interrupted
        return features(images)

    return forward


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save after every batch."""
    monkeypatch.setattr(rows_module, "_SECONDS_BETWEEN_SAVES", -1.0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.filterwarnings("ignore:left out")
def test_an_interrupted_extraction_goes_on_from_the_batches_that_were_done(tmp_path: Path) -> None:
    rows, labels = blobs(30, 0)
    source: Any = TableSource(labels.tolist(), broken=(2, 25))
    whole = look(TableFeatures(rows[:, None]), source)
    with pytest.raises(Interrupted):
        look(stopping_after(TableFeatures(rows[:, None]), 5), source, tmp_path)
    features = TableFeatures(rows[:, None])
    again = look(features, source, tmp_path)
    assert features.calls == [4, 4, 2]
    assert torch.equal(again.features, whole.features)
    assert torch.equal(again.indices, whole.indices)
    assert again.bad == ["table:2: cannot be read", "table:25: truncated"]


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("change", [{"key": {"step": 2}}, {"max_images": 29}, {"pick": lambda outputs: outputs["x"]}])
def test_rows_of_something_else_are_not_gone_on_from(tmp_path: Path, change: dict[str, Any]) -> None:
    rows, labels = blobs(30, 0)
    source: Any = TableSource(labels.tolist())
    look(TableFeatures(rows[:, None]), source, tmp_path, key={"step": 1})
    features = TableFeatures(rows[:, None])
    if "pick" in change:
        change = {"key": {"step": 1, "picked": "mean"}}
    look(features, source, tmp_path, **{"key": {"step": 1}, **change})
    assert sum(features.calls) >= 29


def test_rows_that_are_torn_are_made_anew(tmp_path: Path) -> None:
    rows, labels = blobs(30, 0)
    source: Any = TableSource(labels.tolist())
    look(TableFeatures(rows[:, None]), source, tmp_path)
    (tmp_path / "rank_0_of_1.state").write_bytes(b"\1\1")
    features = TableFeatures(rows[:, None])
    assert torch.equal(look(features, source, tmp_path).features, rows)
    assert sum(features.calls) == 30


def _interrupted_on_a_rank(folder: str) -> Any:
    rank, size = dist.get_rank(), dist.get_world_size()
    rows_module._SECONDS_BETWEEN_SAVES = -1.0
    rows, labels = blobs(30, 0)
    source: Any = TableSource(labels.tolist())
    share = {"rank": rank, "world_size": size}
    with contextlib.suppress(Interrupted):  # rank 0 gets farther than rank 1
        look(stopping_after(TableFeatures(rows[:, None]), 3 - rank), source, Path(folder), **share)
    features = TableFeatures(rows[:, None])
    found = look(features, source, Path(folder), **share)
    whole = in_order(found, size, CPU)
    return features.calls, whole.indices, whole.features


@pytest.mark.distributed
def test_ranks_go_on_from_the_same_batch_and_together_hold_every_image_once(tmp_path: Path) -> None:
    rows, _ = blobs(30, 0)
    for calls, indices, features in run_on_ranks(_interrupted_on_a_rank, 2, str(tmp_path)):
        assert calls == [4, 3]
        assert indices.tolist() == list(range(30))
        assert torch.equal(features, rows)


def _gathered() -> Any:
    warnings.simplefilter("error", FutureWarning)  # as of names that go; each rank would print it
    rank = dist.get_rank()
    return gather_rows(torch.arange(3 * rank, 3 * rank + rank).float()[:, None], dist.get_world_size(), CPU)


@pytest.mark.distributed
def test_rows_of_ranks_with_different_numbers_are_gathered_rank_after_rank() -> None:
    for found in run_on_ranks(_gathered, 3):
        assert found[:, 0].tolist() == [3, 6, 7]


def test_what_is_picked_may_have_any_shape() -> None:
    rows, labels = blobs(6, 0)
    source: Any = TableSource(labels.tolist())
    found = look(TableFeatures(rows[:, None]), source, pick=lambda outputs: outputs["x_norm_patchtokens"])
    assert found.features.shape == (6, 4, 12)
    assert torch.equal(look(TableFeatures(rows[:, None]), source, pick=class_token).features, found.features[:, 0])
