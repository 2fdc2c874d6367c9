"""Our backbones and Hugging Face's compute the same, converted either way through folders on disk."""

from __future__ import annotations

import json
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
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dinov2_fsdp.config import ModelConfig
from dinov2_fsdp.weights import load_backbone
from dinov2_fsdp.weights.hugging_face import config_json
from dinov2_fsdp.weights.writing import export
from eval.features import normalise, prepare

transformers = needs("transformers")


def rule(registers: int) -> str:
    """How Hugging Face stretches positions: this version has no offset where there are no registers."""
    return "antialias" if registers else "exact"


def their_model(folder: Path) -> Any:
    """The folder's model; every tensor must find its place and every place its tensor."""
    kind = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, kind).from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


def their_random_model(model: ModelConfig, image_size: int, seed: int) -> Any:
    settings = config_json(model, image_size)
    kind = settings["architectures"][0]
    config = getattr(transformers, kind.replace("Model", "Config"))(**settings)
    theirs = getattr(transformers, kind)(config).eval()
    randomise(theirs, seed)
    return theirs


@torch.no_grad()
def their_outputs(model: Any, pictures: Tensor, masks: Tensor | None = None) -> dict[str, Tensor]:
    out = model(pictures, bool_masked_pos=masks, output_hidden_states=True)
    prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    tokens = out.last_hidden_state
    return {
        "class token": out.pooler_output,
        **({"registers": tokens[:, 1:prefix]} if prefix > 1 else {}),
        "patch tokens": tokens[:, prefix:],
        **{f"block {i}": out.hidden_states[i + 1] for i in blocks(model.config.num_hidden_layers)},
    }


def both_ways(model: ModelConfig, image_size: int, sizes: list[tuple[int, int]], folder: Path, name: str) -> None:
    # The largest size is the slowest, and masks act before the size matters.
    cases = [Case(size) for size in sizes] + [Case(size, masked=True) for size in sizes[1:]]
    # One copy in memory at a time.
    ours = loaded(model, image_size, interpolation=rule(model.registers))
    export(ours, "hf", folder / "ours")
    found = outputs(our_outputs, ours.model, cases)
    del ours
    for case, a, b in zip(cases, found, outputs(their_outputs, their_model(folder / "ours"), cases), strict=True):
        assert_equal_outputs(a, b, f"hf {name} out {case}")
    shutil.rmtree(folder / "ours")

    theirs = their_random_model(model, image_size, seed=1)
    theirs.save_pretrained(folder / "theirs")
    expected = outputs(their_outputs, theirs, cases)
    del theirs
    back = load_backbone(folder / "theirs", interpolation=rule(model.registers))
    for case, a, b in zip(cases, outputs(our_outputs, back.model, cases), expected, strict=True):
        assert_equal_outputs(a, b, f"hf {name} in {case}")
    shutil.rmtree(folder / "theirs")


@pytest.mark.parametrize(("ffn", "registers"), TINY)
def test_tiny_backbones_compute_what_hugging_faces_do(ffn: str, registers: int, tmp_path: Path) -> None:
    both_ways(tiny(ffn, registers), 70, SMALL_SIZES, tmp_path, f"tiny-{ffn} {registers}")


@pytest.mark.slow
@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize(("arch", "depth", "registers"), FULL)
def test_published_backbones_compute_what_hugging_faces_do(
    arch: str, depth: int, registers: int, tmp_path: Path
) -> None:
    both_ways(published(arch, depth, registers), 518, SIZES, tmp_path, f"{arch} {registers}")


def test_an_exported_folder_has_a_preprocessor(tmp_path: Path) -> None:
    export(loaded(tiny("mlp", 0), 70), "hf", tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    pixels = torch.linspace(0, 255, 300 * 280 * 3).to(torch.uint8).reshape(300, 280, 3)
    (batch,) = processor(pixels.numpy(), return_tensors="pt")["pixel_values"]
    ours = normalise(torch.from_numpy(prepare(Image.fromarray(pixels.numpy()), 256, 224).copy())[None])[0]
    assert batch.shape == (3, 224, 224)
    # Theirs resizes tensors, ours Pillow images: the same filter, rounded elsewhere.
    assert (batch - ours).abs().max() < 0.05


@pytest.mark.parametrize(("ffn", "registers"), TINY)
def test_a_state_dict_of_a_later_version_is_read_too(ffn: str, registers: int, tmp_path: Path) -> None:
    theirs = their_random_model(tiny(ffn, registers), 70, seed=2)
    names = theirs.state_dict().keys()
    if not any("q_proj" in name for name in names):
        pytest.skip("this version of transformers keeps the first names in memory")
    save_file({name: tensor.clone() for name, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    ours = load_backbone(tmp_path).model
    pictures = images(70, 70)
    with torch.no_grad():
        assert relative_error(ours(pictures), theirs(pictures).pooler_output) < 1e-5


def test_a_classifiers_folder_gives_its_backbone(tmp_path: Path) -> None:
    settings = config_json(tiny("mlp", 4), 70)
    classifier = transformers.Dinov2WithRegistersForImageClassification(
        transformers.Dinov2WithRegistersConfig(**settings, num_labels=5)
    )
    randomise(classifier)
    classifier.eval().save_pretrained(tmp_path)
    assert any(name.startswith("classifier.") for name in load_file(tmp_path / "model.safetensors"))
    pictures = images(70, 70)
    with torch.no_grad():
        theirs = classifier.dinov2_with_registers(pictures).pooler_output
        assert relative_error(load_backbone(tmp_path).model(pictures), theirs) < 1e-5


@pytest.mark.parametrize("registers", [0, 4])
def test_a_backbone_without_layer_scale_is_written_with_one_that_does_nothing(registers: int, tmp_path: Path) -> None:
    model = tiny("mlp", registers)
    model.layer_scale = 0.0
    ours = loaded(model, 70)
    assert not any("gamma" in name for name, _ in ours.model.named_parameters())
    export(ours, "hf", tmp_path)
    pictures = images(70, 70)
    with torch.no_grad():
        assert relative_error(ours.model(pictures), their_model(tmp_path)(pictures).pooler_output) < 1e-5


def test_without_registers_positions_are_stretched_in_another_way_there(tmp_path: Path) -> None:
    ours = loaded(tiny("mlp", 0), 70)
    export(ours, "hf", tmp_path)
    theirs = their_model(tmp_path)
    with torch.no_grad():
        native, other = (
            relative_error(ours.model(images(side, side)), theirs(images(side, side)).pooler_output)
            for side in (70, 42)
        )
    assert native < 1e-5
    assert other > 1e-3


@pytest.mark.parametrize(("ffn", "registers"), TINY)
def test_an_exported_folder_has_the_names_that_the_library_writes(ffn: str, registers: int, tmp_path: Path) -> None:
    model = tiny(ffn, registers)
    export(loaded(model, 70), "hf", tmp_path / "ours")
    their_random_model(model, 70, seed=0).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / side / "model.safetensors") for side in ("ours", "theirs"))
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
