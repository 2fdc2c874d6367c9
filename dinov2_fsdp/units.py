"""What FSDP shards: the weights of each unit, a rank's share of them, and what ranks send each other. No torch."""

from __future__ import annotations

from itertools import pairwise

from dinov2_fsdp.config import Config, HeadConfig, frees_gathered, microbatches_per_rank, width_depth_heads
from dinov2_fsdp.counts import count_parameters, ffn_widths, state_bytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def size_of(config: Config, unit: str) -> int:
    """Return the bytes of a number in the precision that a unit computes in."""
    precision = config.train.precision
    return BYTES[config.parallel.heads_precision or precision if unit in ("dino", "ibot") else precision]


def state_shares(config: Config, processes: int) -> dict[str, int]:
    """Return the bytes of a rank's shares of student, teacher, gradients and optimizer, as FSDP pads them."""
    shards = max(1, processes // config.parallel.replicate)
    padded, depth = padded_units(config, shards), width_depth_heads(config.model)[1]
    total = sum(padded.values()) + (depth - 1) * padded["block"]
    return {
        name: size * total // shards // count_parameters(config).total for name, size in state_bytes(config).items()
    }


def padded_units(config: Config, shards: int) -> dict[str, int]:
    """Return the numbers in each unit of FSDP: root, one block, each head."""
    return {name: sum(_padded(shape, shards) for shape in shapes) for name, shapes in _units(config, shards).items()}


def _units(config: Config, shards: int) -> dict[str, list[tuple[int, int]]]:
    """Return the parameters' (parts at most, numbers in a part) of FSDP's units: root, one block, each head.

    Parts are rows, or channels of an embedding that is one row, where the shards divide them.
    """
    model = config.model
    dim = width_depth_heads(model)[0]
    second_in, first_out = ffn_widths(config)
    root = [(dim, 3 * model.patch**2), (dim, 1), (dim, 1), (dim, 1)]
    embeddings = [1, 1, 1 + (config.crops.global_size // model.patch) ** 2, model.registers]
    root += [(1, dim * tokens) if dim % shards else (dim, tokens) for tokens in embeddings]
    block = [(3 * dim, dim), (3 * dim, 1), (dim, dim), (dim, 1), (first_out, dim), (first_out, 1), (dim, second_in)]
    block += [(dim, 1)] * (5 + 2 * (model.layer_scale > 0))
    units = {"root": root, "block": block, "dino": _head_shapes(config.dino_head, dim)}
    if config.ibot_head.separate and config.loss.ibot > 0:
        units["ibot"] = _head_shapes(config.ibot_head, dim)
    return units


def _head_shapes(head: HeadConfig, dim: int) -> list[tuple[int, int]]:
    widths = [dim, *[head.hidden] * (head.layers - 1), head.bottleneck]
    shapes = [shape for a, b in pairwise(widths) for shape in ((b, a), (b, 1))]
    shapes += [(head.hidden, 1)] * (2 * (head.layers - 1) * head.batch_norm)
    shapes += [(head.bottleneck, 1)] * (2 * head.layer_norm)
    return [*shapes, (head.prototypes, head.bottleneck), (head.prototypes, 1)]


def _padded(shape: tuple[int, int], shards: int) -> int:
    """Return the numbers of a parameter as FSDP gathers it: the same count of rows from every rank."""
    rows, row = shape
    return -(-rows // shards) * shards * row


def traffic(config: Config, processes: int) -> dict[str, float]:
    """Return the bytes that one rank receives in a step, by collective.

    FSDP gathers the student's weights for the forward pass of every microbatch, and again for its backward pass unless
    they are kept, as the root's always are; the teacher's for its forward pass; gradients are scattered once. A ring
    moves (n − 1)/n of each.
    """
    shards = max(1, processes // config.parallel.replicate)
    depth = width_depth_heads(config.model)[1]
    units = {name: (depth if name == "block" else 1) * n for name, n in padded_units(config, shards).items()}
    gathered = {name: count * size_of(config, name) for name, count in units.items()}
    share, sums = (shards - 1) / shards, BYTES[config.parallel.reduce_precision]
    microbatches, total, once = microbatches_per_rank(config, processes), sum(units.values()), sum(gathered.values())
    # A rank alone receives nothing, whether it copies once or twice.
    again = once - gathered["root"] if shards > 1 and frees_gathered(config.parallel, shards, "any") else 0
    prototypes = config.dino_head.prototypes
    if config.loss.ibot > 0:
        prototypes += (config.ibot_head if config.ibot_head.separate else config.dino_head).prototypes
    rounds = {"softmax": 1, "none": 0, "sinkhorn": 2 * config.loss.sinkhorn_iterations}[config.loss.centering]
    copies = config.parallel.replicate
    found = {
        "student's weights (all-gather)": share * (once + again) * microbatches,
        "teacher's weights (all-gather)": share * once * microbatches,
        "gradients (reduce-scatter)": share * sums * total,
        "gradients between copies (all-reduce)": 2 * (copies - 1) / copies * sums * total / shards,
        "centering (all-reduce)": 2 * (processes - 1) / processes * 4 * prototypes * rounds,
    }
    return {name: amount for name, amount in found.items() if amount}
