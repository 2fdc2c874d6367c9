"""The public calls of a backbone: intermediate layers under timm's and under the published models' conventions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import tiny_backbone, tiny_images
from torch import Tensor

from dinov2_fsdp.models import create
from dinov2_fsdp.models.vision_transformer import VisionTransformer

DEPTH = 5


def backbone(registers: int = 0) -> VisionTransformer:
    return tiny_backbone(registers=registers, depth=DEPTH)


def by_hand(model: VisionTransformer, images: Tensor, blocks: int, masks: Tensor | None = None) -> Tensor:
    """The tokens after the first so many blocks, one after the other."""
    layout = model.layout([(len(images), *images.shape[2:])])
    tokens = model.embed(images, masks).flatten(0, 1)
    for block in list(model.blocks)[:blocks]:
        tokens = block(tokens, layout)
    return tokens.unflatten(0, (len(images), -1))


@pytest.mark.parametrize("registers", [0, 4])
def test_intermediates_are_the_patch_tokens_after_each_block(registers: int) -> None:
    model, images = backbone(registers), tiny_images(2, 8, 20)
    final, intermediates = model.forward_intermediates(images, output_fmt="NLC")
    assert len(intermediates) == DEPTH
    for number, tokens in enumerate(intermediates):
        assert torch.equal(tokens, by_hand(model, images, number + 1)[:, 1 + registers :])
    assert torch.equal(final, model.norm(by_hand(model, images, DEPTH)))


def test_the_final_tokens_are_those_of_forward_features() -> None:
    model, images = backbone(4), tiny_images(2)
    final, _ = model.forward_intermediates(images)
    features = model.forward_features(images)
    assert torch.equal(final[:, 0], features["x_norm_clstoken"])
    assert torch.equal(final[:, 5:], features["x_norm_patchtokens"])


@pytest.mark.parametrize(
    ("indices", "expected"),
    [(None, [0, 1, 2, 3, 4]), (2, [3, 4]), ([0, 3], [0, 3]), ([-1], [4]), ([3, -5], [0, 3]), (range(1, 3), [1, 2])],
)
def test_indices_are_a_number_of_last_blocks_or_blocks(indices: Any, expected: list[int]) -> None:
    model, images = backbone(), tiny_images(1)
    found = model.forward_intermediates(images, indices, output_fmt="NLC", intermediates_only=True)
    for tokens, index in zip(found, expected, strict=True):
        assert torch.equal(tokens, by_hand(model, images, index + 1)[:, 1:])


@pytest.mark.parametrize("indices", [0, 6, [5], [-6], []])
def test_a_block_that_is_not_there_is_refused(indices: Any) -> None:
    with pytest.raises(ValueError, match="this backbone has 5"):
        backbone().forward_intermediates(tiny_images(1), indices)


def test_maps_have_the_images_rows_and_columns() -> None:
    model, images = backbone(4), tiny_images(2, 8, 20)
    (tokens,) = model.forward_intermediates(images, 1, output_fmt="NLC", intermediates_only=True)
    (maps,) = model.forward_intermediates(images, 1, output_fmt="NCHW", intermediates_only=True)
    assert maps.shape == (2, 24, 2, 5)
    assert torch.equal(maps[:, :, 1, 3], tokens[:, 5 + 3])


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="'NHWC' is neither NCHW nor NLC"):
        backbone().forward_intermediates(tiny_images(1), output_fmt="NHWC")


def test_norm_is_the_final_norm() -> None:
    model, images = backbone(), tiny_images(1)
    kept = {"output_fmt": "NLC", "intermediates_only": True}
    (plain,) = model.forward_intermediates(images, [1], **kept)
    (normalised,) = model.forward_intermediates(images, [1], norm=True, **kept)
    torch.testing.assert_close(normalised, model.norm(plain))


def test_prefix_tokens_come_beside_the_patches() -> None:
    model, images = backbone(4), tiny_images(2)
    ((patches, prefix),) = model.forward_intermediates(
        images, 1, output_fmt="NLC", return_prefix_tokens=True, intermediates_only=True
    )
    assert (patches.shape, prefix.shape) == ((2, 16, 24), (2, 5, 24))
    assert torch.equal(torch.cat([prefix, patches], dim=1), by_hand(model, images, DEPTH))


def test_blocks_above_the_last_one_asked_for_do_not_run() -> None:
    model = backbone()
    ran: list[int] = []
    for index, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    model.forward_intermediates(tiny_images(1), [1], intermediates_only=True)
    assert ran == [0, 1]


def test_masked_patches_are_masked_in_the_intermediates() -> None:
    model, images = backbone(), tiny_images(1)
    masks = torch.zeros(1, 16, dtype=torch.bool)
    masks[0, 3] = True
    _, found = model.forward_intermediates(images, output_fmt="NLC", masks=masks)
    assert torch.equal(found[2], by_hand(model, images, 3, masks)[:, 1:])
    assert not torch.equal(found[2], by_hand(model, images, 3)[:, 1:])


@pytest.mark.parametrize("registers", [0, 4])
def test_intermediate_layers_are_normalised_patch_tokens_by_default(registers: int) -> None:
    model, images = backbone(registers), tiny_images(2, 8, 20)
    layers = model.get_intermediate_layers(images, n=2)
    assert len(layers) == 2
    for layer, blocks in zip(layers, (4, 5), strict=True):
        torch.testing.assert_close(layer, model.norm(by_hand(model, images, blocks))[:, 1 + registers :])


def test_intermediate_layers_come_with_their_class_tokens_and_as_maps() -> None:
    model, images = backbone(4), tiny_images(2, 8, 20)
    pairs = model.get_intermediate_layers(images, n=[0, 4], reshape=True, return_class_token=True, norm=False)
    for (maps, class_token), blocks in zip(pairs, (1, 5), strict=True):
        tokens = by_hand(model, images, blocks)
        assert torch.equal(class_token, tokens[:, 0])
        assert torch.equal(maps, tokens[:, 5:].transpose(1, 2).reshape(2, 24, 2, 5))


def test_an_unknown_interpolation_is_refused() -> None:
    with pytest.raises(ValueError, match="'nearest' is none of offset, exact, antialias"):
        VisionTransformer(16, 4, 24, 1, 3, interpolation="nearest")


def test_a_model_made_by_name_has_registers_and_the_published_interpolation() -> None:
    plain, registers = create("vits14", image_size=28), create("vits14", registers=4, image_size=28)
    assert (plain.num_register_tokens, plain.interpolation) == (0, "offset")
    assert (registers.num_register_tokens, registers.interpolation) == (4, "antialias")
