from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluation import TableSource
from matplotlib.figure import Figure
from PIL import Image
from tiny import tiny_backbone, tiny_config
from torch import nn

from dinov2_fsdp.data.loader import Microbatches
from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.errors import UserError
from eval.components import pca_colours, pca_patches
from eval.curves import draw_curves, read_metrics, training_curves
from eval.features import normalise
from eval.pictures import readable_images
from eval.views import attention_maps, draw_attention, draw_crops, draw_neighbours, nearest, shown

CPU = torch.device("cpu")


def write_metrics(path: Path, steps: int = 400) -> Path:
    """Write what a run of ``steps`` steps logs, an evaluation every 50, and the torn line of a killed run."""
    rng = np.random.default_rng(0)
    lines = []
    for step in range(1, steps + 1):
        done = step / steps
        dino, ibot = 7.0 - 3.5 * done + rng.normal() * 0.2, 6.0 - 2.5 * done**0.5 + rng.normal() * 0.15
        koleo = 1.5 - done + rng.normal() * 0.1
        lines.append(
            {
                "step": step, "images": step * 256, "seconds": 0.8 * step, "loss": dino + ibot + 0.1 * koleo,
                "loss/dino": dino, "loss/ibot": ibot, "loss/koleo": koleo,
                "teacher/entropy_dino": 6.5 - 2 * done + 0.1 * rng.normal(),
                "student/entropy_dino": 6.8 - 1.5 * done + 0.1 * rng.normal(),
                "lr": 1e-3 * min(10 * done, 0.5 + 0.5 * np.cos(np.pi * done)), "weight_decay": 0.04 + 0.36 * done,
                "teacher_momentum": 1 - 0.004 * np.cos(np.pi * done / 2),
                "teacher_temperature": 0.04 + 0.03 * min(1, 3 * done),
                "img_per_s": 320 + 20 * rng.normal(), "name": "text is passed over", "bad": float("nan"),
            }
        )  # fmt: skip
        if step % 50 == 0:
            lines.append({"step": step, "eval/knn_1": 20 + 25 * done, "eval/knn_20": 22 + 33 * done})
    path.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"step": 401, "lo')
    return path


def distinct_colours(png: Path) -> int:
    with Image.open(png) as image:
        return len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0))


@pytest.mark.slow
def test_curves_are_drawn_at_their_size(tmp_path: Path) -> None:
    png = training_curves(
        write_metrics(tmp_path / "metrics.jsonl"), tmp_path / "pictures" / "curves.png", {"raw pixels": 21.0}
    )
    with Image.open(png) as image:
        assert image.size == (1800, 1020)
    assert distinct_colours(png) > 500


def test_curves_of_a_demo_keep_its_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, float] | None] = []
    monkeypatch.setattr(
        "eval.curves.training_curves", lambda _file, png, references, title: seen.append(references) or png
    )
    draw_curves(tmp_path)
    (tmp_path / "summary.json").write_text('{"knn_pixels": 22.5, "knn_untrained": 12.6, "knn_trained": 54.6}')
    draw_curves(tmp_path)
    draw_curves(tmp_path, {"chance": 10.0})
    assert seen == [None, {"raw pixels": 22.5, "untrained": 12.6}, {"chance": 10.0}]


@pytest.mark.parametrize(
    ("logged", "references", "panel"),
    [
        ({}, None, False),
        ({"eval/linear_top1": 5.0}, None, False),
        ({"eval/knn_20": 5.0}, None, True),
        ({}, {"raw pixels": 21.0}, True),
    ],
    ids=["no evaluations", "another task", "k-NN", "a reference"],
)
def test_a_run_without_k_nn_has_no_panel_of_it(
    logged: dict[str, float],
    references: dict[str, float] | None,
    panel: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[str]] = []
    monkeypatch.setattr(
        Figure, "savefig", lambda self, _: drawn.append([axes.get_title(loc="left") for axes in self.axes])
    )
    line = {"step": 10, "loss": 3.0, "img_per_s": 9.0, "lr": 0.1, **logged}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line))
    training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", references)
    assert ("k-NN accuracy of the teacher" in drawn[0]) is panel
    assert {"Total loss", "Schedules", "Speed"} < set(drawn[0])


