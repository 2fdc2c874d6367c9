"""The plan's memory and traffic against a traced step of many ranks, and that against a real one of two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from training import this_world

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from ledger import Ledger, record_step
from scale import Rows, compare_memory, compare_traffic, waits

from dinov2_fsdp import native
from dinov2_fsdp.config import load

ROOT = Path(__file__).resolve().parent.parent
BENCH = "configs/bench.yaml"
SMALL = [
    "crops.global_size=112", "crops.local_size=56", "crops.local_number=4", "model.dim=96", "model.heads=3",
    "model.depth=4", "dino_head.hidden=128", "dino_head.bottleneck=32", "dino_head.prototypes=4096",
    "ibot_head.hidden=128", "ibot_head.bottleneck=32", "ibot_head.prototypes=4096", "parallel.device=cpu",
    "train.batch=32", "train.microbatch=16", "train.precision=fp32",
]  # fmt: skip
KEPT = "parallel.reshard_after_forward=false"
FEW = ["train.batch=16", "train.microbatch=4", "dino_head.prototypes=256", "ibot_head.prototypes=256"]
"""So few rows and prototypes that weights show."""
HEADS = [
    "ibot_head.separate=true", "dino_head.hidden=2048", "dino_head.bottleneck=256", "ibot_head.hidden=2048",
    "ibot_head.bottleneck=256",
]  # fmt: skip
"""Such that they are most of what a step gathers."""
TOLERANCE = 0.05
"""The goal is a tenth, which working memory alone needs; at this, one of a block's dozen kept tensors shows."""
LITTLE = 0.01
"""Share of the peak, or of the traffic, under which a kind may be anything."""


def traced(config: str, ranks: int, kind: str, overrides: list[str]) -> dict[str, Any]:
    """What ``scale.py trace`` finds, in a process of its own: what a model caches there has no memory."""
    command = [sys.executable, "benchmarks/scale.py", "trace", "--config", config, "--ranks", str(ranks)]
    done = subprocess.run(
        [*command, "--kind", kind, "--json", *overrides],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True, timeout=300,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def assert_agree(rows: Rows, least: float, what: str) -> None:
    for name, expected, found in rows:
        if max(expected, found) >= least:
            tolerance = 2 * TOLERANCE if name == "working memory" else TOLERANCE
            assert expected == pytest.approx(found, rel=tolerance), f"{what}: {name}"


def assert_the_plan_is_right(found: dict[str, Any]) -> None:
    *_, (_, _, peak) = found["memory"]
    assert_agree(found["memory"], LITTLE * peak, "memory")
    assert_agree(found["traffic"], LITTLE * sum(received for _, _, received in found["traffic"]), "traffic")


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (2, []),
        *(
            pytest.param(ranks, changes, marks=pytest.mark.slow)
            for ranks, changes in (
                (4, ["train.batch=128", "loss.centering=sinkhorn", "ibot_head.separate=true", "train.precision=bf16"]),
                (4, ["model.ffn=swiglu", "model.drop_path=0.4", "model.dim=192", "parallel.prefetch=2", *FEW]),
                (4, ["parallel.activation_checkpointing=full", "parallel.replicate=2", "parallel.attention=sdpa"]),
                (
                    4,
                    [
                        "parallel.heads_precision=fp32",
                        "train.precision=bf16",
                        "train.microbatch=2",
                        "train.batch=8",
                        "dino_head.bottleneck=256",
                    ],
                ),
                (5, []),
                (2, [KEPT]),
                (4, [KEPT, "train.precision=bf16", "model.dim=192", "dino_head.hidden=1024", "model.drop_path=0.4"]),
                (4, [KEPT, "train.batch=128", "ibot_head.separate=true", "parallel.blocks_per_unit=2"]),
                (2, [KEPT, "parallel.activation_checkpointing=full", "model.dim=192"]),
                (2, HEADS),
                (2, [KEPT, *HEADS]),
                (2, ["parallel.blocks_per_unit=4"]),
            )
        ),
    ],
    ids=[
        "plain",
        "several microbatches",
        "swiglu",
        "checkpointed, replicated",
        "hardly any rows",
        "padded embeddings",
        "kept weights",
        "kept weights, large heads",
        "kept weights, several microbatches",
        "kept weights, checkpointed",
        "two large heads",
        "kept weights, two large heads",
        "all blocks at once",
    ],
)
def test_the_plan_is_what_a_traced_step_holds_and_receives(ranks: int, overrides: list[str]) -> None:
    batch = [] if any(change.startswith("train.batch") for change in overrides) else [f"train.batch={16 * ranks}"]
    assert_the_plan_is_right(traced(BENCH, ranks, "cpu", [*SMALL, *batch, *overrides]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "ranks"),
    [
        pytest.param(
            *("vitg14", 128),
            marks=pytest.mark.skipif(
                torch.__version__ < (2, 14),
                reason="this torch looks at an optimizer's shapes with whole parameters, which the trace counts",
            ),
        ),
        ("vitl14", 96),
    ],
)
def test_the_plan_of_a_recipe_is_what_its_traced_step_holds_and_receives(recipe: str, ranks: int) -> None:
    assert_the_plan_is_right(traced(f"configs/{recipe}.yaml", ranks, "cuda", ["data.train=scenes:n=4000"]))


