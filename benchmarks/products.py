"""The limit of a training step: its matrix products, counted as they happen, and timed one by one.

    python benchmarks/products.py --config configs/bench.yaml [key=value …]

One step of the config runs on one process while every matrix product is recorded: type, shape, strides. Each distinct
product is then repeated by itself on operands laid out alike. A step cannot be faster than their sum; how near it comes
is the fraction that ``benchmarks/step.py`` reports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.attention import parse
from dinov2_fsdp.config import Config, load
from dinov2_fsdp.data.batch import Microbatch
from dinov2_fsdp.data.loader import build_loader
from dinov2_fsdp.data.sources import open_source
from dinov2_fsdp.errors import run_cli
from dinov2_fsdp.models import branches
from dinov2_fsdp.models.fused import BY_FP32, attention, attention_backward, multiplied
from dinov2_fsdp.models.initialise import initialise
from dinov2_fsdp.models.products import LEAST_PARTS, bmm, by_onednn, linear, packed, widens
from dinov2_fsdp.parallel.place import place_from_environment
from dinov2_fsdp.parallel.sharding import build_networks
from dinov2_fsdp.parallel.world import end_world, start_world
from dinov2_fsdp.ssl.ema import Ema
from dinov2_fsdp.ssl.step import SelfDistillation

LEAST = 0.05
"""Seconds that one product is repeated for, at least, in every round."""


@dataclass(frozen=True)
class Operand:
    """A matrix, or a batch of them, as it lay in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    packed: bool = False
    """Laid out by oneDNN, from a matrix of these strides."""