@pytest.mark.slow
def test_curves_of_a_run_that_logged_little_are_drawn_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 3.0}\n')
    assert distinct_colours(training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")) > 50


@pytest.mark.slow
def test_a_line_that_appears_in_the_log_appears_in_the_picture(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 3.0} for step in range(9)]
    pictures = []
    for extra in (
        {},
        {"loss/dino": 1.0},
        {"img_per_s": 5.0},
        {"eval/knn_20": 5.0},
        {"lr": 0.1},
        {"teacher/entropy_dino": 1.0},
    ):
        (tmp_path / "metrics.jsonl").write_text("\n".join(json.dumps({**line, **extra}) for line in lines))
        pictures.append(training_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png").read_bytes())
    assert len(set(pictures)) == len(pictures)


def test_metrics_skip_torn_lines_text_and_nan_and_keep_the_last_of_a_repeated_step(tmp_path: Path) -> None:
    file = write_metrics(tmp_path / "metrics.jsonl", steps=100)
    file.write_text(file.read_text() + '\n{"step": 7, "loss": 99.0}\n')
    metrics = read_metrics(file)
    steps, loss = metrics["loss"]
    assert steps.tolist() == list(range(1, 101))
    assert loss[6] == 99.0
    assert metrics["eval/knn_20"][0].tolist() == [50, 100]
    assert not {"name", "bad", "step"} & set(metrics)


@pytest.mark.parametrize("content", [None, "", "not json\n"])
def test_a_log_without_steps_is_named(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.jsonl"):
        training_curves(file, tmp_path / "curves.png")


# ---------------------------------------------------------------------------------------------------------------------
# Principal components.


class MeanColours(nn.Module):
    """A backbone whose patch features are a fixed mixture of each patch's mean colour."""

    patch_size = 8

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(3, 16, generator=torch.Generator().manual_seed(0)))

    def forward_features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        patches = nn.functional.avg_pool2d(images, self.patch_size)
        return {"x_norm_patchtokens": patches.flatten(2).transpose(1, 2) @ self.mix}


def picture(seed: int) -> Image.Image:
    """Return a bright disc on a dark gradient."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:90j, -1:1:120j]
    colour = rng.uniform(0.5, 1, 3)
    disc = (np.hypot(x - rng.uniform(-0.3, 0.3), y - rng.uniform(-0.3, 0.3)) < 0.5)[..., None]
    ground = 0.3 * np.stack([x + 1, y + 1, x * 0 + 0.2], -1) / 2
    return Image.fromarray((255 * np.where(disc, colour, ground)).astype(np.uint8))


def test_components_are_drawn_for_every_image_and_model(tmp_path: Path) -> None:
    images = [picture(seed) for seed in range(5)]
    models: dict[str, nn.Module] = {"untrained": MeanColours(), "trained": MeanColours()}
    png = pca_patches(models, images, tmp_path / "pictures" / "pca.png", 128, CPU)
    with Image.open(png) as image:
        width, height = image.size
    assert height == 3 * 180
    assert width == pytest.approx(5 * 180 + 41, abs=1)
    assert distinct_colours(png) > 200
    one = pca_patches(MeanColours(), images, tmp_path / "one.png", 128, CPU)
    with Image.open(one) as image:
        assert image.size[1] == 2 * 180


def test_a_size_that_the_patch_does_not_divide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"size 100 is no multiple of this backbone's patch of 8; use e\.g\. 96 or 104"):
        pca_patches(MeanColours(), [picture(0)], tmp_path / "pca.png", 100, CPU)


def planted(images: int = 4, side: int = 10, dim: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Return features with a strong direction that marks the central object and two weaker ones within it."""
    rng = np.random.default_rng(0)
    directions = np.linalg.qr(rng.normal(size=(dim, 3)))[0].T
    inside = np.zeros((images, side, side), bool)
    inside[:, 3:7, 3:7] = True
    weights = np.stack(
        [20.0 * inside, 3 * rng.normal(size=inside.shape) * inside, rng.normal(size=inside.shape) * inside], -1
    )
    tokens = weights @ directions + 0.01 * rng.normal(size=(*inside.shape, dim)) + 5
    return tokens.astype(np.float32), inside


def test_the_first_component_separates_what_differs_most() -> None:
    tokens, inside = planted()
    first = pca_colours(tokens)[..., 0]
    assert abs(first[inside].mean() - first[~inside].mean()) > 0.8


def test_the_basis_is_shared_by_all_images_so_equal_patches_have_equal_colours() -> None:
    tokens, _ = planted()
    tokens[1, 0, 0] = tokens[3, 5, 5]
    colours = pca_colours(tokens)
    assert np.allclose(colours[1, 0, 0], colours[3, 5, 5])
    assert not np.allclose(colours[1, 0, 1], colours[3, 5, 5])


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_the_side_that_does_not_touch_the_border(sign: int) -> None:
    tokens, inside = planted()
    colours = pca_colours(sign * tokens, foreground=True)
    assert np.all(colours[~inside] == 0)
    assert colours[inside].std(axis=0).min() > 0.1


def test_colours_do_not_depend_on_the_sign_that_the_solver_gave() -> None:
    tokens, _ = planted()
    assert np.allclose(pca_colours(tokens), pca_colours(tokens[..., ::-1].copy()), atol=1e-4)


def test_a_few_outliers_do_not_darken_the_picture() -> None:
    tokens, _ = planted()
    calm = pca_colours(tokens)
    tokens[0, 0, 0] += 15 * (tokens[0, 5, 5] - tokens[0, 0, 1]) / 10
    assert np.median(np.abs(pca_colours(tokens) - calm)) < 0.1


# ---------------------------------------------------------------------------------------------------------------------
# What a backbone attends to, finds alike and is shown.


def noise(count: int, size: int = 16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_attention_is_that_of_the_class_token_in_the_last_block(registers: int) -> None:
    model = tiny_backbone(depth=2, registers=registers).eval()
    crops = noise(2)
    found = attention_maps(model, crops, 16, CPU)
    assert found.shape == (2, 3, 4, 4)
    images = normalise(torch.from_numpy(crops))
    layout = model.layout([(2, 16, 16)])
    tokens = model.blocks[0](model.embed(images).flatten(0, 1), layout).unflatten(0, (2, -1))
    block = model.blocks[1]
    query, key, _ = block.attn.qkv(block.norm1(tokens)).double().unflatten(-1, (3, 3, 8)).unbind(2)
    weights = torch.einsum("bhd,bkhd->bhk", query[:, 0], key) / 8**0.5
    expected = weights.softmax(dim=-1)[..., 1 + registers :].unflatten(-1, (4, 4))
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-4, atol=1e-6)
    assert not block._forward_pre_hooks


def test_attention_is_drawn_for_every_image_and_head(tmp_path: Path) -> None:
    images = [Image.fromarray(picture) for picture in noise(2)]
    png = draw_attention(tiny_backbone(depth=2).eval(), images, tmp_path / "attention.png", 16, CPU)
    assert distinct_colours(png) > 50


def test_neighbours_are_the_most_similar_images_and_never_the_query_itself(tmp_path: Path) -> None:
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1], [2.0, 0.2]])
    assert nearest(torch.tensor([[1.0, 0.05]]), rows, 3).tolist() == [[3, 0, 1]]
    source = open_source("scenes:n=9,size=16")
    model = tiny_backbone(depth=2).eval()
    asked = [source.image(4)]
    drawn = []
    import eval.views

    original = eval.views.picture_grid
    eval.views.picture_grid = lambda rows, *rest, **more: drawn.append(rows) or original(rows, *rest, **more)
    try:
        draw_neighbours(model, asked, source, tmp_path / "neighbours.png", 16, 16, CPU, count=3)
    finally:
        eval.views.picture_grid = original
    query, *others = drawn[0][0][1]
    assert np.array_equal(query, np.asarray(source.image(4)))
    assert len(others) == 3
    assert not any(np.array_equal(other, query) for other in others)


