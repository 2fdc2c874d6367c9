"""What a step holds in memory and sends between ranks, estimated before it starts. No torch.

The formulas follow what the code keeps: :mod:`dinov2_fsdp.models.frugal` and its neighbour for the branches,
:mod:`dinov2_fsdp.ssl.losses` for the logits, FSDP's units for gathered weights. The tests hold them against what
autograd keeps in a real step, and against a whole step of 128 ranks traced on one (``benchmarks/scale.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

from dinov2_fsdp.config import Config, HeadConfig, frees_gathered, microbatches_per_rank, width_depth_heads
from dinov2_fsdp.counts import BYTES_PER_WEIGHT, count_parameters, ffn_widths, masked_patches, state_bytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
CHECKPOINTED = {"none": 0, "selective": 2, "full": 1}
"""Every how many blocks one is recomputed in the backward pass."""
MATH_LONGEST = 512
"""As in :mod:`dinov2_fsdp.models.attention`: longer sequences never keep their attention weights."""
LOGITS_AT_A_TIME = {"cpu": 2**18, "cuda": 2**25}
"""As in :mod:`dinov2_fsdp.ssl.losses`: logits of which float32 copies exist."""
ROWS_AT_A_TIME = 1024
"""As in :mod:`dinov2_fsdp.models.frugal`: tokens that each thread of a CPU takes through a branch at a time."""
WEIGHTS_AT_A_TIME = 2**20
"""As in :mod:`dinov2_fsdp.models.plain_attention`: softmax weights that each thread of a CPU computes at a time."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank at the moment of a step at which they are most."""

    states: int
    """Weights, teacher, optimizer: the rank's share."""
    gradients: int
    """Those that exist at this moment: whole ones, not shares, where the step has several microbatches."""
    gathered: int
    """Whole weights in the precision of the step, as FSDP puts them together; a rank alone copies its own."""
    activations: int
    """What the backbone keeps for its backward pass, and the crops of the step."""
    logits: int
    """What the heads keep, logits and targets."""
    working: int
    """What the operations of this moment need for themselves."""

    @property
    def total(self) -> int:
        return self.states + self.gradients + self.gathered + self.activations + self.logits + self.working


def footprint(config: Config, processes: int, kind: str) -> Footprint:
    """Return what a rank of ``processes`` on ``kind`` (cpu, cuda) holds where it is most."""
    return max(_moments(config, processes, kind), key=lambda moment: moment.total)