@dataclass(frozen=True)
class Product:
    """One matrix product, ``left @ right``."""

    left: Operand
    right: Operand
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        """Two for every multiplication with its addition."""
        return 2 * prod(self.left.shape) * self.right.shape[-1]

    def operands(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return random operands of these shapes and strides."""
        made = []
        for operand in (self.left, self.right):
            tensor = torch.empty_strided(operand.shape, operand.strides, dtype=self.dtype, device=device)
            made.append(tensor.copy_(torch.randn(operand.shape, device=device)))
        return made[0], made[1]


@dataclass(frozen=True)
class CompiledAttention:
    """The products of this project's own attention, of which a library would do one after the other."""

    sequences: int
    length: int
    heads: int
    dim: int
    backward: bool
    how: int

    @property
    def dtype(self) -> torch.dtype:
        """In which it multiplies."""
        return multiplied(self.how)

    @property
    def flops(self) -> int:
        """Two products forward, four backward."""
        return sum(product.flops for product in self.products)

    @property
    def products(self) -> list[Product]:
        """The single products."""
        batch, length, dim = self.sequences * self.heads, self.length, self.dim

        def lies(*shape: int) -> Operand:
            return Operand(shape, (shape[1] * shape[2], shape[2], 1))

        narrow, turned, square = lies(batch, length, dim), lies(batch, dim, length), lies(batch, length, length)
        scores, values = Product(narrow, turned, self.dtype), Product(square, narrow, self.dtype)
        across = Product(turned, square, self.dtype)
        return [scores, values, across, across] if self.backward else [scores, values]

    def seconds(self, device: torch.device) -> float:
        """Return the better of what libraries take, and what the operation takes, with its softmax."""
        kept = torch.float32 if self.how == BY_FP32 else torch.bfloat16
        packed = torch.randn(self.sequences * self.length, 3, self.heads, self.dim).to(kept)
        out, of_packed = (
            packed.new_empty(len(packed), self.heads * self.dim),
            torch.empty_like(packed, dtype=self.dtype),
        )
        attention(packed, self.sequences, self.how, out)
        grad = out.to(self.dtype)
        run: Callable[[], object] = (
            (lambda: attention_backward(grad, packed, self.sequences, self.how, of_packed))
            if self.backward
            else (lambda: attention(packed, self.sequences, self.how, out))
        )
        return min(_repeated(run, device), sum(seconds_of(product, device) for product in self.products))


@dataclass(frozen=True)
class ReadAttention:
    """The products of the attention of some queries: ragged, so that libraries would be called for every sequence."""

    starts: tuple[int, ...]
    length: int
    heads: int
    dim: int
    backward: bool
    how: int

    @property
    def dtype(self) -> torch.dtype:
        """In which it multiplies."""
        return multiplied(self.how)

    @property
    def flops(self) -> int:
        """Two products forward, four backward."""
        return (8 if self.backward else 4) * self.starts[-1] * self.length * self.heads * self.dim

    def seconds(self, device: torch.device) -> float:
        """Return what the operation takes, with its softmax."""
        kept = torch.float32 if self.how == BY_FP32 else torch.bfloat16
        starts, width = torch.tensor(self.starts, device=device), self.heads * self.dim
        query, keys = torch.randn(self.starts[-1], width), torch.randn((len(starts) - 1) * self.length, 2 * width)
        given = (query.to(kept), keys.to(kept), starts, self.heads, self.how, self.starts[-1] * self.length)
        grad, of_query, of_keys = query.to(self.dtype), query.to(self.dtype), keys.to(self.dtype)
        operations = torch.ops.dinov2_fsdp
        if self.backward:
            return _repeated(lambda: operations.attention_of_backward(grad, *given, of_query, of_keys), device)
        return _repeated(lambda: operations.attention_of(*given, query.to(kept)), device)


Counted = Product | CompiledAttention | ReadAttention


def of_branch(func: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Product]:
    """Return the products of an operation of :mod:`dinov2_fsdp.models.branch_operations`, as libraries would be given
    them: of the rows that are multiplied, which stochastic depth chooses."""
    schema = func._schema
    given = dict(zip((argument.name for argument in schema.arguments), arguments, strict=False)) | keywords
    backward = schema.name.endswith("backward")
    tokens, chosen = given.get("taken", given.get("tokens")), given.get("rows")
    rows = len(tokens if chosen is None else chosen)
    dtype = torch.float32 if widens(tokens) else tokens.dtype

    def of(weight: Tensor) -> list[Product]:
        out, inner = weight.shape
        left, grad = Operand((rows, inner), (inner, 1)), Operand((rows, out), (out, 1))
        if not backward:
            return [Product(left, Operand((inner, out), (1, inner), packed=True), dtype)]
        of_weight = Product(Operand((out, rows), (1, out)), left, dtype)
        return [Product(grad, Operand((out, inner), (inner, 1)), dtype), of_weight]

    return [product for name, weight in given.items() if name.startswith("weight") for product in of(weight)]


MATRICES = {"mm": (0, 1), "addmm": (1, 2), "addmm_": (1, 2), "bmm": (0, 1), "_linear_pointwise": (0, 1)}
"""Which arguments of each operation are the matrices."""


class ProductRecorder(TorchDispatchMode):
    """Counts the matrix products that happen while it is active, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Counted] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if places := MATRICES.get(func.overloadpacket.__name__):
            left, right = (args[place] for place in places)
            if func.overloadpacket.__name__ != "_linear_pointwise":
                second = _operand(right)
            elif right.is_mkldnn:
                second = Operand((right.shape[1], right.shape[0]), (1, right.shape[1]), packed=True)
            else:
                second = _operand(right.t())
            if left.numel() and right.numel():
                self.products[Product(_operand(left), second, left.dtype)] += 1
        elif func.namespace == "dinov2_fsdp":
            name = func.overloadpacket.__name__
            if name in ("attention", "attention_backward"):
                backward = name == "attention_backward"
                qkv, sequences, how = args[1:4] if backward else args[:3]
                length, _, heads, dim = len(qkv) // sequences, *qkv.shape[1:]
                self.products[CompiledAttention(sequences, length, heads, dim, backward, how)] += 1
            elif name in ("attention_of", "attention_of_backward"):
                backward = name == "attention_of_backward"
                query, keys, starts, heads, how = args[1:6] if backward else args[:5]
                length, dim = len(keys) // (len(starts) - 1), query.shape[1] // heads
                self.products[ReadAttention(tuple(starts.tolist()), length, heads, dim, backward, how)] += 1
            else:
                self.products.update(of_branch(func, args, kwargs or {}))
        elif func.overloadpacket.__name__ == "convolution" and (batch := _batch_of(*args)):
            self.products[batch] += 1
        elif func.overloadpacket.__name__ in ("baddbmm", "convolution", "convolution_backward") or (
            "attention" in func.overloadpacket.__name__
        ):
            self.others[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def _operand(tensor: Tensor) -> Operand:
    return Operand(tuple(tensor.shape), tuple(tensor.stride()))


def _batch_of(image: Tensor, weight: Tensor, *options: Any) -> Product | None:
    """Return the batch of products that a convolution by one pixel is, see :func:`dinov2_fsdp.models.products.bmm`."""
    groups, (rows, inner) = options[-1], weight.shape[:2]
    if image.dim() != 3 or len(image) != 1 or weight.shape[2] != 1 or rows % groups:
        return None
    left, right = (groups, rows // groups, inner), (groups, inner, image.shape[2])
    return Product(*(Operand(shape, (shape[1] * shape[2], shape[2], 1)) for shape in (left, right)), image.dtype)


@dataclass
class Recorded:
    """The products of a step of ``images`` images: of all of it, and of the student alone (forward and backward)."""

    images: int
    all: Counter[Counted]
    student: Counter[Counted]
    others: Counter[str]


@contextlib.contextmanager
def prepared(config: Config) -> Iterator[tuple[SelfDistillation, Microbatch]]:
    """Give the method of a config with its networks, and its first microbatch, on one process.

    Raises:
        UserError: what the config asks for cannot be had here.
    """
    world = start_world(config.parallel, place_from_environment())
    try:
        student, teacher = build_networks(config, world)
        initialise(student, config.seed, config.model.layer_scale)
        Ema(student, teacher).copy()
        student.train()
        teacher.eval()
        source = open_source(config.data.train, config.data.cache)
        batch = next(build_loader(config, source, 0, 1, 0, 1, False)).to(world.device).coloured()
        yield SelfDistillation(config, student, teacher, world.device), batch
    finally:
        end_world()


def record_step(config: Config) -> tuple[Recorded, torch.device]:
    """Run one step on one process and return its products.

    Raises:
        UserError: what the config asks for cannot be had here.
    """
    with prepared(config) as (method, batch):
        with ProductRecorder() as of_teacher:
            (targets,) = method.targets([batch], config.loss.teacher_temperature)
        with ProductRecorder() as of_student:
            loss, _ = method.loss(batch, targets)
            loss.backward()
        both, others = of_teacher.products + of_student.products, of_teacher.others + of_student.others
        return Recorded(batch.images, both, of_student.products, others), batch.global_crops.device


def seconds_of(product: Counted, device: torch.device) -> float:
    """Return how long the product takes by itself, seconds, by the faster of the ways that the model may take."""
    if isinstance(product, CompiledAttention | ReadAttention):
        return product.seconds(device)
    left, right = product.operands(device)
    multiply: Callable[..., Tensor] = torch.bmm if left.dim() == 3 else torch.mm
    # Into the same memory every time: what it costs to obtain new memory is the step's, not the product's. oneDNN can
    # not be told where to.
    out = multiply(left, right)
    ways: list[Callable[[], object]] = [lambda: multiply(left, right, out=out)]
    with torch.no_grad():
        if left.dim() == 2 and by_onednn(left, right.t()):
            ways.append(lambda: linear(left, right.t()))
        if left.dim() == 3 and by_onednn(left[0], right[0]):
            ways.append(lambda: bmm(left, right))
        if left.dim() == 2:
            ways += _own_ways(left, right)
        if product.right.packed:
            weight = packed(right.t(), LEAST_PARTS)
            ways.append(lambda: linear(left, weight))
        return min(_repeated(way, device) for way in ways)


def _own_ways(left: Tensor, right: Tensor) -> list[Callable[[], object]]:
    """Return this project's own products of these, alone, if it has any for them."""
    turned, weight = left.t(), right.t().contiguous()
    if left.is_contiguous() and branches.product(left, weight) is not None:
        return [lambda: branches.product(left, weight)]
    if turned.is_contiguous() and right.is_contiguous():
        # The wider side is laid out by panels; whose result is turned is the same to it.
        narrow, wide = (turned, right) if turned.shape[1] <= right.shape[1] else (right, turned)
        if branches.product_of_rows(narrow, wide) is not None:
            return [lambda: branches.product_of_rows(narrow, wide)]
    return []


def _repeated(run: Callable[[], object], device: torch.device) -> float:
    """Return the mean seconds of a row of repetitions."""
    run()
    repetitions = 1
    while True:
        _wait(device)
        start = time.perf_counter()
        for _ in range(repetitions):
            run()
        _wait(device)
        elapsed = time.perf_counter() - start
        if elapsed >= LEAST:
            return elapsed / repetitions
        repetitions = max(repetitions + 1, int(1.2 * repetitions * LEAST / max(elapsed, 1e-6)))


def square_rate(size: int, dtype: torch.dtype, device: torch.device) -> float:
    """Return FLOP/s of one large square product: what the machine can do at best."""
    operand = Operand((size, size), (size, 1))
    product = Product(operand, operand, dtype)
    return product.flops / seconds_of(product, device)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """Return counts and times of a step's products, the best of so many rounds for each."""
    recorded, device = record_step(config)
    best = {
        product: min(seconds_of(product, device) for _ in range(rounds))
        for product in sorted(recorded.all, key=lambda product: -product.flops)
    }
    dtype = max(recorded.all, key=lambda product: product.flops * recorded.all[product]).dtype
    size = 2048 if device.type == "cpu" else 8192
    flops = sum(product.flops * count for product, count in recorded.all.items())
    return {
        "images": recorded.images,
        "flops": flops,
        "student_flops": sum(product.flops * count for product, count in recorded.student.items()),
        "seconds": sum(best[product] * count for product, count in recorded.all.items()),
        "square_flops_per_s": max(square_rate(size, dtype, device) for _ in range(rounds)),
        "threads": torch.get_num_threads(),
        "distinct": len(best),
        "not_counted": dict(recorded.others),
    }


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/products.py", description="A training step's matrix products.")
    parser.add_argument("--config", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parse(parser)
    print(json.dumps(measure(load(arguments.config, arguments.overrides), arguments.rounds)))
    return 0


if __name__ == "__main__":
    run_cli(main)
