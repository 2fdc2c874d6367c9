from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_backbone, tiny_images
from torch import Tensor

from dinov2_fsdp.config import ModelConfig
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.attention import attend, resolve_backend
from dinov2_fsdp.models.factory import build_backbone, create
from dinov2_fsdp.models.frugal import activate
from dinov2_fsdp.models.layout import Layout
from dinov2_fsdp.models.plain_attention import attend_plainly
from dinov2_fsdp.models.stochastic_depth import draw_plan
from dinov2_fsdp.models.vision_transformer import PatchEmbed, interpolation_matrix

CPU_BACKENDS = ["math", "sdpa"]
VARIANTS = [("mlp", 0), ("mlp", 4), ("swiglu", 0), ("swiglu", 4)]


# -- packing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(("ffn", "registers"), VARIANTS)
def test_packed_crops_equal_crops_one_at_a_time(ffn: str, registers: int, backend: str) -> None:
    model = tiny_backbone(ffn, registers).double()
    model.set_attention_backend(backend)
    large, small = tiny_images(3).double(), tiny_images(4, 8, 8, seed=1).double()
    masks = torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.4
    packed, layout = model.forward_packed([large, small], [masks, None])
    groups = layout.split(packed)
    for number in range(3):
        alone, _ = model.forward_packed([large[number : number + 1]], [masks[number : number + 1]])
        torch.testing.assert_close(groups[0][number], alone, rtol=1e-10, atol=1e-10)
    for number in range(4):
        alone, _ = model.forward_packed([small[number : number + 1]], [None])
        torch.testing.assert_close(groups[1][number], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("group", [0, 1])
@pytest.mark.parametrize(("ffn", "registers"), VARIANTS)
def test_no_sequence_sees_another(ffn: str, registers: int, group: int, backend: str) -> None:
    model, crops = tiny_backbone(ffn, registers), [tiny_images(3), tiny_images(4, 8, 8, seed=1)]
    model.set_attention_backend(backend)
    plan = draw_plan(model.layout([(3, 16, 16), (4, 8, 8)]), 2, 0.4, np.random.default_rng(0))

    def features() -> list[Tensor]:
        packed, layout = model.forward_packed(crops, [None, None], plan)
        return layout.split(packed)

    before = features()
    crops[group][1] += 1.0
    after = features()
    for number, (old, new) in enumerate(zip(before, after, strict=True)):
        for row in range(len(old)):
            assert torch.equal(old[row], new[row]) == (not (number == group and row == 1))


def test_no_sequence_sends_gradients_to_another() -> None:
    model = tiny_backbone()
    large, small = tiny_images(3).requires_grad_(), tiny_images(4, 8, 8).requires_grad_()
    packed, layout = model.forward_packed([large, small], [None, None])
    layout.split(packed)[1][2].square().sum().backward()
    assert large.grad is not None
    assert small.grad is not None
    touched = [*large.grad.flatten(1).any(dim=1).tolist(), *small.grad.flatten(1).any(dim=1).tolist()]
    assert touched == [False] * 5 + [True] + [False]


def test_the_backbone_equals_a_transformer_written_out() -> None:
    """Pre-norm transformer of arXiv 2010.11929 (equations 1–4) with LayerScale, in float64 and loops over heads."""
    model, images = tiny_backbone().double(), tiny_images(2).double()
    p = {name: value.detach() for name, value in model.named_parameters()}
    patches = F.conv2d(images, p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], stride=4).flatten(2).mT
    x = torch.cat([p["cls_token"].expand(2, -1, -1), patches], dim=1) + p["pos_embed"].float()

    def norm(x: Tensor, name: str) -> Tensor:
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True, unbiased=False)
        return (x - mean) / (variance + 1e-6).sqrt() * p[f"{name}.weight"] + p[f"{name}.bias"]

    for block in ("blocks.0", "blocks.1"):
        q, k, v = (norm(x, f"{block}.norm1") @ p[f"{block}.attn.qkv.weight"].T + p[f"{block}.attn.qkv.bias"]).split(
            24, -1
        )
        heads = []
        for head in range(3):
            part = slice(8 * head, 8 * head + 8)
            heads.append((q[..., part] @ k[..., part].mT / math.sqrt(8)).softmax(dim=-1) @ v[..., part])
        attended = torch.cat(heads, dim=-1) @ p[f"{block}.attn.proj.weight"].T + p[f"{block}.attn.proj.bias"]
        x = x + attended * p[f"{block}.ls1.gamma"]
        hidden = norm(x, f"{block}.norm2") @ p[f"{block}.mlp.fc1.weight"].T + p[f"{block}.mlp.fc1.bias"]
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
        x = x + (hidden @ p[f"{block}.mlp.fc2.weight"].T + p[f"{block}.mlp.fc2.bias"]) * p[f"{block}.ls2.gamma"]
    torch.testing.assert_close(model(images), norm(x, "norm")[:, 0], rtol=1e-8, atol=1e-8)