def _moments(config: Config, processes: int, kind: str) -> list[Footprint]:
    """Return the moments of a step at which a rank may hold most.

    Sinkhorn's targets; and of the last microbatch, when the gradients of the others have been added up, the forward
    pass's last block, end, and start of a second head, the losses behind it, and of the backward pass each loss, each
    head's prototypes and the exchange of its gradients, the last attention branch, the one before it (the last
    feed-forward branch sees few tokens), the end. Several blocks' gradients that are exchanged at once count as one's.
    """
    microbatches, depth = microbatches_per_rank(config, processes), width_depth_heads(config.model)[1]
    shards, shares = max(1, processes // config.parallel.replicate), state_shares(config, processes)
    states = sum(shares.values()) - shares["gradients"]
    units = _padded_units(config, shards)
    gathered = {name: count * _size(config, name) for name, count in units.items()}
    heads = {"dino": config.dino_head, "ibot": config.ibot_head} if "ibot" in units else {"dino": config.dino_head}
    sums = BYTES[config.parallel.reduce_precision]
    # Without their exchange FSDP adds the microbatches' gradients up whole, in the precision they are reduced in.
    whole = count_parameters(config).total * sums if microbatches > 1 else 0
    # One unit's whole gradients wait to be reduced while those of the next are computed.
    reduced = {name: 0 if whole else units[name] * sums for name in units}
    freed = frees_gathered(config.parallel, shards, kind)
    kept_blocks = 0 if freed else depth * gathered["block"]
    kept = kept_blocks + (0 if freed else sum(gathered[name] for name in heads))
    # The blocks at work and those that are gathered ahead of them; a rank that has all weights copies each as it comes.
    prefetch = max(1, config.parallel.prefetch) if shards > 1 else 0
    of_unit = min(config.parallel.blocks_per_unit, depth)
    ahead = min(of_unit * (1 + prefetch), depth)
    of_last_unit = (depth - 1) % of_unit + 1
    crops = sum(count * 3 * side**2 for count, side in _crops(config))
    targets, size = _targets_bytes(config, microbatches), _size(config, "dino")
    usual = Footprint(
        states=states,
        gradients=whole,
        gathered=gathered["root"] + kept,
        activations=activation_bytes(config, kind) + microbatches * crops,
        logits=targets,
        working=0,
    )
    logits = float(logits_bytes(config) - _targets_bytes(config, 1) + targets)
    losses = _losses(config)
    few = [4 * min(LOGITS_AT_A_TIME[kind], loss.largest * loss.head.prototypes) for loss in losses]
    last = gathered["ibot" if "ibot" in heads else "dino"]
    # Crops are in float32 and, next to that, in the precision of the step.
    forward = replace(usual, activations=usual.activations + (4 + (size if size < 4 else 0)) * crops)

    def while_in(unit: int, before: int = 0) -> int:
        """What is gathered in a unit's forward pass: FSDP has what it gathered last twice, until the next is there."""
        return usual.gathered + (not kept) * unit + (shards > 1) * (unit + before)

    moments = [
        Footprint(states, 0, 0, 0, _sinkhorn_bytes(config, microbatches), 0),
        replace(forward, gathered=while_in(of_last_unit * gathered["block"]) - (kept - kept_blocks)),
        replace(forward, gathered=while_in(last), logits=int(logits)),
        # Losses look at a few logits at a time over their temperature, in float32; what was gathered is there once.
        replace(
            usual,
            activations=usual.activations + 4 * crops,
            logits=int(logits + (2 if size < 4 else 1) * max(few)),
        ),
    ]
    whole_logits, of_logits = logits, 0.0
    for loss, at_a_time in zip(reversed(losses), reversed(few), strict=True):
        # The gradients of the losses before wait, as they are joined where both share a head.
        of_logits += loss.rows * size * loss.head.prototypes
        moments.append(replace(usual, logits=int(logits), working=int(of_logits + 2 * at_a_time)))
        if "ibot" in heads:
            logits -= loss.rows * size * loss.head.prototypes
    if "ibot" in heads:
        of_ibot = losses[-1].rows * size * config.ibot_head.prototypes
        of_ibot += _hidden_bytes(losses[-1], size) + _prototype_bytes(config.ibot_head, size)
        both = while_in(gathered["ibot"], before=gathered["dino"])
        moments.append(replace(forward, gathered=both, logits=int(whole_logits - of_ibot)))
    waiting = int(sum(_hidden_bytes(loss, size) for loss in losses))
    shares_of = {name: units[name] * BYTES_PER_WEIGHT["gradients"] // shards for name in (*heads, "block")}
    of_heads, waiting_prototypes = sum(shares_of[name] for name in heads), _prototype_bytes(config.dino_head, size)
    for name, head in heads.items():
        # iBOT's turn comes before DINO's.
        following, before = ("block", "ibot") if name == "dino" else ("dino", "")
        if kept:
            at_work = usual.gathered - (gathered["ibot"] if before in heads else 0)
        else:
            at_work = usual.gathered + gathered[name] + (prefetch > 0) * gathered[following]
        moments += [
            # Three float32 copies of the prototypes, beside those of the forward pass.
            replace(
                usual,
                gathered=at_work,
                logits=targets + waiting + (4 * head.prototypes * head.bottleneck if size < 4 else 0),
                working=3 * 4 * head.prototypes * head.bottleneck + reduced.get(before, 0),
            ),
            # The exchange of the head's gradients, while what the other exchanged is still there.
            replace(
                usual,
                gathered=at_work,
                gradients=whole or shares_of[before if before in heads else name],
                logits=targets + (0 if name == "dino" else int(_hidden_bytes(losses[0], size)) + waiting_prototypes),
                working=reduced[name] + reduced.get(before, 0),
            ),
        ]
        waiting += _prototype_bytes(head, size)
    # The heads' backward passes are over, and their weights freed.
    at_blocks = replace(
        usual,
        gradients=whole or of_heads,
        gathered=gathered["root"] + (kept_blocks or ahead * gathered["block"]),
    )
    working = _last_attention_backward_bytes(config, kind) + max(reduced[name] for name in heads)
    moments.append(replace(at_blocks, working=working))
    if depth > 1:
        activations = at_blocks.activations - _kept_by_last_block(config, kind)
        working = _feed_forward_backward_bytes(config, kind) + reduced["block"]
        gradients = whole or of_heads + shares_of["block"]
        moments.append(
            replace(
                at_blocks,
                gradients=gradients,
                gathered=at_blocks.gathered - (gathered["block"] if kept_blocks and of_last_unit == 1 else 0),
                activations=activations,
                working=working,
            )
        )
    moments.append(replace(usual, gradients=max(whole, shares["gradients"]), gathered=gathered["root"], activations=0))
    return moments


def _size(config: Config, unit: str) -> int:
    """Return the bytes of a number in the precision that a unit computes in."""
    precision = config.train.precision
    return BYTES[config.parallel.heads_precision or precision if unit in ("dino", "ibot") else precision]


def state_shares(config: Config, processes: int) -> dict[str, int]:
    """Return the bytes of a rank's shares of student, teacher, gradients and optimizer, as FSDP pads them."""
    shards = max(1, processes // config.parallel.replicate)
    padded, depth = _padded_units(config, shards), width_depth_heads(config.model)[1]
    total = sum(padded.values()) + (depth - 1) * padded["block"]
    return {
        name: size * total // shards // count_parameters(config).total for name, size in state_bytes(config).items()
    }


def _padded_units(config: Config, shards: int) -> dict[str, int]:
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


def activation_bytes(config: Config, kind: str) -> int:
    """Return what the student's backbone keeps of one microbatch for the backward pass."""
    dim, depth, _ = width_depth_heads(config.model)
    size = BYTES[config.train.precision]
    groups = _groups(config)
    per_block = sum(_kept_by_block(config, kind, count, length) for count, length in groups)
    whole = size * dim * sum(count * length for count, length in groups)
    every = CHECKPOINTED[config.parallel.activation_checkpointing]
    recomputed = -(-(depth - 1) // every) if every else 0
    blocks = (depth - 1 - recomputed) * per_block + recomputed * whole + _kept_by_last_block(config, kind)
    pixels = sum(count * 3 * side**2 for count, side in _crops(config))
    return blocks + size * pixels


def _kept_by_block(config: Config, kind: str, count: int, length: int) -> int:
    """Return the bytes that one block keeps of ``count`` sequences of ``length`` tokens."""
    dim, _, heads = width_depth_heads(config.model)
    _, hidden = ffn_widths(config)
    size, kept = BYTES[config.train.precision], _kept(config, count)
    tokens = kept * length
    # Input of the attention branch, of its projection and of the feed-forward branch; queries, keys and values.
    values = tokens * (6 * dim + hidden)
    if _plain_attention(config, kind) and length <= MATH_LONGEST:
        # Not by compiled attention (a CPU with AVX-512), of which a plan does not know.
        values += kept * heads * length**2
    else:
        values += tokens * heads * 4 // size  # the logarithm of each softmax's sum, in float32
        if config.parallel.attention == "sdpa" and config.crops.local_number:
            values += tokens * dim  # each crop size's output, which the attention keeps beside all in one tensor
    return values * size


def _kept_by_last_block(config: Config, kind: str) -> int:
    """Return what the last block keeps, whose feed-forward branch sees only the tokens that a head reads."""
    dim, depth, _ = width_depth_heads(config.model)
    size = BYTES[config.train.precision]
    if _recomputed(config, depth - 1):
        return size * dim * sum(count * length for count, length in _groups(config))
    return _computed_by_last_block(config, kind)


def _computed_by_last_block(config: Config, kind: str) -> int:
    dim = width_depth_heads(config.model)[0]
    read = config.train.microbatch * (2 + config.crops.local_number + masked_patches(config))
    left_out = sum(count * length for count, length in _kept_groups(config)) - int(read)
    whole = sum(_kept_by_block(config, kind, count, length) for count, length in _groups(config))
    return whole - BYTES[config.train.precision] * left_out * (dim + ffn_widths(config)[1])


def _recomputed(config: Config, block: int) -> bool:
    every = CHECKPOINTED[config.parallel.activation_checkpointing]
    return every > 0 and block % every == 0


def _last_attention_backward_bytes(config: Config, kind: str) -> int:
    """Return what the last block's attention needs in the backward pass beside what was kept."""
    dim, depth, _ = width_depth_heads(config.model)
    size, tokens = BYTES[config.train.precision], sum(count * length for count, length in _kept_groups(config))
    # The gradients of the branch's weights, summed over the parts, and of the other's.
    wide = _wide(config, kind, len(_groups(config)))
    of_weights = size * dim * sum(ffn_widths(config)) + wide * 4 * dim**2 + size * dim**2
    working = size * (_attention_working(config, kind) + tokens * dim) + of_weights
    again = _computed_by_last_block(config, kind) if _recomputed(config, depth - 1) else 0
    return int(working + _stream_bytes(config)) + again


def _feed_forward_backward_bytes(config: Config, kind: str) -> int:
    """Return what the last feed-forward branch but one needs in the backward pass beside what was kept."""
    dim, depth, _ = width_depth_heads(config.model)
    second_in, hidden = ffn_widths(config)
    size, tokens = BYTES[config.train.precision], sum(count * length for count, length in _kept_groups(config))
    some = min(tokens, _rows_at_a_time(config)) if kind == "cpu" else tokens
    # Sums of the weights' gradients over the parts, and the weights times LayerScale.
    wide = _wide(config, kind)
    of_first, of_second = wide * dim * hidden, wide * dim * second_in + size * dim * second_in
    # The gradient by the activation, whose place the one before it takes; SwiGLU has both halves and their whole beside
    # it. Then the norm's gradients.
    gated = 3 * second_in if second_in != hidden else 0
    working = max(
        size * some * (gated + hidden) + of_second + (of_first if some < tokens else 0),
        size * some * (hidden + 3 * dim) + of_second + of_first,
    )
    groups = _groups(config)
    again = sum(_kept_by_block(config, kind, *group) for group in groups) if _recomputed(config, depth - 2) else 0
    return int(working + size * tokens * dim + _stream_bytes(config)) + again


def _stream_bytes(config: Config) -> int:
    """Return the gradient in a block's output, and in what its branch saw of it."""
    dim, size = width_depth_heads(config.model)[0], BYTES[config.train.precision]
    tokens = sum(count * length for count, length in _groups(config))
    if config.model.drop_path > 0:
        tokens += sum(count * length for count, length in _kept_groups(config))
    return size * dim * tokens


def _wide(config: Config, kind: str, parts: int = 1) -> int:
    """Return the bytes of a number in a sum over parts of the rows, of which there are so many at least."""
    size, tokens = BYTES[config.train.precision], sum(count * length for count, length in _kept_groups(config))
    return max(size, 4) if kind == "cpu" and (parts > 1 or _rows_at_a_time(config) < tokens) else size


def _attention_working(config: Config, kind: str) -> int:
    """Return the numbers that the backward pass of an attention branch works with, but for the weights' gradients."""
    dim, _, heads = width_depth_heads(config.model)
    groups = _kept_groups(config)
    plain = [_plain_attention(config, kind) and length <= MATH_LONGEST for _, length in groups]
    if kind != "cpu" or not all(plain):
        # Gradients of the attention's output, of queries, keys and values; and of softmax weights and scores.
        weights = 0
        for (count, length), is_plain in zip(groups, plain, strict=True):
            one = heads * length**2
            few = max(1, WEIGHTS_AT_A_TIME * max(1, config.parallel.threads) // one) if kind == "cpu" else count
            weights = max(weights, min(count, few) * one * is_plain)
        return sum(count * length for count, length in groups) * 4 * dim + 2 * weights
    # Beside them, for a few sequences, those of the softmax weights and scores, of the norm and what is before it.
    most = 0
    for count, length in groups:
        few = max(1, round(_rows_at_a_time(config) / length))
        few = -(-count // -(-count // few))
        most = max(most, few * length * 6 * dim + 2 * few * heads * length**2)
    return most


def _rows_at_a_time(config: Config) -> int:
    return ROWS_AT_A_TIME * max(1, config.parallel.threads)


def _plain_attention(config: Config, kind: str) -> bool:
    return config.parallel.attention == "math" or (config.parallel.attention == "auto" and kind == "cpu")


def _crops(config: Config) -> list[tuple[int, int]]:
    crops, images = config.crops, config.train.microbatch
    found = [(2 * images, crops.global_size), (crops.local_number * images, crops.local_size)]
    return [(count, side) for count, side in found if count]


def _groups(config: Config) -> list[tuple[int, int]]:
    model = config.model
    return [(count, 1 + model.registers + (side // model.patch) ** 2) for count, side in _crops(config)]


def _kept_groups(config: Config) -> list[tuple[int, int]]:
    """Return the sequences that stochastic depth leaves to each branch, and their length."""
    return [(_kept(config, count), length) for count, length in _groups(config)]


def _kept(config: Config, count: int) -> int:
    drop = config.model.drop_path
    return max(1, int(count * (1 - drop))) if drop > 0 else count


@dataclass(frozen=True)
class _Loss:
    """Rows of one loss in a microbatch."""

    head: HeadConfig
    rows: float
    """Logits of the student."""
    largest: float
    """Those of its largest cross-entropy: DINO has one for each crop."""
    summed: float
    """Targets that are the sum of both global crops', the same for all local ones."""
    targets: float


def _losses(config: Config) -> list[_Loss]:
    images, local = config.train.microbatch, config.crops.local_number * config.train.microbatch
    losses = [_Loss(config.dino_head, 2 * images + local, images, images if local else 0, 2 * images)]
    if config.loss.ibot > 0:
        masked = images * masked_patches(config)
        head = config.ibot_head if config.ibot_head.separate else config.dino_head
        losses.append(_Loss(head, masked, masked, 0, masked))
    return losses


def logits_bytes(config: Config) -> int:
    """Return what the heads and the losses keep of one microbatch: hidden layers, logits, prototypes, targets."""
    size, total = _size(config, "dino"), 0.0
    for loss in _losses(config):
        # Targets are in float32, logits as the head gives them.
        total += _hidden_bytes(loss, size) + (loss.rows * size + loss.summed * 4) * loss.head.prototypes
    for head in [config.dino_head, config.ibot_head][: 1 + (count_parameters(config).ibot_head > 0)]:
        total += _prototype_bytes(head, size)
    return int(total) + _targets_bytes(config, 1)


def _hidden_bytes(loss: _Loss, size: int) -> float:
    """Return what a head keeps before its prototypes: each layer's input and output of its GELU, the bottleneck."""
    return loss.rows * size * ((loss.head.layers - 1) * 2 * loss.head.hidden + 2 * loss.head.bottleneck)


def _prototype_bytes(head: HeadConfig, size: int) -> int:
    """Return the prototypes over their norm, and in float32 before that where the gathered ones are not."""
    return head.prototypes * head.bottleneck * (size if size == 4 else 4 + size)


def _targets_bytes(config: Config, microbatches: int) -> int:
    """Return the teacher's targets that exist at once: with Sinkhorn–Knopp those of all the step's microbatches."""
    at_once = microbatches if config.loss.centering == "sinkhorn" else 1
    return int(at_once * sum(loss.targets * 4 * loss.head.prototypes for loss in _losses(config)))


def _sinkhorn_bytes(config: Config, microbatches: int) -> int:
    """Return what Sinkhorn–Knopp needs: logits, scores and scaled scores of a whole step, one exponential."""
    if config.loss.centering != "sinkhorn":
        return 0
    sizes = [loss.targets * loss.head.prototypes for loss in _losses(config)]
    return int(microbatches * sum(sizes) * (_size(config, "dino") + 4 + 4) + max(sizes) * 4)


def traffic(config: Config, processes: int) -> dict[str, float]:
    """Return the bytes that one rank receives in a step, by collective.

    FSDP gathers the student's weights for the forward pass of every microbatch, and again for its backward pass unless
    they are kept, as the root's always are; the teacher's for its forward pass; gradients are scattered once. A ring
    moves (n − 1)/n of each.
    """
    shards = max(1, processes // config.parallel.replicate)
    depth = width_depth_heads(config.model)[1]
    units = {name: (depth if name == "block" else 1) * n for name, n in _padded_units(config, shards).items()}
    gathered = {name: count * _size(config, name) for name, count in units.items()}
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
