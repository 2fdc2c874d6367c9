"""Our backbones and timm's compute the same, converted either way."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from parity import (
    FULL,
    LIMIT,
    SIZES,
    SMALL_SIZES,
    TINY,
    Case,
    assert_equal_outputs,
    blocks,
    images,
    loaded,
    needs,
    our_outputs,
    outputs,
    published,
    randomise,
    relative_error,
    tiny,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2_fsdp.config import ModelConfig, width_depth_heads
from dinov2_fsdp.weights import load_backbone
from dinov2_fsdp.weights.architecture import shapes_of
from dinov2_fsdp.weights.timm import config_json, from_official
from dinov2_fsdp.weights.writing import export

timm = needs("timm")

RULE = "antialias"
"""How timm stretches positions, with registers and without."""
SIZE_NAMES = {"vits": "small", "vitb": "base", "vitl": "large", "vitg": "giant"}


def their_model(folder: Path) -> Any:
    """The folder's model, as timm's users load it."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


def their_random_model(model: ModelConfig, image_size: int, seed: int) -> Any:
    settings = config_json(model, image_size)
    theirs = timm.create_model(settings["architecture"], pretrained=False, **settings["model_args"]).eval()
    randomise(theirs, seed)
    return theirs


@torch.no_grad()
def their_outputs(model: Any, pictures: Tensor) -> dict[str, Tensor]:
    indices = blocks(len(model.blocks))
    final, pairs = model.forward_intermediates(pictures, indices, output_fmt="NLC", return_prefix_tokens=True)
    prefix = model.num_prefix_tokens
    return {
        "class token": model(pictures),
        **({"registers": final[:, 1:prefix]} if prefix > 1 else {}),
        "patch tokens": model.forward_features(pictures)[:, prefix:],
        **{f"block {i}": torch.cat([b, p], dim=1) for i, (p, b) in zip(indices, pairs, strict=True)},
    }


def both_ways(model: ModelConfig, image_size: int, sizes: list[tuple[int, int]], folder: Path, name: str) -> None:
    cases = [Case(size) for size in sizes]
    # One copy in memory at a time.
    ours = loaded(model, image_size, interpolation=RULE)
    export(ours, "timm", folder / "ours")
    found = outputs(our_outputs, ours.model, cases)
    del ours
    for case, a, b in zip(cases, found, outputs(their_outputs, their_model(folder / "ours"), cases), strict=True):
        assert_equal_outputs(a, b, f"timm {name} out {case}")
    shutil.rmtree(folder / "ours")

    theirs, file = their_random_model(model, image_size, seed=1), folder / "theirs.safetensors"
    save_file(theirs.state_dict(), file)
    expected = outputs(their_outputs, theirs, cases)
    del theirs
    back = load_backbone(file, interpolation=RULE)
    for case, a, b in zip(cases, outputs(our_outputs, back.model, cases), expected, strict=True):
        assert_equal_outputs(a, b, f"timm {name} in {case}")
    file.unlink()


@pytest.mark.parametrize(("ffn", "registers"), TINY)
def test_tiny_backbones_compute_what_timms_do(ffn: str, registers: int, tmp_path: Path) -> None:
    both_ways(tiny(ffn, registers), 70, SMALL_SIZES, tmp_path, f"tiny-{ffn} {registers}")


@pytest.mark.slow
@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize(("arch", "depth", "registers"), FULL)
def test_published_backbones_compute_what_timms_do(arch: str, depth: int, registers: int, tmp_path: Path) -> None:
    both_ways(published(arch, depth, registers), 518, SIZES, tmp_path, f"{arch} {registers}")


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("arch", SIZE_NAMES)
def test_an_export_fits_timms_model_of_the_published_name(arch: str, registers: int) -> None:
    """By names and shapes of the full-size model, without its memory."""
    model = ModelConfig(arch=arch, registers=registers)
    name = f"vit_{SIZE_NAMES[arch]}_patch14{'_reg4' if registers else ''}_dinov2"
    assert config_json(model, 518)["architecture"] == name
    with torch.device("meta"):
        theirs, ours = timm.create_model(name, pretrained=False), published_parameters(model)
    assert {n: p.shape for n, p in theirs.state_dict().items()} == {n: p.shape for n, p in ours.items()}
    dim, depth, heads = width_depth_heads(model)
    assert (theirs.embed_dim, len(theirs.blocks), theirs.blocks[0].attn.num_heads) == (dim, depth, heads)


def published_parameters(model: ModelConfig) -> dict[str, Tensor]:
    return from_official(shapes_of(model, 518))


def test_timms_own_reader_takes_our_official_file(tmp_path: Path) -> None:
    """timm translates official files itself; through it or through our export, the same tensors arrive."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    ours = loaded(published("vits", 1, 4), 518)
    export(ours, "official", tmp_path / "ours.pth")
    export(ours, "timm", tmp_path / "timm.safetensors")
    model = timm.create_model("vit_small_patch14_reg4_dinov2", pretrained=False, depth=1)
    translated = checkpoint_filter_fn(torch.load(tmp_path / "ours.pth", weights_only=True), model)
    exported = load_file(tmp_path / "timm.safetensors")
    assert translated.keys() == exported.keys()
    assert all(torch.equal(translated[name], exported[name]) for name in exported)


def test_a_classifier_in_the_file_is_left_out(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_small_patch14_dinov2", pretrained=False, depth=1, num_classes=7, img_size=70).eval()
    randomise(theirs)
    save_file(theirs.state_dict(), tmp_path / "classifier.safetensors")
    ours = load_backbone(tmp_path / "classifier.safetensors").model
    pictures = images(70, 70)
    with torch.no_grad():
        assert relative_error(ours(pictures), theirs.forward_head(theirs.forward_features(pictures), True)) < 1e-5


def test_heads_of_another_width_travel_in_the_folder(tmp_path: Path) -> None:
    model = tiny("mlp", 0)
    model.heads = 4
    ours = loaded(model, 70)
    export(ours, "timm", tmp_path)
    pictures = images(70, 70)
    with torch.no_grad():
        expected = ours.model(pictures)
        assert relative_error(their_model(tmp_path)(pictures), expected) < 1e-5
        assert relative_error(load_backbone(tmp_path).model(pictures), expected) < 1e-5
