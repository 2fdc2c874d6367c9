"""What the benchmarks count."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import data_path
import step_profile
from peer_step import settings
from products import CompiledAttention, Operand, Product, record_step, seconds_of
from step_profile import kind_of, profile_step

from dinov2_fsdp import native
from dinov2_fsdp.config import Config, load
from dinov2_fsdp.counts import step_flops_per_image
from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.models import frugal, products


def small(**changes: Any) -> Config:
    """One microbatch of a small model, every image of which has masked patches."""
    settled = {
        "model__dim": 96, "model__drop_path": 0.0, "parallel__device": "cpu", "parallel__threads": 1,
        "masks__probability": 1.0, "masks__ratio": [0.5, 0.5], "data__train": "scenes:n=8", "train__batch": 8,
        "train__microbatch": 8,
    }  # fmt: skip
    return tiny_config(**{**settled, **changes})


@pytest.mark.parametrize(("ffn", "dropped"), [("mlp", 0.0), ("mlp", 0.5), ("swiglu", 0.0), ("swiglu", 0.5)])
def test_the_recorded_products_of_a_step_are_those_of_the_formula(ffn: str, dropped: float) -> None:
    config = small(model__ffn=ffn, model__drop_path=dropped)
    recorded, _ = record_step(config)
    counted = sum(product.flops * count for product, count in recorded.all.items())
    assert recorded.others == {}, "operations that are not counted"
    assert counted / recorded.images == pytest.approx(step_flops_per_image(config), rel=0.03)


def test_a_product_is_repeated_on_operands_that_lie_alike() -> None:
    product = Product(Operand((4, 3), (1, 4)), Operand((3, 5), (5, 1)), torch.float32)
    left, right = product.operands(torch.device("cpu"))
    assert (left.stride(), right.stride(), product.flops) == ((1, 4), (5, 1), 2 * 4 * 3 * 5)


@pytest.mark.slow
def test_a_step_of_many_parts_records_its_products_as_the_formula_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frugal, "CACHED_ROWS", 8)
    monkeypatch.setattr(products, "processor_maker", lambda: "AuthenticAMD")
    config = small()
    recorded = record_step(config)[0].all
    counted = sum(product.flops * count for product, count in recorded.items())
    assert counted / config.train.microbatch == pytest.approx(step_flops_per_image(config), rel=0.03)
    packed = [product for product in recorded if isinstance(product, Product) and product.right.packed]
    assert bool(packed) == (torch.backends.cpu.get_cpu_capability() == "AVX512")
    own = [product for product in recorded if isinstance(product, CompiledAttention)]
    library = native.parallel_library()
    assert {product.backward for product in own} == ({True, False} if library and library.has_branches else set())
    assert all(0 < seconds_of(product, torch.device("cpu")) < 1 for product in packed[:2] + own[:2])


@pytest.mark.parametrize("batch", [(), (2,)], ids=["matrices", "batches of them"])
def test_a_product_takes_time(batch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("products.LEAST", 1e-4)
    ones = (1,) * len(batch)
    product = Product(Operand((*batch, 4, 3), (*ones, 1, 4)), Operand((*batch, 3, 5), (*ones, 5, 1)), torch.float32)
    assert 0 < seconds_of(product, torch.device("cpu")) < 1


def test_a_step_never_waits_for_its_device() -> None:
    """On a GPU each of these would hold the host up until all work before it is done."""
    kinds, waits, _ = profile_step(small(model__drop_path=0.4), None)
    assert kinds["matrix products"] > 0
    assert waits == {}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("ampere_bf16_gemm", "matrix products"),
        ("fmha_cutlassF_bf16_aligned_64x64", "attention"),
        ("cutlass::device_kernel<flash::FlashAttnFwd>", "attention"),
        ("ncclDevKernel_AllGather", "communication"),
        ("aten::_softmax", "softmax, losses"),
        ("aten::add_", "additions, products, fills"),
        ("aten::copy_", "copies, casts"),
        ("aten::native_layer_norm", "norms"),
        ("autograd::engine", "everything else"),
        ("_AttentionBranchBackward", "Python of our own branches"),
        ("_Z19fmha_cutlass_forwardPf", "attention"),
    ],
)
def test_operations_and_kernels_are_known_by_their_names(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def test_profiles_are_drawn(tmp_path: Path) -> None:
    stages = {name: float(number) for number, name in enumerate((*data_path.STAGES, "whole"), 1)}
    data_path.draw({"reference": stages, "fast": {**stages, "whole": 60.0}}, {"peer": 9.0}, 20, f"{tmp_path}/data.png")
    step_profile.draw(Counter({"matrix products": 80.0, "norms": 3.0}), "a step", f"{tmp_path}/step.png")
    for name in ("data", "step"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 20


def test_the_data_path_is_timed_with_its_colours_here_and_there() -> None:
    config = small(train__batch=2, train__microbatch=2, loss__koleo=0)
    source = open_source(config.data.train)
    found = data_path.measure(config, source, 4, 2, 1)
    assert list(found) == ["reference", "fast", "colours=device"]
    assert all(times["whole"] > 0 for times in found.values())
    assert (found["colours=device"]["colour, flip"], found["colours=device"]["blur"]) == (0, 0)
    assert data_path.measure_device(config, source, torch.device("cpu"), 4, 2, 1) > 0
    assert {row.count("|") for row in data_path.table(found, {"peer": 9.0}).splitlines()} == {6}


def test_a_peer_gets_the_work_of_the_config(tmp_path: Path) -> None:
    config = load("configs/bench.yaml", ["train.precision=bf16", "model.drop_path=0.4"])
    call = settings(config, tmp_path, 5)
    assert call["batch_size"] == 8
    assert call["precision"] == "bf16-mixed"
    assert call["model_args"] == {"drop_path_rate": 0.4}
    assert call["method_args"]["output_dim"] == 4096
    assert call["transform_args"]["local_view"] == {"num_views": 8, "view_size": (98, 98)}
    with pytest.raises(SystemExit, match="ViT-S/14"):
        settings(load("configs/bench.yaml", ["model.patch=16", "crops.local_size=96"]), tmp_path, 5)
