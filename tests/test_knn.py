from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from dinov2_fsdp.config import Config, from_dict
from dinov2_fsdp.data.batch import IMAGE_MEAN, IMAGE_STD
from dinov2_fsdp.data.sources import BadImage, open_source
from dinov2_fsdp.errors import UserError
from eval import knn
from eval.features import Extracted, class_token, extract, pixel_features, prepare, subset
from eval.neighbours import knn_accuracy

CPU = torch.device("cpu")
KS = (1, 10, 20, 100)


def blobs(count: int, seed: int, classes: int = 7, dim: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Return overlapping clusters, so that neighbours disagree and the number of votes matters."""
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(classes, size=count)
    rows = centres[labels] + 2.5 * rng.normal(size=(count, dim))
    return torch.tensor(rows, dtype=torch.float32), torch.tensor(labels)


def reference(bank: Any, bank_labels: Any, queries: Any, labels: Any, k: int, temperature: float) -> float:
    """Return k-NN accuracy in float64, one query at a time, straight from arXiv 1805.01978, section 3.4."""
    bank = bank.double().numpy() / np.linalg.norm(bank.double().numpy(), axis=1, keepdims=True)
    right = 0
    for query, truth in zip(queries.double().numpy(), labels.tolist(), strict=True):
        similarity = bank @ (query / np.linalg.norm(query))
        votes: dict[int, float] = {}
        for place in np.argsort(-similarity, kind="stable")[:k]:
            votes[int(bank_labels[place])] = votes.get(int(bank_labels[place]), 0) + np.exp(
                similarity[place] / temperature
            )
        right += max(sorted(votes), key=lambda label: votes[label]) == truth
    return 100 * right / len(labels)


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_the_weighted_vote_is_that_of_the_paper(temperature: float) -> None:
    bank, queries = blobs(300, 1), blobs(90, 2)
    accuracy = knn_accuracy(*bank, *queries, KS, temperature, chunk=64)
    assert accuracy == pytest.approx({k: reference(*bank, *queries, k, temperature) for k in KS})
    assert len(set(accuracy.values())) > 1


def test_one_neighbour_agrees_with_scikit_learn() -> None:
    (bank, bank_labels), (queries, labels) = blobs(300, 3), blobs(120, 4)
    theirs = KNeighborsClassifier(1, metric="cosine").fit(bank.numpy(), bank_labels.numpy())
    expected = 100 * theirs.score(queries.numpy(), labels.numpy())
    assert knn_accuracy(bank, bank_labels, queries, labels, (1,))[1] == pytest.approx(expected)


def test_a_high_temperature_makes_all_votes_equal() -> None:
    (bank, bank_labels), (queries, labels) = blobs(300, 3), blobs(120, 4)
    theirs = KNeighborsClassifier(10, metric="cosine").fit(bank.numpy(), bank_labels.numpy())
    expected = 100 * theirs.score(queries.numpy(), labels.numpy())
    # Ties between classes, which equal votes bring, fall to either side.
    assert knn_accuracy(bank, bank_labels, queries, labels, (10,), 1e6)[10] == pytest.approx(expected, abs=6)


@pytest.mark.parametrize("chunk", [1, 37, 299, 300, 4096])
def test_the_size_of_a_chunk_changes_nothing(chunk: int) -> None:
    bank, queries = blobs(300, 1), blobs(90, 2)
    assert knn_accuracy(*bank, *queries, KS, chunk=chunk) == knn_accuracy(*bank, *queries, KS)


def test_more_queries_than_fit_at_once_are_all_counted() -> None:
    bank, queries = blobs(40, 1), blobs(1030, 2)
    accuracy = knn_accuracy(*bank, *queries, (5,))[5]
    assert accuracy == pytest.approx(reference(*bank, *queries, 5, 0.07))


def test_of_equal_images_the_one_with_the_smaller_index_is_nearer() -> None:
    bank = torch.ones(6, 4)
    labels = torch.tensor([3, 0, 1, 2, 0, 1])
    for chunk in (1, 2, 6):
        assert knn_accuracy(bank, labels, torch.ones(1, 4), torch.tensor([3]), (1,), chunk=chunk) == {1: 100.0}
        shuffled = torch.tensor([5, 3, 0, 1, 4, 2])
        found = knn_accuracy(
            bank, labels[shuffled], torch.ones(1, 4), torch.tensor([3]), (1,), chunk=chunk, bank_indices=shuffled
        )
        assert found == {1: 100.0}


def test_opposite_images_are_the_farthest() -> None:
    bank, labels = torch.tensor([[-1.0, 0.0], [-0.1, 1.0], [0.1, 1.0]]), torch.tensor([0, 1, 2])
    assert knn_accuracy(bank, labels, torch.tensor([[-1.0, 0.1]]), torch.tensor([0]), (1,)) == {1: 100.0}
    assert knn_accuracy(bank, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([2]), (1,)) == {1: 100.0}
    assert knn_accuracy(bank, labels, torch.tensor([[1.0, 0.0]]), torch.tensor([2]), (3,)) == {3: 100.0}


def test_a_low_temperature_does_not_overflow() -> None:
    bank, queries = blobs(300, 1), blobs(90, 2)
    assert knn_accuracy(*bank, *queries, (20,), 1e-4)[20] == knn_accuracy(*bank, *queries, (1,))[1]


def test_a_k_larger_than_the_bank_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError, match=r"k=31 is larger than the memory bank of 30 images"):
        knn_accuracy(*blobs(30, 1), *blobs(9, 2), (1, 31))


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks.


_NUMBERS_OF_QUERIES = (1, 91, 1100)


def _in_one_of_two_processes(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = []
    for number in _NUMBERS_OF_QUERIES:
        (bank, labels), (asked, truth) = _data_with_doubles(number)
        # Uneven shares in no order; rank 1's part of the bank is smaller than the largest k.
        mine = torch.randperm(len(bank), generator=torch.Generator().manual_seed(0)).split([251, 50])[rank]
        own = torch.arange(number)[rank::2]
        found.append(
            knn_accuracy(
                bank[mine],
                labels[mine],
                asked[own],
                truth[own],
                KS,
                chunk=64,
                bank_indices=mine,
                world_size=2,
                device=CPU,
            )
        )
    torch.save(found, f"{out}.{rank}")
    dist.destroy_process_group()


def _data_with_doubles(queries: int) -> Any:
    (bank, labels), asked = blobs(301, 5), blobs(queries, 6)
    bank[200:240] = bank[:40]  # the same images with other labels: ties that must fall the same way
    return (bank, labels), asked


@pytest.mark.distributed
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    mp.spawn(_in_one_of_two_processes, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    for place, number in enumerate(_NUMBERS_OF_QUERIES):
        bank, asked = _data_with_doubles(number)
        alone = knn_accuracy(*bank, *asked, KS, chunk=64)
        for rank in range(2):
            assert torch.load(tmp_path / f"out.{rank}")[place] == alone


# ---------------------------------------------------------------------------------------------------------------------
# Features.


class Shades:
    """A source whose image ``i`` is a plain colour of level ``i``; ``broken`` ones cannot be read."""

    spec = "shades"

    def __init__(self, count: int, classes: int = 3, broken: tuple[int, ...] = (), labelled: bool = True) -> None:
        self.count, self.broken = count, broken
        self.labels = np.arange(count) % classes if labelled else None
        self.classes = [f"class {number}" for number in range(classes)] if labelled else None

    def __len__(self) -> int:
        return self.count

    def image(self, index: int) -> Image.Image:
        if index in self.broken:
            raise BadImage(f"shade {index}", "truncated")
        return Image.new("RGB", (20, 14), (index, index, index))


def _levels(source: Any, calls: list[int] | None = None, **arguments: Any) -> Any:
    def features(images: torch.Tensor) -> dict[str, torch.Tensor]:
        if calls is not None:
            calls.append(len(images))
        level = (images[:, 0, 0, 0] * 0.229 + 0.485) * 255
        return {"x_norm_clstoken": torch.stack([level, torch.ones_like(level)], dim=1)}

    return extract(features, source, resize=14, size=8, batch=4, device=CPU, **arguments)


def test_every_image_is_looked_at_once_by_some_rank() -> None:
    shares = [_levels(Shades(23), rank=rank, world_size=3) for rank in range(3)]
    assert sorted(torch.cat([share.indices for share in shares]).tolist()) == list(range(23))
    for share in shares:
        assert share.features[:, 0].round().long().tolist() == share.indices.tolist()
        assert share.labels.tolist() == (share.indices % 3).tolist()


@pytest.mark.parametrize("count", [1, 2, 23])
def test_all_ranks_call_the_model_equally_often(count: int) -> None:
    calls: list[list[int]] = [[], [], []]
    for rank in range(3):
        _levels(Shades(count), calls[rank], rank=rank, world_size=3)
    assert calls[0] == calls[1] == calls[2] != []


def test_unreadable_images_are_left_out_and_named() -> None:
    with pytest.warns(UserWarning, match="shade 5: truncated"):
        share = _levels(Shades(11, broken=(5,)))
    assert share.indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]
    assert share.features[:, 0].round().long().tolist() == share.indices.tolist()
    assert share.bad == ["shade 5: truncated"]


def test_an_unlabelled_set_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="'shades' has no labels"):
        _levels(Shades(11, labelled=False))


def test_a_subset_is_spread_evenly_over_the_classes_and_always_the_same() -> None:
    source: Any = Shades(300, classes=10)
    chosen = subset(source, 50)
    assert np.bincount(chosen % 10).tolist() == [5] * 10
    assert np.array_equal(chosen, subset(source, 50))
    assert not np.array_equal(chosen, subset(source, 50, seed=1))
    assert np.array_equal(subset(source, 0), np.arange(300))
    assert np.all(np.diff(chosen) > 0)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (64, 64), (30, 101)])
def test_images_are_prepared_as_torchvision_does(width: int, height: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    image = Image.fromarray(noise)
    resize = transforms.Resize(48, transforms.InterpolationMode.BICUBIC)
    expected = np.asarray(transforms.CenterCrop(33)(resize(image)))
    assert np.array_equal(prepare(image, 48, 33), expected)


def test_pixels_are_a_feature_too() -> None:
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(class_token(pixel_features(images)), images.reshape(2, 48))


# ---------------------------------------------------------------------------------------------------------------------
# The command. It needs the whole package.


def _arguments(*words: str) -> Any:
    return knn._parser().parse_args(list(words))


_SCENES = ("scenes:n=60,size=32", "scenes:n=20,size=32,split=test")
_SIZES = ("--size", "32", "--resize", "32", "--device", "cpu")


def test_different_classes_are_named() -> None:
    first, second = Shades(30, classes=3), Shades(30, classes=5)
    with pytest.raises(UserError, match=r"(?s)differ.*only in the second: class 3, class 4"):
        knn.check_sources(first, second)  # type: ignore[arg-type]


def test_pixels_need_no_weights_and_results_say_what_was_measured(tmp_path: Path) -> None:
    words = (
        "--pixels",
        "--train",
        _SCENES[0],
        "--test",
        _SCENES[1],
        *_SIZES,
        "--k",
        "1",
        "5",
        "--output",
        str(tmp_path),
    )
    file = knn.run(_arguments(*words))
    assert file == tmp_path / "results.json"
    results = json.loads(file.read_text())
    train, test = (open_source(spec) for spec in _SCENES)
    flat = [torch.stack([torch.from_numpy(np.array(s.image(i))) for i in range(len(s))]).float() for s in (train, test)]
    bank, queries = (((rows / 255 - torch.tensor(IMAGE_MEAN)) / torch.tensor(IMAGE_STD)).flatten(1) for rows in flat)
    for k in (1, 5):
        expected = reference(bank, train.labels, queries, torch.tensor(test.labels), k, 0.07)
        assert results["metrics"][f"knn_{k}"] == pytest.approx(expected)
    counts = {"bank_images": 60, "test_images": 20, "bad_images": 0}
    assert results["data"] == {"train": _SCENES[0], "test": _SCENES[1], **counts}
    assert results["backbone"] == "pixels"


def test_a_k_larger_than_the_set_is_refused_before_any_image_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "features_of_both", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(UserError, match=r"k=61 is larger than the memory bank of 60 images"):
        knn.run(_arguments("--pixels", "--train", _SCENES[0], "--test", _SCENES[1], *_SIZES, "--k", "61"))


def _config(**changes: Any) -> Config:
    values = {
        "train": _SCENES[0],
        "test": _SCENES[1],
        "size": 28,
        "resize": 32,
        "batch": 16,
        "k": [1, 20, 60, 61],
        **changes,
    }
    return from_dict({"eval": values, "data": {"workers": 0}})


def test_evaluation_during_training_leaves_out_what_the_bank_is_too_small_for() -> None:
    with pytest.warns(UserWarning, match=r"leaves out k=\[61\]: the memory bank holds 60 images"):
        metrics = knn.online_knn(pixel_features, _config(), 0, 1, CPU)
    assert list(metrics) == ["knn_1", "knn_20", "knn_60"]


def test_evaluation_of_a_diverged_backbone_gives_nan_and_lets_the_run_decide() -> None:
    metrics = knn.online_knn(lambda images: {"x_norm_clstoken": images.flatten(1) * torch.nan}, _config(), 0, 1, CPU)
    assert all(np.isnan(value) for value in metrics.values())
    assert len(metrics) == 4


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (39, 39), (40, 0), (50, 0)])
def test_a_limit_that_reaches_all_images_is_not_recorded(limit: int, kept: int) -> None:
    train, test = open_source("scenes:n=40,size=16"), open_source("scenes:n=20,size=16,split=test")
    settings = knn.Settings(max_train=limit)
    found = knn.describe("teacher", settings, torch.device("cpu"), {}, train, test, {}, 1.0)
    assert found["settings"]["max_train"] == kept


def _online_in_one_of_two_processes(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # as of names that go; each rank would print it

    def collective(images: torch.Tensor) -> dict[str, torch.Tensor]:
        dist.all_reduce(torch.ones(1))
        return pixel_features(images)

    torch.save(knn.online_knn(collective, _config(k=[1, 20], max_test=19), rank, 2, CPU), f"{out}.{rank}")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_evaluation_during_training_is_the_same_on_two_ranks_as_on_one(tmp_path: Path) -> None:
    mp.spawn(_online_in_one_of_two_processes, (str(tmp_path / "store"), str(tmp_path / "out")), nprocs=2)
    alone = knn.online_knn(pixel_features, _config(k=[1, 20], max_test=19), 0, 1, CPU)
    for rank in range(2):
        assert torch.load(tmp_path / f"out.{rank}") == alone


# ---------------------------------------------------------------------------------------------------------------------
# Few images of each class.


def _extracted(rows: torch.Tensor, labels: torch.Tensor) -> Extracted:
    return Extracted(rows, labels, torch.arange(len(rows)), [])


def test_few_shot_banks_hold_so_many_images_of_each_class_and_differ_between_tries() -> None:
    labels = np.array([0, 1, 2, -1] * 20)
    draws = [knn.draw_per_class(labels, 3, 0, attempt) for attempt in range(3)]
    assert all(np.bincount(labels[drawn]).tolist() == [3, 3, 3] for drawn in draws)
    assert all(np.all(np.diff(drawn) > 0) for drawn in draws)
    assert not np.array_equal(draws[0], draws[1])
    assert np.array_equal(draws[0], knn.draw_per_class(labels, 3, 0, 0))


def test_few_shot_accuracy_is_the_mean_over_the_tries() -> None:
    (bank, labels), (asked, truth) = blobs(300, 1), blobs(90, 2)
    settings = knn.Settings(k=(1, 10, 100), per_class=(5,), tries=4)
    found = knn.few_shot(_extracted(bank, labels), _extracted(asked, truth), settings)
    expected = []
    for attempt in range(4):
        drawn = torch.from_numpy(knn.draw_per_class(labels.numpy(), 5, 0, attempt))
        expected.append(reference(bank[drawn], labels[drawn], asked, truth, 10, 0.07))
    assert found["knn_10_5_per_class"] == pytest.approx(np.mean(expected))
    assert found["knn_10_5_per_class_std"] == pytest.approx(np.std(expected))
    assert not any("100" in name for name in found)


def test_more_images_of_a_class_than_there_are_is_refused() -> None:
    with pytest.raises(UserError, match="--per-class 4 is more than the 3 images of class 1"):
        knn.draw_per_class(np.array([0, 0, 0, 0, 1, 1, 1]), 4, 0, 0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--per-class", "1", "--k", "20"), "--per-class 1 makes banks of 10 images, too few for --k 20"),
        (("--per-class", "2", "--k", "5", "--max-train", "10"), "--per-class 2 is more than the 1 images of class"),
    ],
)
def test_few_shot_banks_that_cannot_be_are_refused_before_any_image_is_read(
    words: tuple[str, ...], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "features_of_both", lambda *_, **__: pytest.fail("images were read"))
    with pytest.raises(UserError, match=message):
        knn.run(_arguments("--pixels", "--train", _SCENES[0], "--test", _SCENES[1], *_SIZES, *words))


# ---------------------------------------------------------------------------------------------------------------------
# Memory.


@pytest.mark.slow
def test_a_search_holds_no_copy_of_the_bank(tmp_path: Path) -> None:
    rows, dim = 60_000, 1536
    file = np.memmap(tmp_path / "bank", np.float32, "w+", shape=(rows, dim))
    rng = np.random.default_rng(0)
    for start in range(0, rows, 10_000):
        file[start : start + 10_000] = rng.standard_normal((10_000, dim), np.float32)
    file.flush()
    bank, labels = torch.from_numpy(file), torch.from_numpy(np.arange(rows) % 5)
    before = _anonymous_memory()
    peak = 0

    class Watched(torch.Tensor):
        """The bank, which notes the memory in use whenever a part of it is taken."""

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal peak
            peak = max(peak, _anonymous_memory())
            return super().__torch_function__(function, types, args, kwargs or {})

    knn_accuracy(bank.as_subclass(Watched), labels, bank[:50].clone(), labels[:50], (20,))
    assert 0 < peak - before < 0.6 * rows * dim * 4


def _anonymous_memory() -> int:
    """Return the bytes that this process holds beside mapped files."""
    status = Path("/proc/self/status")
    if not status.is_file():
        pytest.skip("this system has no /proc to read memory from")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("RssAnon"))
