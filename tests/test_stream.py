from __future__ import annotations

import time
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from ranks import run_on_ranks
from tiny import tiny_config
from torch import Tensor
from training import metrics, tiny_run, train_alone, train_as_rank

from dinov2_fsdp.checkpoint import find_checkpoint
from dinov2_fsdp.config import Config
from dinov2_fsdp.data.batch import IMAGE_MEAN, IMAGE_STD, Microbatch, normalise
from dinov2_fsdp.data.loader import Microbatches, build_crops, build_loader
from dinov2_fsdp.data.masks import masks_for
from dinov2_fsdp.data.sources import BadImage, Source, open_source
from dinov2_fsdp.data.sources.embedded import ScenesSource
from dinov2_fsdp.data.stream import Stream, permute
from dinov2_fsdp.errors import RunFailed
from dinov2_fsdp.rng import generator

LENGTHS = [1, 2, 3, 5, 64, 1000, 4097]

# -- the order of images ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_an_epochs_order_is_a_permutation(length: int) -> None:
    for epoch in range(3):
        order = permute(np.arange(length), length, seed=7, epoch=epoch)
        assert sorted(order.tolist()) == list(range(length))


def test_a_place_has_its_image_whoever_asks() -> None:
    whole = permute(np.arange(1000), 1000, seed=1, epoch=2)
    assert permute(np.array([999, 3, 3]), 1000, seed=1, epoch=2).tolist() == whole[[999, 3, 3]].tolist()


