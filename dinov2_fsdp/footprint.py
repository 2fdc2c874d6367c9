"""What a step holds in memory, estimated before it starts. No torch.

The formulas follow what the code keeps: :mod:`dinov2_fsdp.models.frugal` and its neighbour for the branches,
:mod:`dinov2_fsdp.ssl.losses` for the logits, :mod:`dinov2_fsdp.units` for gathered weights. The tests hold them against
what autograd keeps in a real step, and against a whole step of 128 ranks traced on one (``benchmarks/scale.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dinov2_fsdp.config import Config, HeadConfig, frees_gathered, microbatches_per_rank, width_depth_heads
from dinov2_fsdp.counts import BYTES_PER_WEIGHT, count_parameters, ffn_widths, masked_patches
from dinov2_fsdp.units import BYTES, padded_units, size_of, state_shares

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
    return max(_Step(config, processes, kind).moments(), key=lambda moment: moment.total)


class _Step:
    """A step's last microbatch, when the gradients of the others have been added up.

    Several blocks' gradients that are exchanged at once count as one's.
    """

    def __init__(self, config: Config, processes: int, kind: str) -> None:
        self.config, self.kind = config, kind
        self.microbatches, self.depth = microbatches_per_rank(config, processes), width_depth_heads(config.model)[1]
        self.shards = max(1, processes // config.parallel.replicate)
        self.shares = state_shares(config, processes)
        units = padded_units(config, self.shards)
        self.gathered = {name: count * size_of(config, name) for name, count in units.items()}
        """The bytes of each unit's whole weights."""
        self.heads = (
            {"dino": config.dino_head, "ibot": config.ibot_head} if "ibot" in units else {"dino": config.dino_head}
        )
        sums = BYTES[config.parallel.reduce_precision]
        # Without their exchange FSDP adds the microbatches' gradients up whole, in the precision they are reduced in.
        self.whole = count_parameters(config).total * sums if self.microbatches > 1 else 0
        # One unit's whole gradients wait to be reduced while those of the next are computed.
        self.reduced = {name: 0 if self.whole else units[name] * sums for name in units}
        size_of_share = BYTES_PER_WEIGHT["gradients"]
        self.shares_of = {name: units[name] * size_of_share // self.shards for name in (*self.heads, "block")}
        freed = frees_gathered(config.parallel, self.shards, kind)
        self.kept_blocks = 0 if freed else self.depth * self.gathered["block"]
        self.kept = self.kept_blocks + (0 if freed else sum(self.gathered[name] for name in self.heads))
        # The blocks at work and those that are gathered ahead of them; a rank that has all weights copies each as it
        # comes.
        self.prefetch = max(1, config.parallel.prefetch) if self.shards > 1 else 0
        of_unit = min(config.parallel.blocks_per_unit, self.depth)
        self.ahead = min(of_unit * (1 + self.prefetch), self.depth)
        self.of_last_unit = (self.depth - 1) % of_unit + 1
        self.crops = sum(count * 3 * side**2 for count, side in _crops(config))
        self.targets, self.size = _targets_bytes(config, self.microbatches), size_of(config, "dino")
        self.losses = _losses(config)
        self.usual = Footprint(
            states=sum(self.shares.values()) - self.shares["gradients"],
            gradients=self.whole,
            gathered=self.gathered["root"] + self.kept,
            activations=activation_bytes(config, kind) + self.microbatches * self.crops,
            logits=self.targets,
            working=0,
        )
        self.logits = float(logits_bytes(config) - _targets_bytes(config, 1) + self.targets)

    def moments(self) -> list[Footprint]:
        """Return the moments at which a rank may hold most."""
        sinkhorn = Footprint(self.usual.states, 0, 0, 0, _sinkhorn_bytes(self.config, self.microbatches), 0)
        return [sinkhorn, *self._in_forward(), *self._in_losses(), *self._in_heads(), *self._in_blocks()]

    def _while_in(self, unit: int, before: int = 0) -> int:
        """What is gathered in a unit's forward pass: FSDP has what it gathered last twice, until the next is there."""
        return self.usual.gathered + (not self.kept) * unit + (self.shards > 1) * (unit + before)

    def _in_forward(self) -> list[Footprint]:
        """The forward pass's last block, its end, and the start of a second head."""
        # Crops are in float32 and, next to that, in the precision of the step.
        crops = (4 + (self.size if self.size < 4 else 0)) * self.crops
        forward = replace(self.usual, activations=self.usual.activations + crops)
        in_block = self._while_in(self.of_last_unit * self.gathered["block"]) - (self.kept - self.kept_blocks)
        last = self.gathered["ibot" if "ibot" in self.heads else "dino"]
        moments = [
            replace(forward, gathered=in_block),
            replace(forward, gathered=self._while_in(last), logits=int(self.logits)),
        ]
        if "ibot" in self.heads:
            loss, head = self.losses[-1], self.config.ibot_head
            of_ibot = loss.rows * self.size * head.prototypes
            of_ibot += _hidden_bytes(loss, self.size) + _prototype_bytes(head, self.size)
            both = self._while_in(self.gathered["ibot"], before=self.gathered["dino"])
            moments.append(replace(forward, gathered=both, logits=int(self.logits - of_ibot)))
        return moments

    def _in_losses(self) -> list[Footprint]:
        """The losses, and each one's backward pass.

        They look at a few logits at a time over their temperature, in float32; what was gathered is there once.
        """
        few = [4 * min(LOGITS_AT_A_TIME[self.kind], loss.largest * loss.head.prototypes) for loss in self.losses]
        copies = (2 if self.size < 4 else 1) * max(few)
        activations = self.usual.activations + 4 * self.crops
        moments = [replace(self.usual, activations=activations, logits=int(self.logits + copies))]
        logits, of_logits = self.logits, 0.0
        for loss, at_a_time in zip(reversed(self.losses), reversed(few), strict=True):
            # The gradients of the losses before wait, as they are joined where both share a head.
            of_logits += loss.rows * self.size * loss.head.prototypes
            moments.append(replace(self.usual, logits=int(logits), working=int(of_logits + 2 * at_a_time)))
            if "ibot" in self.heads:
                logits -= loss.rows * self.size * loss.head.prototypes
        return moments

    def _in_heads(self) -> list[Footprint]:
        """Of each head's backward pass its prototypes and the exchange of its gradients."""
        waiting, moments = int(sum(_hidden_bytes(loss, self.size) for loss in self.losses)), []
        waiting_prototypes = _prototype_bytes(self.config.dino_head, self.size)
        for name, head in self.heads.items():
            # iBOT's turn comes before DINO's.
            following, before = ("block", "ibot") if name == "dino" else ("dino", "")
            if self.kept:
                at_work = self.usual.gathered - (self.gathered["ibot"] if before in self.heads else 0)
            else:
                at_work = self.usual.gathered + self.gathered[name] + (self.prefetch > 0) * self.gathered[following]
            prototypes = 4 * head.prototypes * head.bottleneck
            others = 0 if name == "dino" else int(_hidden_bytes(self.losses[0], self.size)) + waiting_prototypes
            moments += [
                # Three float32 copies of the prototypes, beside those of the forward pass.
                replace(
                    self.usual,
                    gathered=at_work,
                    logits=self.targets + waiting + (prototypes if self.size < 4 else 0),
                    working=3 * prototypes + self.reduced.get(before, 0),
                ),
                # The exchange of the head's gradients, while what the other exchanged is still there.
                replace(
                    self.usual,
                    gathered=at_work,
                    gradients=self.whole or self.shares_of[before if before in self.heads else name],
                    logits=self.targets + others,
                    working=self.reduced[name] + self.reduced.get(before, 0),
                ),
            ]
            waiting += _prototype_bytes(head, self.size)
        return moments

    def _in_blocks(self) -> list[Footprint]:
        """The backward pass of the last attention branch, of what comes before it, and the end.

        The last feed-forward branch sees few tokens: of these branches the one before it is what counts.
        """
        # The heads' backward passes are over, and their weights freed.
        of_heads = sum(self.shares_of[name] for name in self.heads)
        start = replace(
            self.usual,
            gradients=self.whole or of_heads,
            gathered=self.gathered["root"] + (self.kept_blocks or self.ahead * self.gathered["block"]),
        )
        working = _last_attention_backward_bytes(self.config, self.kind) + max(
            self.reduced[name] for name in self.heads
        )
        moments = [replace(start, working=working)]
        if self.depth > 1:
            freed = self.gathered["block"] if self.kept_blocks and self.of_last_unit == 1 else 0
            moments.append(
                replace(
                    start,
                    gradients=self.whole or of_heads + self.shares_of["block"],
                    gathered=start.gathered - freed,
                    activations=start.activations - _kept_by_last_block(self.config, self.kind),
                    working=_feed_forward_backward_bytes(self.config, self.kind) + self.reduced["block"],
                )
            )
        gradients = max(self.whole, self.shares["gradients"])
        return [*moments, replace(self.usual, gradients=gradients, gathered=self.gathered["root"], activations=0)]


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
    size, total = size_of(config, "dino"), 0.0
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
    return int(microbatches * sum(sizes) * (size_of(config, "dino") + 4 + 4) + max(sizes) * 4)