def held_and_received(overrides: list[str]) -> tuple[Rows, Rows]:
    """What one of several ranks holds and receives in a real step, beside the formulas' figures.

    As on a CPU without compiled code, which neither plan nor trace know of: with it, softmax weights are not kept.
    """
    config, world = load(BENCH, overrides), this_world()
    with native.switched_off():
        ledger = record_step(config, world)
    return compare_memory(config, world.size, "cpu", ledger.pages()), compare_traffic(config, world.size, ledger)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("batch", [32, 64], ids=["one microbatch", "two microbatches"])
def test_a_real_step_holds_and_receives_what_the_trace_says(batch: int) -> None:
    overrides = [*SMALL, f"train.batch={batch}"]
    found = traced(BENCH, 2, "cpu", overrides)
    memory, moved = run_on_ranks(held_and_received, 2, overrides)[0]
    for rows, of_trace in ((memory, found["memory"]), (moved, found["traffic"])):
        assert [name for name, _, _ in rows] == [name for name, _, _ in of_trace]
        largest = max(real for _, _, real in rows)
        both = [(name, trace, real) for (name, _, real), (_, _, trace) in zip(rows, of_trace, strict=True)]
        assert_agree(both, LITTLE * largest, "trace against reality")
        assert_agree(rows, LITTLE * largest, "plan against reality")


def test_a_ledger_knows_what_lives_at_the_fullest_moment() -> None:
    with Ledger() as ledger:
        with ledger.during("first", "kept"):
            kept = torch.zeros(1000)
        with ledger.during("second", "passing"):
            for _ in range(3):
                torch.ones(500)
            view = kept[10:]
        del kept, view
        with ledger.during("third", "last"):
            last = torch.zeros(10)
        ledger.file([last], "renamed")
    first, *_, second, _, third, _ = (page.kinds for page in ledger.pages())
    assert (first, second, third) == ({"kept": 4000}, {"kept": 4000, "passing": 2000}, {"renamed": 40})


def test_waiting_is_what_gathering_takes_without_the_copies_in_it() -> None:
    second = 10**9
    events = [
        ("Optimizer.step#AdamW.step", 0, second),
        ("aten::mm", 2 * second, 3 * second),
        ("FSDP::all_gather (blocks.0)", 5 * second, 4 * second),
        ("aten::copy_", 6 * second, second),
        ("aten::empty", 6 * second + 1, second // 2),
        ("FSDP::post_backward_reduce", 10 * second, 2 * second),
        ("Optimizer.step#AdamW.step", 14 * second, second),
        ("FSDP::all_gather (blocks.0)", 16 * second, second),
        ("Optimizer.step#AdamW.step", 18 * second, second),
    ]
    assert waits(events) == [
        {"seconds": 14.0, "gathering": 3.0, "reducing": 2.0},
        {"seconds": 4.0, "gathering": 1.0, "reducing": 0.0},
    ]