@pytest.mark.parametrize(("length", "batch"), [(1, 4), (3, 4), (5, 5), (10, 4), (64, 8), (97, 10)])
def test_every_epoch_sees_each_image_once(length: int, batch: int) -> None:
    stream, epochs = Stream(0, length, batch), 4
    steps = -(-epochs * length // batch)
    seen = np.concatenate([stream.samples(step, 0, batch) for step in range(steps)])[: epochs * length]
    for epoch in seen.reshape(epochs, length):
        assert sorted(epoch.tolist()) == list(range(length))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {tuple(permute(np.arange(64), 64, seed, epoch)) for seed in range(3) for epoch in range(20)}
    assert len(orders) == 60


@pytest.mark.parametrize("length", [2, 3, 4, 5])
def test_every_order_of_a_few_images_is_as_likely(length: int) -> None:
    epochs = 1500
    counts = Counter(tuple(permute(np.arange(length), length, 0, epoch)) for epoch in range(epochs))
    orders = int(np.prod(range(1, length + 1)))
    expected = epochs / orders
    squares = sum((counts[order] - expected) ** 2 / expected for order in counts) + expected * (orders - len(counts))
    assert squares < orders + 6 * np.sqrt(2 * orders)  # χ² with orders − 1 degrees of freedom


def test_an_image_may_stand_anywhere() -> None:
    length, epochs = 100, 400
    places = np.stack([permute(np.arange(length), length, 3, epoch) for epoch in range(epochs)])
    counts = np.stack([np.bincount(column, minlength=length) for column in places.T])  # place × image
    expected = epochs / length
    squares = ((counts - expected) ** 2 / expected).sum()
    freedom = (length - 1) ** 2
    assert abs(squares - freedom) < 6 * np.sqrt(2 * freedom)


def test_neighbours_in_the_data_set_do_not_stay_neighbours() -> None:
    order = permute(np.arange(4097), 4097, 0, 0)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.005
    assert abs(np.corrcoef(np.arange(4097), order)[0, 1]) < 0.08


@pytest.mark.parametrize("parts", [[16], [1] * 16, [5, 11], [8, 0, 8], [4, 4, 4, 4]])
def test_any_split_of_a_step_gives_the_whole(parts: list[int]) -> None:
    stream = Stream(2, 10, 16)  # batches straddle epochs
    for step in range(5):
        starts = np.cumsum([0, *parts])[:-1]
        pieces = [stream.samples(step, int(start), count) for start, count in zip(starts, parts, strict=True)]
        assert np.concatenate(pieces).tolist() == stream.samples(step, 0, 16).tolist()


def test_a_late_step_costs_as_much_as_the_first() -> None:
    stream = Stream(0, 14_197_122, 3072)
    started = time.process_time()
    late = stream.samples(10**6, 0, 3072)
    assert time.process_time() - started < 0.5
    assert late.min() >= 0
    assert late.max() < 14_197_122
    assert len(np.unique(late)) == 3072


def test_a_replacement_is_a_function_of_its_place() -> None:
    stream = Stream(0, 1000, 8)
    drawn = [stream.replacement(step, place, attempt) for step in (0, 9) for place in (0, 7) for attempt in (0, 1)]
    again = [stream.replacement(step, place, attempt) for step in (0, 9) for place in (0, 7) for attempt in (0, 1)]
    assert drawn == again
    assert len(set(drawn)) == 8
    assert all(0 <= index < 1000 for index in drawn)


# -- the loader -------------------------------------------------------------------------------------------------------


class Holed(ScenesSource):
    """Scenes of which some cannot be read."""

    holes: frozenset[int] = frozenset({1, 4, 9})

    def image(self, index: int) -> Image.Image:
        if index in self.holes:
            raise BadImage(self.name(index), "a hole")
        return super().image(index)


class AllHoles(Holed):
    holes = frozenset(range(24))


@pytest.fixture(scope="module")
def source() -> Source:
    return open_source("scenes:n=24,size=32")


def _load(config: Config, source: Source, start: int, end: int, rank: int = 0, world: int = 1) -> list[Microbatch]:
    per_rank = config.train.batch // config.train.microbatch // world
    return list(build_loader(config, source, start, end, rank, per_rank, pin=False))


def _same(a: Microbatch, b: Microbatch) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return all(torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in pairs)


def test_workers_change_nothing(source: Source) -> None:
    alone = _load(tiny_config(), source, 0, 3)
    helped = _load(tiny_config(data__workers=2, data__prefetch=1), source, 0, 3)
    assert len(alone) == len(helped) == 6
    assert all(_same(a, b) for a, b in zip(alone, helped, strict=True))


@pytest.mark.parametrize("world", [2, 4, 8])
def test_ranks_share_the_microbatches_of_one(source: Source, world: int) -> None:
    config = tiny_config(train__batch=8, train__microbatch=1, loss__koleo=0.0)
    whole = {(batch.step, batch.index): batch for batch in _load(config, source, 2, 4)}
    shared = [batch for rank in range(world) for batch in _load(config, source, 2, 4, rank, world)]
    assert sorted((batch.step, batch.index) for batch in shared) == sorted(whole)
    assert all(_same(batch, whole[batch.step, batch.index]) for batch in shared)


def test_a_run_can_start_anywhere(source: Source) -> None:
    config = tiny_config()
    late = _load(config, source, 2, 4)
    assert all(_same(a, b) for a, b in zip(_load(config, source, 0, 4)[4:], late, strict=True))
    assert [(b.step, b.index) for b in late] == [(2, 0), (2, 1), (3, 0), (3, 1)]
    far = _load(config, source, 10**6, 10**6 + 1)
    assert [(b.step, b.index) for b in far] == [(10**6, 0), (10**6, 1)]


def test_the_size_of_microbatches_does_not_change_the_images(source: Source) -> None:
    def images(microbatch: int) -> Tensor:
        config = tiny_config(train__microbatch=microbatch)
        views = [batch.global_crops.unflatten(0, (2, -1)) for batch in _load(config, source, 1, 2)]
        return torch.cat(views, dim=1)

    assert torch.equal(images(2), images(8))


def test_crops_are_bytes_and_crop_major(source: Source) -> None:
    config = tiny_config(crops__local_number=3)
    batch = _load(config, source, 0, 1)[1]
    assert batch.global_crops.dtype == batch.local_crops.dtype == torch.uint8
    assert batch.global_crops.shape == (2 * 4, 3, 16, 16)
    assert batch.local_crops.shape == (3 * 4, 3, 8, 8)
    for i, sample in enumerate(batch.samples.tolist()):
        large, small = build_crops(config)(source.image(sample), generator(config.seed, "augment", 0, 4 + i))
        for crop in range(2):
            assert np.array_equal(batch.global_crops[crop * 4 + i].permute(1, 2, 0).numpy(), large[crop])
        for crop in range(3):
            assert np.array_equal(batch.local_crops[crop * 4 + i].permute(1, 2, 0).numpy(), small[crop])


def test_images_are_those_of_the_stream(source: Source) -> None:
    config = tiny_config(seed=5)
    loaded = torch.cat([batch.samples for batch in _load(config, source, 3, 4)])
    assert loaded.tolist() == Stream(5, 24, 8).samples(3, 0, 8).tolist()


def test_without_local_crops_there_are_none(source: Source) -> None:
    batch = _load(tiny_config(crops__local_number=0), source, 0, 1)[0]
    assert batch.local_crops.shape[0] == 0
    assert batch.images == 4


def test_masks_are_those_of_the_place_in_the_global_batch(source: Source) -> None:
    config = tiny_config()
    batch = _load(config, source, 5, 6)[1]
    expected = masks_for(config.seed, 5, range(4, 8), 8, (4, 4), 0.5, (0.1, 0.5))
    assert torch.equal(batch.masks, torch.from_numpy(expected).reshape(8, 16))


def test_masked_patches_and_their_weights_describe_the_masks(source: Source) -> None:
    for batch in _load(tiny_config(), source, 0, 3):
        assert torch.equal(batch.masked_patches, batch.masks.flatten().nonzero().flatten())
        per_crop = torch.zeros(8).index_add_(0, batch.masked_patches // 16, batch.mask_weights)
        assert torch.allclose(per_crop, batch.masks.any(dim=1).float())
        assert batch.mask_weights.dtype == torch.float32
        for patch, weight in zip(batch.masked_patches.tolist(), batch.mask_weights.tolist(), strict=True):
            assert weight == pytest.approx(1 / batch.masks[patch // 16].sum().item())


def test_without_ibot_nothing_is_masked(source: Source) -> None:
    batch = _load(tiny_config(loss__ibot=0.0), source, 0, 1)[0]
    assert not batch.masks.any()
    assert len(batch.masked_patches) == len(batch.mask_weights) == 0


def test_bad_images_are_replaced_alike_everywhere_and_reported() -> None:
    config, holed = tiny_config(train__microbatch=2), Holed("scenes:n=24,size=32")
    alone = _load(config, holed, 0, 3)
    ranks = [batch for rank in range(2) for batch in _load(config, holed, 0, 3, rank, 2)]
    by_place = {(batch.step, batch.index): batch for batch in ranks}
    assert all(_same(batch, by_place[batch.step, batch.index]) for batch in alone)

    planned = Stream(config.seed, 24, 8)
    reported = [name for batch in alone for name, _ in batch.bad]
    in_first_epoch = [holed.name(i) for step in range(3) for i in planned.samples(step, 0, 8) if i in Holed.holes]
    assert set(in_first_epoch) == {holed.name(i) for i in Holed.holes}
    assert set(in_first_epoch) <= set(reported)
    assert {reason for batch in alone for _, reason in batch.bad} == {"a hole"}
    assert not Holed.holes & {int(i) for batch in alone for i in batch.samples}


def test_a_bad_image_leaves_its_neighbours_alone(source: Source) -> None:
    config = tiny_config()
    for good, holed in zip(_load(config, source, 0, 3), _load(config, Holed("scenes:n=24,size=32"), 0, 3), strict=True):
        untouched = [i for i, sample in enumerate(good.samples.tolist()) if sample not in Holed.holes]
        assert torch.equal(good.samples[untouched], holed.samples[untouched])
        assert torch.equal(good.global_crops[untouched], holed.global_crops[untouched])
        assert torch.equal(good.masks, holed.masks)


def test_a_data_set_without_a_readable_image_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"20 images in a row cannot be read \(step 1\).*The last: .*scenes"):
        Microbatches(tiny_config(), AllHoles("scenes:n=24,size=32"))[0, 0]


def test_a_folder_with_a_broken_file_trains_on_the_others(tmp_path: Path) -> None:
    for value in range(5):
        Image.new("RGB", (20, 20), (value, 0, 0)).save(tmp_path / f"{value}.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n truncated")
    batches = _load(tiny_config(), open_source(f"folder:{tmp_path}", tmp_path / "cache"), 0, 2)
    assert any("broken.png" in name for batch in batches for name, _ in batch.bad)


# -- whole runs -------------------------------------------------------------------------------------------------------

BROKEN = 6


@pytest.fixture
def holes(tmp_path: Path) -> dict[str, str]:
    """Settings of a run over 24 images, six of which cannot be read; an epoch is three steps."""
    (tmp_path / "images").mkdir()
    for value in range(24):
        path = tmp_path / "images" / f"{value:02d}.png"
        Image.new("RGB", (20, 20), (10 * value, 0, 0)).save(path)
        if value < BROKEN:
            path.write_bytes(b"no image")
    return {"data__train": f"folder:{tmp_path / 'images'}", "data__cache": str(tmp_path / "cache"), "log__every": "1it"}


def test_a_run_counts_and_names_its_bad_images_over_its_lives(
    tmp_path: Path, holes: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    train_alone(tiny_run(tmp_path / "run", train__duration="3it", **holes))
    for value in range(BROKEN):
        assert any(f"{value:02d}.png" in message and "replaced" in message for message in caplog.messages)
    assert metrics(tmp_path / "run")[-1]["bad_images"] == BROKEN
    caplog.clear()
    train_alone(tiny_run(tmp_path / "run", train__duration="4it", **holes))
    assert metrics(tmp_path / "run")[-1]["bad_images"] == BROKEN, "as many, though this life saw but a step"
    assert not any("replaced" in message for message in caplog.messages), "each is named once"


def test_more_bad_images_than_are_borne_end_a_run(tmp_path: Path, holes: dict[str, str]) -> None:
    train_alone(tiny_run(tmp_path / "enough", train__duration="3it", data__max_bad_images=BROKEN, **holes))
    with pytest.raises(RunFailed, match=r"6 images of folder:.* more than data.max_bad_images=5 .*\d\d\.png"):
        train_alone(tiny_run(tmp_path / "run", train__duration="3it", data__max_bad_images=BROKEN - 1, **holes))


@pytest.mark.distributed
def test_every_rank_counts_the_bad_images_of_all(tmp_path: Path, holes: dict[str, str]) -> None:
    config = tiny_run(tmp_path / "run", train__duration="3it", **holes)
    run_on_ranks(train_as_rank, 2, config)
    found = find_checkpoint(tmp_path / "run").state()["bad_images"]
    assert [Path(name).name for name in sorted(found)] == [f"{value:02d}.png" for value in range(BROKEN)]
    source = open_source(config.data.train, config.data.cache)
    of_rank_1 = [name for batch in _load(config, source, 0, 3, 1, 2) for name, _ in batch.bad]
    assert 0 < len(of_rank_1) < BROKEN, "what rank 0 saved, it did not see alone"


# -- the microbatch ---------------------------------------------------------------------------------------------------


def test_normalisation_takes_out_imagenets_mean_and_deviation() -> None:
    images = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 2, 2) * 10
    mean = torch.tensor(IMAGE_MEAN, dtype=torch.float64)[:, None, None]
    std = torch.tensor(IMAGE_STD, dtype=torch.float64)[:, None, None]
    torch.testing.assert_close(normalise(images).double(), (images.double() / 255 - mean) / std, rtol=1e-5, atol=1e-6)


def test_a_moved_microbatch_is_the_same(source: Source) -> None:
    batch = _load(tiny_config(), source, 0, 1)[0]
    assert _same(batch.to(torch.device("cpu")), batch)
    assert batch.to(torch.device("meta")).masked_patches.device.type == "meta"