def test_crops_show_hidden_patches_in_grey_and_the_rest_as_it_is(tmp_path: Path) -> None:
    config = tiny_config()
    batch = Microbatches(config, open_source(config.data.train))[0, 0]
    for image in range(batch.images):
        wholes, parts = shown(batch, image, (4, 4))
        assert len(parts) == config.crops.local_number
        for crop, pixels in zip((image, batch.images + image), wholes, strict=True):
            hidden = batch.masks[crop].reshape(4, 4).numpy().repeat(4, 0).repeat(4, 1)
            assert len(np.unique(pixels[hidden], axis=0)) <= 1
            original = batch.global_crops[crop].permute(1, 2, 0).numpy()
            assert np.array_equal(pixels[~hidden], original[~hidden])
    assert batch.masks.any()
    assert distinct_colours(draw_crops(config, open_source(config.data.train), tmp_path / "crops.png")) > 50


def test_images_that_cannot_be_read_are_replaced_by_others_in_pictures() -> None:
    source: Any = TableSource([0, 1] * 10, broken=range(3, 20))
    found = readable_images(source, 3)
    assert sorted(image.getpixel((0, 0))[0] for image in found) == [0, 1, 2]  # type: ignore[index]
    assert len(readable_images(source, 5)) == 3
    with pytest.raises(UserError, match=r"'table' has no image that can be read: table:\d+: truncated"):
        readable_images(TableSource([0, 1], broken=(0, 1)), 3)  # type: ignore[arg-type]