def test_plain_attention_has_the_gradients_of_finite_differences() -> None:
    layout = Layout(((2, 3), (1, 2)))
    qkv = torch.randn(8, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: attend_plainly(x, layout), qkv)


def test_plain_attention_gives_the_same_with_and_without_gradients() -> None:
    layout = Layout(((2, 7), (3, 2)))
    qkv = torch.randn(20, 3, 2, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.equal(attend_plainly(qkv, layout), attend_plainly(qkv.detach(), layout))


def test_plain_attention_leaves_its_input_as_it_was() -> None:
    qkv = torch.randn(1, 3, 2, 4)
    before = qkv.clone()
    attend_plainly(qkv, Layout(((1, 1),)))
    assert torch.equal(qkv, before)


def test_plain_attention_computes_in_what_it_is_given_under_autocast_too() -> None:
    qkv = torch.randn(6, 3, 2, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attend_plainly(qkv, Layout(((2, 3),)))
    assert out.dtype == torch.float32


@pytest.mark.parametrize("longest", [512, 3])
@pytest.mark.parametrize("at_a_time", [2**20, 1], ids=["all at once", "one sequence at a time"])
def test_the_backends_of_a_cpu_agree(longest: int, at_a_time: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinov2_fsdp.models.attention.MATH_LONGEST", longest)
    monkeypatch.setattr("dinov2_fsdp.models.plain_attention.CACHED", at_a_time)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    layout, gradients = Layout(((2, 7), (3, 2))), []
    for backend in CPU_BACKENDS:
        qkv = torch.randn(20, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        out = attend(qkv, layout, backend)
        out.square().sum().backward()
        assert qkv.grad is not None
        gradients.append(torch.cat([out.flatten(), qkv.grad.flatten()]))
    torch.testing.assert_close(*gradients)


def test_a_backend_that_needs_cuda_is_refused_on_a_cpu() -> None:
    assert resolve_backend("auto", torch.device("cpu")) == "math"
    with pytest.raises(UserError, match=r"parallel.attention=xformers runs on CUDA only; use .* on cpu"):
        resolve_backend("xformers", torch.device("cpu"))


def test_swiglu_gates_with_silu() -> None:
    model = tiny_backbone("swiglu").double()
    block: Any = model.blocks[0]
    mlp = block.mlp
    x = tiny_images(1).double().flatten()[: 5 * 24].reshape(5, 24)
    gate, value = (x @ mlp.w12.weight.T + mlp.w12.bias).split(64, dim=-1)  # 2/3 · 96
    expected = (gate / (1 + (-gate).exp()) * value) @ mlp.w3.weight.T + mlp.w3.bias
    torch.testing.assert_close(mlp.w3(activate(mlp.w12(x), mlp.activation)), expected)


# -- embedding --------------------------------------------------------------------------------------------------------


def test_the_mask_token_replaces_patches_before_their_position_is_added() -> None:
    model, masks = tiny_backbone(), torch.zeros(2, 16, dtype=torch.bool)
    masks[0, [1, 7]] = True
    plain, masked = model.embed(tiny_images(2)), model.embed(tiny_images(2), masks)
    assert torch.equal(masked[0, [2, 8]], (model.mask_token + model.pos_embed[0, [2, 8]]))
    untouched = torch.ones(2, 17, dtype=torch.bool)
    untouched[0, [2, 8]] = False
    assert torch.equal(masked[untouched], plain[untouched])


def test_registers_stand_behind_the_class_token_and_carry_no_position() -> None:
    model = tiny_backbone(registers=4)
    tokens = model.embed(tiny_images(2))
    assert tokens.shape == (2, 1 + 4 + 16, 24)
    assert model.register_tokens is not None
    assert torch.equal(tokens[1, 1:5], model.register_tokens[0])
    assert torch.equal(tokens[1, 0], (model.cls_token[0, 0] + model.pos_embed[0, 0]))
    patches = model.patch_embed(tiny_images(2))
    assert torch.equal(tokens[:, 5:], patches + model.pos_embed[:, 1:])


@pytest.mark.parametrize("size", [(16, 16), (8, 20)])
def test_patch_embedding_equals_a_convolution(size: tuple[int, int]) -> None:
    embed = PatchEmbed(4, 24).double()
    images = tiny_images(2, *size).double()
    expected = F.conv2d(images, embed.proj.weight, embed.proj.bias, stride=4).flatten(2).transpose(1, 2)
    torch.testing.assert_close(embed(images), expected)


def test_an_image_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="16×18 is not divisible into patches of 4"):
        tiny_backbone()(tiny_images(1, 16, 18))


@pytest.mark.parametrize("grid", [(2, 2), (2, 5), (7, 3), (9, 9), (4, 5)])
@pytest.mark.parametrize("registers", [0, 4])
def test_positions_are_interpolated_as_in_the_published_models(registers: int, grid: tuple[int, int]) -> None:
    model = tiny_backbone(registers=registers)
    stored = model.pos_embed.detach()[:, 1:].reshape(1, 4, 4, 24).permute(0, 3, 1, 2)
    if registers:
        expected = F.interpolate(stored, size=grid, mode="bicubic", antialias=True)
    else:
        factors = ((grid[0] + 0.1) / 4, (grid[1] + 0.1) / 4)
        expected = F.interpolate(stored, scale_factor=factors, mode="bicubic", antialias=False)
    embedding = model.position_embedding(*grid)
    torch.testing.assert_close(embedding[:, 1:], expected.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    assert torch.equal(embedding[:, :1], model.pos_embed[:, :1])


@pytest.mark.parametrize("registers", [0, 4])
def test_positions_of_the_native_grid_are_those_stored(registers: int) -> None:
    model = tiny_backbone(registers=registers)
    assert torch.equal(model.position_embedding(4, 4), model.pos_embed)


def test_interpolated_positions_learn() -> None:
    model = tiny_backbone()
    model(tiny_images(1, 8, 8)).sum().backward()
    assert model.pos_embed.grad is not None
    assert model.pos_embed.grad[:, 1:].abs().sum() > 0


def test_a_model_that_was_evaluated_in_inference_mode_can_still_be_trained() -> None:
    interpolation_matrix.cache_clear()
    model = tiny_backbone()
    with torch.inference_mode():
        model(tiny_images(1, 8, 12))
    model(tiny_images(1, 8, 12)).sum().backward()
    assert model.pos_embed.grad is not None


def test_features_of_an_image_that_is_not_square() -> None:
    features = tiny_backbone(registers=4).forward_features(tiny_images(2, 8, 20))
    shapes = {name: tuple(value.shape) for name, value in features.items()}
    assert shapes == {
        "x_norm_clstoken": (2, 24),
        "x_norm_regtokens": (2, 4, 24),
        "x_norm_patchtokens": (2, 10, 24),
        "x_prenorm": (2, 15, 24),
    }


def test_patch_tokens_lie_row_by_row() -> None:
    model, images = tiny_backbone(depth=0), tiny_images(1, 8, 20)
    before = model.forward_features(images)["x_norm_patchtokens"]
    images[:, :, 4:8, 8:12] += 1.0  # second row, third column of patches
    after = model.forward_features(images)["x_norm_patchtokens"]
    assert (before != after).any(dim=-1)[0].nonzero().flatten().tolist() == [5 + 2]


def test_the_attention_map_is_the_softmax_of_queries_times_keys() -> None:
    model = tiny_backbone().double()
    block: Any = model.blocks[0]
    attention, tokens = block.attn, torch.randn(2, 5, 24, dtype=torch.float64)
    q, k, v = (tokens @ attention.qkv.weight.T + attention.qkv.bias).split(24, dim=-1)
    weights = attention.attention_map(tokens)
    for head in range(3):
        part = slice(8 * head, 8 * head + 8)
        expected = (q[..., part] @ k[..., part].mT / math.sqrt(8)).softmax(dim=-1)
        torch.testing.assert_close(weights[:, head], expected)
    mixed = torch.cat([weights[:, h] @ v[..., 8 * h : 8 * h + 8] for h in range(3)], dim=-1)
    out = attention.attend(attention.qkv(tokens.flatten(0, 1)), Layout(((2, 5),)))
    torch.testing.assert_close(out, mixed.flatten(0, 1))


# -- sizes and names --------------------------------------------------------------------------------------------------

# dim, depth, and millions of parameters that the published models' card gives (patch 14, 518 pixels)
PUBLISHED = {"vits": (384, 12, 22.1), "vitb": (768, 12, 86.6), "vitl": (1024, 24, 304.4), "vitg": (1536, 40, 1136.5)}


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("arch", PUBLISHED)
def test_published_models_have_their_number_of_parameters(arch: str, registers: int) -> None:
    dim, depth, millions = PUBLISHED[arch]
    with torch.device("meta"):
        model = build_backbone(ModelConfig(arch=arch, registers=registers), 518)
    found = sum(parameter.numel() for parameter in model.parameters())
    if arch == "vitg":
        ffn = (dim * 2 * 4096 + 2 * 4096) + (4096 * dim + dim)
    else:
        ffn = (dim * 4 * dim + 4 * dim) + (4 * dim * dim + dim)
    attention = (dim * 3 * dim + 3 * dim) + (dim * dim + dim)
    block = attention + ffn + 2 * 2 * dim + 2 * dim  # two norms, two LayerScales
    patch_embed = 3 * 14 * 14 * dim + dim
    tokens = dim * (1 + (1 + 37 * 37) + registers + 1)  # class, positions, registers, mask
    assert found == depth * block + patch_embed + tokens + 2 * dim
    assert found / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.parametrize(("ffn", "registers"), VARIANTS)
def test_parameters_have_the_published_names(ffn: str, registers: int) -> None:
    block = [
        "norm1",
        "attn.qkv",
        "attn.proj",
        "norm2",
        *(["mlp.fc1", "mlp.fc2"] if ffn == "mlp" else ["mlp.w12", "mlp.w3"]),
    ]
    expected = {"cls_token", "pos_embed", "mask_token", "norm.weight", "norm.bias"}
    expected |= {"patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {"register_tokens"} if registers else set()
    for index in range(2):
        expected |= {f"blocks.{index}.{name}.{kind}" for name in block for kind in ("weight", "bias")}
        expected |= {f"blocks.{index}.ls1.gamma", f"blocks.{index}.ls2.gamma"}
    assert tiny_backbone(ffn, registers).state_dict().keys() == expected


def test_without_layer_scale_there_is_none() -> None:
    assert not [name for name in tiny_backbone(layer_scale=0.0).state_dict() if "gamma" in name]


@pytest.mark.parametrize(("name", "suggestion"), [("vitsl14", "vits14"), ("vith14", "vit"), ("vit_b14", "vitb14")])
def test_an_unknown_model_is_named_with_the_nearest(name: str, suggestion: str) -> None:
    with pytest.raises(UserError, match=f"unknown model '{name}'; did you mean '{suggestion}") as error:
        create(name)
    assert "vitg14" in str(error.value)


def test_a_model_made_by_name_is_initialised() -> None:
    model = create("vits16", registers=4, image_size=32)
    assert (model.patch_size, model.embed_dim, model.num_register_tokens, len(model.blocks)) == (16, 384, 4, 12)
    assert model(tiny_images(2, 32, 48)).isfinite().all()
