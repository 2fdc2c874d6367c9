"""Files of official weights and exports: what is read, what is written, and what is refused with which words."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import TINY, images, loaded, published, tiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import differing

from dinov2_fsdp.config import ModelConfig
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.factory import build_backbone
from dinov2_fsdp.weights import export_backbone, load_backbone
from dinov2_fsdp.weights.architecture import infer, named_model, shapes_of
from dinov2_fsdp.weights.backbone import LoadedBackbone
from dinov2_fsdp.weights.reading import read_weights
from dinov2_fsdp.weights.writing import export

SIZE = 70


def tensors(backbone: LoadedBackbone) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in backbone.model.named_parameters()}


def save(content: Any, file: Path) -> Path:
    torch.save(content, file)
    return file


def official_names(registers: int, ffn: str, depth: int) -> set[str]:
    """The names in the released files, written out from them."""
    names = {"cls_token", "pos_embed", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    names |= {"norm.weight", "norm.bias"} | ({"register_tokens"} if registers else set())
    layers = [
        "norm1",
        "attn.qkv",
        "attn.proj",
        "norm2",
        *(["mlp.fc1", "mlp.fc2"], ["mlp.w12", "mlp.w3"])[ffn == "swiglu"],
    ]
    for index in range(depth):
        names |= {f"blocks.{index}.{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
        names |= {f"blocks.{index}.ls1.gamma", f"blocks.{index}.ls2.gamma"}
    return names


# -- official files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("ffn", "registers"), TINY)
def test_an_official_file_is_read_as_the_model_it_holds(ffn: str, registers: int, suffix: str, tmp_path: Path) -> None:
    ours = loaded(tiny(ffn, registers), SIZE)
    file = tmp_path / f"weights{suffix}"
    export(ours, "official", file)
    back = load_backbone(file)
    assert differing(tensors(back), tensors(ours)) == []
    assert torch.equal(back.model(images(SIZE, SIZE)), ours.model(images(SIZE, SIZE)))
    assert (back.architecture, back.image_size) == (ours.architecture, SIZE)


@pytest.mark.parametrize(("ffn", "registers"), TINY)
def test_official_files_have_the_released_names(ffn: str, registers: int, tmp_path: Path) -> None:
    export(loaded(tiny(ffn, registers), SIZE), "official", tmp_path / "weights.pth")
    content = torch.load(tmp_path / "weights.pth", weights_only=True)
    assert content.keys() == official_names(registers, ffn, depth=3)
    assert content["mask_token"].shape == (1, 128)


@pytest.mark.parametrize("arch", ["vits", "vitb", "vitl", "vitg"])
def test_a_released_model_is_recognised_by_its_shapes(arch: str) -> None:
    model = ModelConfig(arch=arch, registers=4)
    assert infer(shapes_of(model, 518), "FILE") == (model, 518)


def test_blocks_in_chunks_are_counted_through(tmp_path: Path) -> None:
    """A backbone trained in chunks: the second number counts through all chunks."""
    ours = loaded(tiny("mlp", 0, depth=4), SIZE)

    def chunked(match: re.Match[str]) -> str:
        return f"blocks.{int(match[1]) // 2}.{match[1]}."

    content = {re.sub(r"blocks\.(\d+)\.", chunked, name): tensor for name, tensor in tensors(ours).items()}
    assert "blocks.1.3.attn.qkv.weight" in content
    back = load_backbone(save(content, tmp_path / "chunked.pth"))
    assert differing(tensors(back), tensors(ours)) == []


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_training_runs_checkpoint_gives_the_network_asked_for(which: str, tmp_path: Path) -> None:
    networks = {name: loaded(tiny("mlp", 0), SIZE, seed) for seed, name in enumerate(("teacher", "student"))}
    heads = {"dino_head.mlp.0.weight": torch.zeros(2, 2), "ibot_head.last_layer.weight_v": torch.zeros(2, 2)}
    content = {
        name: {**{f"backbone.{n}": t for n, t in tensors(network).items()}, **heads}
        for name, network in networks.items()
    }
    back = load_backbone(save(content, tmp_path / "checkpoint.pth"), which=which)
    assert differing(tensors(back), tensors(networks[which])) == []


def test_student_and_teacher_side_by_side_are_told_apart(tmp_path: Path) -> None:
    networks = {name: loaded(tiny("mlp", 0), SIZE, seed) for seed, name in enumerate(("teacher", "student"))}
    flat = {f"{k}.backbone.{n}": t for k, network in networks.items() for n, t in tensors(network).items()}
    file = save({"model": {**flat, "dino_loss.center": torch.zeros(1, 3)}}, tmp_path / "model.pth")
    assert differing(tensors(load_backbone(file, which="student")), tensors(networks["student"])) == []


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    ours = tensors(loaded(tiny("mlp", 0), SIZE))
    back = load_backbone(save({name: tensor.half() for name, tensor in ours.items()}, tmp_path / "half.pth"))
    assert {parameter.dtype for parameter in back.model.parameters()} == {torch.float32}
    torch.testing.assert_close(
        dict(back.model.named_parameters())["norm.bias"], ours["norm.bias"], rtol=1e-3, atol=1e-3
    )


def test_positions_of_another_size_keep_their_grid(tmp_path: Path) -> None:
    export(loaded(tiny("mlp", 0), 98), "official", tmp_path / "weights.pth")
    back = load_backbone(tmp_path / "weights.pth")
    assert back.image_size == 98
    assert back.model(images(42, 56)).isfinite().all()


def test_an_export_says_how_positions_are_stretched(tmp_path: Path) -> None:
    ours = loaded(tiny("mlp", 0), SIZE, interpolation="antialias")
    export_backbone(ours, tmp_path / "ours.safetensors")
    assert load_backbone(tmp_path / "ours.safetensors").model.interpolation == "antialias"
    assert load_backbone(tmp_path / "ours.safetensors", interpolation="exact").model.interpolation == "exact"


def test_a_published_model_may_be_cut_in_depth(tmp_path: Path) -> None:
    export(loaded(published("vits", 2, 0), SIZE), "official", tmp_path / "weights.pth")
    assert load_backbone(tmp_path / "weights.pth").architecture == ModelConfig(arch="vits", depth=2)


# -- what is refused --------------------------------------------------------------------------------------------------


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load_backbone(path, **options)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") < 5
    return str(caught.value)


def test_a_file_without_some_tensors_is_refused_with_their_names(tmp_path: Path) -> None:
    held = tensors(loaded(tiny("mlp", 0), SIZE))
    for name in [name for name in held if "blocks.1." in name or name == "norm.bias"]:
        del held[name]
    message = refusal(save(held, tmp_path / "partial.pth"))
    assert "missing (15): blocks.1.attn.proj.bias, blocks.1.attn.proj.weight" in message


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_an_official_file_that_lacks_its_mask_token_is_not_taken_for_timms(ffn: str, tmp_path: Path) -> None:
    held = tensors(loaded(tiny(ffn, 4), SIZE))
    del held["mask_token"]
    message = refusal(save(held, tmp_path / "partial.pth"))
    assert "missing (1): mask_token" in message
    assert "unexpected" not in message


def test_a_file_with_more_tensors_is_refused_with_their_names(tmp_path: Path) -> None:
    held = {**tensors(loaded(tiny("mlp", 0), SIZE)), "blocks.0.adapter.weight": torch.zeros(3)}
    assert "unexpected (1): blocks.0.adapter.weight" in refusal(save(held, tmp_path / "more.pth"))


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    held = tensors(loaded(tiny("mlp", 0), SIZE))
    held["blocks.2.mlp.fc1.bias"] = torch.zeros(7)
    message = refusal(save(held, tmp_path / "odd.pth"))
    assert "of another shape (1): blocks.2.mlp.fc1.bias (7,) instead of (512,)" in message


def test_another_kind_of_model_is_refused_with_some_of_its_names(tmp_path: Path) -> None:
    content = {f"layer{index}.conv.weight": torch.zeros(2) for index in range(20)}
    message = refusal(save(content, tmp_path / "resnet.pth"))
    assert "missing: cls_token, pos_embed" in message
    assert "found (20): layer0.conv.weight" in message


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ([1, 2], "a list"),
        ({"optimizer": {"lr": 0.1}, "step": 3}, r"found (2): optimizer, step"),
        ({}, "found (0)"),
        ({"teacher": {"a": 1}}, "found (1): a"),
    ],
)
def test_what_holds_no_state_dict_is_refused(content: Any, complaint: str, tmp_path: Path) -> None:
    assert complaint in refusal(save(content, tmp_path / "other.pth"))


def test_a_file_that_could_run_code_is_not_loaded(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Harmful:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    message = refusal(save({"teacher": Harmful()}, tmp_path / "harmful.pth"))
    assert "could run code" in message
    assert not ran.exists()


@pytest.mark.parametrize("content", [b"", b"no tensors at all", b"PK\x03\x04broken"])
def test_a_file_that_is_no_file_of_weights_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_bytes(content)
    refusal(tmp_path / "text.pth")


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    for name in ("weights.pth", "weights.safetensors"):
        export(loaded(tiny("mlp", 0), SIZE), "official", tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        refusal(tmp_path / name)


def test_heads_of_another_width_must_be_given(tmp_path: Path) -> None:
    model = named_model(96, 2, 3, 14, 0, "mlp", 4.0, 1e-5)
    ours = loaded(model, SIZE)
    export(ours, "official", tmp_path / "weights.pth")
    assert "import --from" in refusal(tmp_path / "weights.pth")
    back = load_backbone(tmp_path / "weights.pth", heads=3)
    assert torch.equal(back.model(images(SIZE, SIZE)), ours.model(images(SIZE, SIZE)))


def test_an_export_with_unknown_metadata_is_refused(tmp_path: Path) -> None:
    ours = loaded(tiny("mlp", 0), SIZE)
    for metadata in (
        {"model": json.dumps({"wings": 2}), "image_size": "70"},
        {"image_size": "70"},
        {"model": "{", "image_size": "70"},
        {"model": json.dumps({"arch": "vits"}), "image_size": "70", "interpolation": "nearest"},
    ):
        save_file(tensors(ours), tmp_path / "odd.safetensors", metadata={"format": "dinov2_fsdp", **metadata})
        refusal(tmp_path / "odd.safetensors")


# -- Hugging Face's and timm's folders --------------------------------------------------------------------------------


def hugging_face_folder(folder: Path, change: dict[str, Any] | None = None) -> Path:
    export(loaded(tiny("swiglu", 4), SIZE), "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **(change or {})}))
    return folder


def test_a_partial_hugging_face_folder_is_refused_with_its_own_names(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    held = load_file(folder / "model.safetensors")
    del held["encoder.layer.1.attention.attention.key.bias"], held["encoder.layer.0.mlp.weights_in.bias"]
    save_file(held, folder / "model.safetensors")
    message = refusal(folder)
    assert "missing (2): encoder.layer.0.mlp.weights_in.bias, encoder.layer.1.attention.attention.key.bias" in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "vit"}, "is a model of type vit"),
        ({"hidden_act": "relu"}, "'hidden_act': 'relu'"),
        ({"qkv_bias": False}, "'qkv_bias': False"),
        ({"layer_norm_eps": 1e-5}, "'layer_norm_eps': 1e-05"),
        ({"num_hidden_layers": 4}, "missing (18): encoder.layer.3."),
        ({"num_register_tokens": 2}, "embeddings.register_tokens (1, 4, 128) instead of (1, 2, 128)"),
        ({"image_size": [70, 70]}, "'image_size': [70, 70]"),
    ],
    ids=str,
)
def test_a_folder_of_another_model_is_refused(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path, change)
    with pytest.raises(UserError) as caught:
        load_backbone(folder)
    assert complaint in str(caught.value)


def test_tensors_in_several_files_are_read(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    expected = read_weights(folder).tensors
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(held)}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in held.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert differing(read_weights(folder).tensors, expected) == []
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "does not exist" in refusal(folder)


def test_older_folders_without_safetensors_are_read(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    expected = read_weights(folder).tensors
    save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert differing(read_weights(folder).tensors, expected) == []


def test_a_hugging_face_file_without_its_config_is_refused(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    assert "give the folder" in refusal(folder / "model.safetensors")


def test_a_folder_without_tensors_or_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    folder = hugging_face_folder(tmp_path)
    (folder / "model.safetensors").unlink()
    assert "holds neither model.safetensors" in refusal(folder)
    (folder / "model.safetensors").write_bytes(b"")
    (folder / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(folder)


def test_a_partial_timm_file_is_refused_with_its_own_names(tmp_path: Path) -> None:
    export(loaded(tiny("swiglu", 4), SIZE), "timm", tmp_path / "weights.safetensors")
    held = load_file(tmp_path / "weights.safetensors")
    del held["blocks.2.mlp.fc2.weight"], held["norm.weight"]
    save_file(held, tmp_path / "weights.safetensors")
    assert "missing (2): blocks.2.mlp.fc2.weight, norm.weight" in refusal(tmp_path / "weights.safetensors")


def test_a_timm_folder_of_another_architecture_is_refused(tmp_path: Path) -> None:
    export(loaded(tiny("mlp", 0), SIZE), "timm", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architecture": "resnet50"}))
    assert "is timm's resnet50" in refusal(tmp_path)


def test_every_tensor_shows_in_the_output() -> None:
    """What the parity tests rest on: with these weights no tensor can be wrong without being noticed."""
    for ffn, registers in TINY:
        ours = loaded(tiny(ffn, registers), SIZE)
        masks = torch.zeros(1, 25, dtype=torch.bool)
        masks[0, ::3] = True
        before = ours.model.forward_features(images(SIZE, SIZE), masks)["x_norm_patchtokens"]
        for name, parameter in ours.model.named_parameters():
            kept = parameter.clone()
            parameter.mul_(1.01)
            after = ours.model.forward_features(images(SIZE, SIZE), masks)["x_norm_patchtokens"]
            parameter.copy_(kept)
            assert (after - before).norm() / before.norm() > 2e-5, name


def test_reading_leaves_the_file_as_it_is(tmp_path: Path) -> None:
    """Tensors are mapped from the file: training what was loaded must not write into it."""
    for name in ("weights.pth", "weights.safetensors"):
        export(loaded(tiny("mlp", 0), SIZE), "official", tmp_path / name)
        before = np.fromfile(tmp_path / name, np.uint8)
        back = load_backbone(tmp_path / name)
        for parameter in back.model.parameters():
            parameter.zero_()
        assert np.array_equal(np.fromfile(tmp_path / name, np.uint8), before)


def test_a_model_without_layer_scale_is_told_by_its_tensors(tmp_path: Path) -> None:
    model = tiny("mlp", 0)
    model.layer_scale = 0.0
    export(loaded(model, SIZE), "official", tmp_path / "weights.pth")
    back = load_backbone(tmp_path / "weights.pth")
    assert back.architecture.layer_scale == 0.0
    with torch.device("meta"):
        assert tensors(back).keys() == dict(build_backbone(model, SIZE).named_parameters()).keys()


def test_a_file_of_something_else_is_called_that(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text("# Not weights\n")
    with pytest.raises(UserError, match="is no file of weights: neither safetensors nor what"):
        read_weights(file)
