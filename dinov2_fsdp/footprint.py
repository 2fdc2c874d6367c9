"""What a step holds in memory and sends between ranks, estimated before it starts. No torch.

The formulas follow what the code keeps: :mod:`dinov2_fsdp.models.frugal` for the layers, :mod:`dinov2_fsdp.ssl.losses`
for the logits, FSDP's units for gathered weights. The tests hold them against what autograd keeps in a real step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dinov2_fsdp.config import Config, microbatches_per_rank, width_depth_heads
from dinov2_fsdp.counts import count_parameters, ffn_widths, masked_patches, state_bytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
MATH_LONGEST = 512
"""As in :mod:`dinov2_fsdp.models.attention`: longer sequences never keep their attention weights."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at the end of a microbatch's forward pass, where they are most."""

    states: int
    """Weights, teacher, gradients, optimizer: the rank's share."""
    gathered: int
    """Weights of other ranks in the precision of the step."""
    activations: int
    """What the backbone keeps for its backward pass."""
    logits: int
    """What the heads keep, logits and targets."""

    @property
    def total(self) -> int:
        return self.states + self.gathered + self.activations + self.logits


def footprint(config: Config, processes: int, kind: str) -> Footprint:
    """Return what a rank of ``processes`` on ``kind`` (cpu, cuda) holds."""
    shards = max(1, processes // config.parallel.replicate)
    states = sum(state_bytes(config).values()) // shards
    return Footprint(states, _gathered(config), activation_bytes(config, kind), logits_bytes(config))


def activation_bytes(config: Config, kind: str) -> int:
    """Return what the student's backbone keeps of one microbatch for the backward pass."""
    dim, depth, _ = width_depth_heads(config.model)
    size = BYTES[config.train.precision]
    groups = _groups(config)
    per_block = sum(_kept_by_block(config, kind, count, length) for count, length in groups)
    whole = size * dim * sum(count * length for count, length in groups)
    every = {"none": 0, "selective": 2, "full": 1}[config.parallel.activation_checkpointing]
    recomputed = -(-depth // every) if every else 0
    # A recomputed block keeps its input, and during the backward pass one of them is whole again.
    blocks = (depth - recomputed) * per_block + recomputed * whole + (per_block if recomputed else 0)
    pixels = sum(count * 3 * side**2 for count, side in _crops(config))
    return blocks + size * pixels


def _kept_by_block(config: Config, kind: str, count: int, length: int) -> int:
    """Return the bytes that one block keeps of ``count`` sequences of ``length`` tokens."""
    dim, _, heads = width_depth_heads(config.model)
    _, hidden = ffn_widths(config)
    size, drop = BYTES[config.train.precision], config.model.drop_path
    kept = max(1, int(count * (1 - drop))) if drop > 0 else count
    tokens = kept * length
    # Input of the attention branch, of its projection and of the feed-forward branch; queries, keys and values.
    values = tokens * (6 * dim + hidden)
    if _plain_attention(config, kind) and length <= MATH_LONGEST:
        values += kept * heads * length**2
    else:
        values += tokens * heads * 4 // size  # the logarithm of each softmax's sum, in float32
    return values * size


def _plain_attention(config: Config, kind: str) -> bool:
    return config.parallel.attention == "math" or (config.parallel.attention == "auto" and kind == "cpu")


def _crops(config: Config) -> list[tuple[int, int]]:
    crops, images = config.crops, config.train.microbatch
    found = [(2 * images, crops.global_size), (crops.local_number * images, crops.local_size)]
    return [(count, side) for count, side in found if count]


def _groups(config: Config) -> list[tuple[int, int]]:
    model = config.model
    return [(count, 1 + model.registers + (side // model.patch) ** 2) for count, side in _crops(config)]


def logits_bytes(config: Config) -> int:
    """Return what the heads and the losses keep of one microbatch: hidden layers, logits, targets."""
    images = config.train.microbatch
    masked = images * masked_patches(config)
    size = BYTES[config.parallel.heads_precision or config.train.precision]
    ibot = config.ibot_head if config.ibot_head.separate else config.dino_head
    rows = (2 + config.crops.local_number) * images
    # Targets of local crops are those of both global ones, repeated for each.
    targets = {"dino": 2 * images + (config.crops.local_number * images), "ibot": masked}
    total = 0.0
    for head, count, held in ((config.dino_head, rows, targets["dino"]), (ibot, masked, targets["ibot"])):
        hidden = (head.layers - 1) * 2 * head.hidden
        # Logits over the temperature, and targets, are kept in float32.
        total += count * (size * (hidden + 2 * head.bottleneck) + 4 * head.prototypes)
        total += held * 4 * head.prototypes
    return int(total)


def _gathered(config: Config) -> int:
    """Return the gathered weights that exist at once: all of the student's, or its root and some units."""
    parameters, model = count_parameters(config), config.model
    size, depth = BYTES[config.train.precision], width_depth_heads(model)[1]
    if not config.parallel.reshard_after_forward:
        return size * parameters.total
    per_block = parameters.backbone / max(1, depth)
    units = 1 + config.parallel.prefetch
    heads = max(parameters.dino_head, parameters.ibot_head)
    return int(size * max(per_block * config.parallel.blocks_per_unit * units, heads))


def traffic(config: Config, processes: int) -> dict[str, float]:
    """Return the bytes that one rank receives in a step, by collective.

    FSDP gathers the student's weights for the forward pass of every microbatch, and again for its backward pass unless
    they are kept; the teacher's for its forward pass; gradients are scattered once. A ring moves (n − 1)/n of each.
    """
    shards = max(1, processes // config.parallel.replicate)
    share, total = (shards - 1) / shards, count_parameters(config).total
    size, sums = BYTES[config.train.precision], BYTES[config.parallel.reduce_precision]
    microbatches = microbatches_per_rank(config, processes)
    passes = 1 + config.parallel.reshard_after_forward
    prototypes = config.dino_head.prototypes
    if config.loss.ibot > 0:
        prototypes += (config.ibot_head if config.ibot_head.separate else config.dino_head).prototypes
    rounds = {"softmax": 1, "none": 0, "sinkhorn": 2 * config.loss.sinkhorn_iterations}[config.loss.centering]
    copies = config.parallel.replicate
    found = {
        "student's weights (all-gather)": share * size * total * microbatches * passes,
        "teacher's weights (all-gather)": share * size * total * microbatches,
        "gradients (reduce-scatter)": share * sums * total,
        "gradients between copies (all-reduce)": 2 * (copies - 1) / copies * sums * total / shards,
        "centering (all-reduce)": 2 * (processes - 1) / processes * 4 * prototypes * rounds,
    }
    return {name: amount for name, amount in found.items() if amount}


def ways_to_fit(config: Config, processes: int, kind: str, limit: float) -> list[str]:
    """Return changes of the config, each by itself, that bring a rank below ``limit`` bytes; the mildest first."""
    found = []
    if config.parallel.activation_checkpointing != "full":
        changed = replace(config, parallel=replace(config.parallel, activation_checkpointing="full"))
        if footprint(changed, processes, kind).total < limit:
            found.append("parallel.activation_checkpointing=full")
    for size in (s for s in range(config.train.microbatch - 1, 0, -1) if config.train.microbatch % s == 0):
        changed = replace(config, train=replace(config.train, microbatch=size))
        if footprint(changed, processes, kind).total < limit:
            found.append(f"train.microbatch={size}")
            break
    for more in (2, 4, 8, 16):
        microbatches = config.train.batch // config.train.microbatch
        if microbatches % (processes * more) == 0 and footprint(config, processes * more, kind).total < limit:
            found.append(f"{processes * more} processes")
            break
    return found
