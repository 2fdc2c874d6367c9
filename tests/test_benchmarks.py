"""What the benchmarks count."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from products import Operand, Product, record_step

from dinov2_fsdp.counts import step_flops_per_image


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_the_recorded_products_of_a_step_are_those_of_the_formula(ffn: str) -> None:
    config = tiny_config(
        model__ffn=ffn, model__dim=96, model__drop_path=0.0, parallel__device="cpu", parallel__threads=1,
        masks__probability=1.0, masks__ratio=[0.5, 0.5], data__train="scenes:n=8", train__batch=8, train__microbatch=8,
    )  # fmt: skip
    recorded, _ = record_step(config)
    counted = sum(product.flops * count for product, count in recorded.all.items())
    assert recorded.others == {}, "operations that are not counted"
    assert counted / recorded.images == pytest.approx(step_flops_per_image(config), rel=0.03)


def test_a_product_is_repeated_on_operands_that_lie_alike() -> None:
    product = Product(Operand((4, 3), (1, 4)), Operand((3, 5), (5, 1)), torch.float32)
    left, right = product.operands(torch.device("cpu"))
    assert (left.stride(), right.stride(), product.flops) == ((1, 4), (5, 1), 2 * 4 * 3 * 5)
