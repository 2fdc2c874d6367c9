"""Every knob of a run: typed, documented where it is declared, validated before anything is allocated.

This file imports neither torch nor any data, so that a login node answers at once. Units: durations are text
with a unit (``10ep``, ``1250it``, ``2Mimg``, ``5%``), sizes are pixels, temperatures and momenta plain numbers.
The defaults are those that trained the published models (DINOv2, arXiv 2304.07193, and its ImageNet-1k recipe).
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dinov2_fsdp.duration import Duration
from dinov2_fsdp.errors import UserError, nearest

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vits": {"dim": 384, "depth": 12, "heads": 6, "ffn": "mlp"},
    "vitb": {"dim": 768, "depth": 12, "heads": 12, "ffn": "mlp"},
    "vitl": {"dim": 1024, "depth": 24, "heads": 16, "ffn": "mlp"},
    "vitg": {"dim": 1536, "depth": 40, "heads": 24, "ffn": "swiglu"},
}
"""Published backbones (DINOv2, table 17 of the appendix); ``model.dim`` and its neighbours override them."""


@dataclass
class DataConfig:
    train: str = "scenes:"
    """Images to learn from: folder:PATH, tar:PATTERN, imagenet:ROOT[:SPLIT], imagenet22k:ROOT or scenes:KEY=VALUE,…"""
    workers: int = 8
    """Loader processes per rank; 0 loads in the training process."""
    prefetch: int = 4
    """Microbatches that each loader process prepares ahead."""
    cache: str | None = None
    """Folder for listings; by default the user's cache folder."""
    max_bad_images: int = 100
    """Unreadable images that a run replaces and names before it stops."""


@dataclass
class CropConfig:
    global_size: int = 224
    """Side of the two global crops, pixels; a multiple of the patch."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Share of the image's area that a global crop covers."""
    local_size: int = 98
    """Side of the local crops, pixels; a multiple of the patch."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Share of the image's area that a local crop covers."""
    local_number: int = 8
    """Local crops per image."""
    blur: str = "paper"
    """paper: blur p 1/.1/.5 (global 1, global 2, local); released: the published code's 0/.9/.5."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter."""
    jitter_strength: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Largest change of brightness, contrast, saturation, hue."""
    gray: float = 0.2
    """Probability of grayscale."""
    solarize: float = 0.2
    """Probability of solarisation of the second global crop."""


@dataclass
class MaskConfig:
    probability: float = 0.5
    """Share of the global crops that are masked for the student."""
    ratio: tuple[float, float] = (0.1, 0.5)
    """Smallest and largest share of a masked crop's patches that is hidden."""


@dataclass
class ModelConfig:
    arch: str = "vitl"
    """vits, vitb, vitl or vitg."""
    patch: int = 14
    """Side of a patch, pixels."""
    registers: int = 0
    """Register tokens (arXiv 2309.16588): 0 or 4."""
    drop_path: float = 0.3
    """Share of sequences that skip each residual branch (stochastic depth), uniform over depth."""
    layer_scale: float = 1e-5
    """Initial LayerScale; 0 leaves LayerScale out."""
    dim: int | None = None
    """Width; by default the architecture's."""
    depth: int | None = None
    """Blocks; by default the architecture's."""
    heads: int | None = None
    """Attention heads; by default the architecture's."""
    ffn: str | None = None
    """mlp or swiglu; by default the architecture's."""
    mlp_ratio: float = 4.0
    """Hidden width of the feed-forward part, in widths (SwiGLU takes two thirds of it)."""


@dataclass
class HeadConfig:
    prototypes: int = 65536
    """Outputs of the head."""
    hidden: int = 2048
    """Width of the head's MLP."""
    bottleneck: int = 256
    """Width of the L2-normalised layer before the prototypes."""
    layers: int = 3
    """Linear layers of the MLP."""
    batch_norm: bool = False
    """BatchNorm between the MLP's layers; its statistics are those of one microbatch."""
    layer_norm: bool = False
    """LayerNorm before the L2 normalisation."""
    fixed_gain: bool = False
    """Keep the prototypes' gain at 1 instead of learning it (DINO's norm_last_layer)."""


@dataclass
class IbotHeadConfig(HeadConfig):
    separate: bool = False
    """A head of its own for patches; otherwise patches use DINO's head and the other keys here mean nothing."""


@dataclass
class LossConfig:
    dino: float = 1.0
    """Weight of the loss between class tokens."""
    ibot: float = 1.0
    """Weight of the loss between masked patches; 0 turns masks off."""
    koleo: float = 0.1
    """Weight of the Kozachenko–Leonenko regulariser; 0 turns it off."""
    koleo_global: bool = False
    """Search nearest neighbours over all ranks' microbatches instead of within one."""
    student_temperature: float = 0.1
    """Temperature of the student's softmax."""
    teacher_temperature: float = 0.07
    """Temperature of the teacher's softmax after the warm-up."""
    teacher_temperature_start: float = 0.04
    """Temperature of the teacher's softmax at the first step."""
    teacher_temperature_warmup: str = "30ep"
    """Linear warm-up of the teacher's temperature."""
    centering: str = "softmax"
    """softmax: EMA centre; sinkhorn: Sinkhorn–Knopp; none: plain softmax (collapses: an ablation)."""
    centre_momentum: float = 0.9
    """Momentum of the EMA centre."""
    sinkhorn_iterations: int = 3
    """Sinkhorn–Knopp iterations."""


@dataclass
class OptimConfig:
    name: str = "adamw"
    """adamw or lars."""
    lr: float = 4e-3
    """Base learning rate, before it is scaled by the batch."""
    lr_scaling: str = "sqrt"
    """sqrt: × √(batch/1024); linear: × batch/256; none."""
    min_lr: float = 1e-6
    """Learning rate at the last step."""
    warmup: str = "10ep"
    """Linear warm-up of the learning rate."""
    weight_decay: tuple[float, float] = (0.04, 0.4)
    """Weight decay at the first and the last step (cosine)."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    momentum: float = 0.9
    """LARS's momentum."""
    clip: float = 3.0
    """Largest gradient norm; 0 turns clipping off."""
    clip_scope: str = "part"
    """part: backbone and heads are clipped each by its own norm, as published; all: by the norm of all."""
    layer_decay: float = 0.9
    """Factor on the learning rate from each block to the one below."""
    patch_embed_lr: float = 0.2
    """Further factor on the patch embedding's learning rate."""
    freeze_prototypes: str = "1ep"
    """How long the prototypes keep their initial values."""


@dataclass
class TeacherConfig:
    momentum: tuple[float, float] = (0.992, 1.0)
    """EMA momentum at the first and the last step (cosine)."""


@dataclass
class TrainConfig:
    duration: str = "100ep"
    """Length of the run."""
    epoch: int = 0
    """Steps that `ep` counts as one epoch; 0: one pass over the data. The published recipes use 1250."""
    batch: int = 2048
    """Images per step, over all ranks and microbatches."""
    microbatch: int = 64
    """Images that go through the model at once. Ranks share a step's microbatches, so the result does not depend on
    their number; KoLeo, stochastic depth and BatchNorm see one microbatch."""
    precision: str = "bf16"
    """bf16, fp16 (with a gradient scaler) or fp32; weights and optimizer are kept in fp32."""
    max_nonfinite: int = 10
    """Steps in a row with a non-finite gradient that are skipped before the run stops."""
    deterministic: bool = False
    """Only kernels that give the same bits every time."""


@dataclass
class ParallelConfig:
    device: str = "auto"
    """auto, cuda or cpu."""
    attention: str = "auto"
    """math or sdpa: once per crop size; xformers or varlen: one call for all crops (CUDA only); auto: math on a CPU,
    xformers on CUDA, else varlen, else sdpa."""
    replicate: int = 1
    """Copies of the sharded model (HSDP): ranks are a replicate × shard mesh."""
    reshard_after_forward: bool = True
    """Free a block's gathered weights between forward and backward."""
    activation_checkpointing: str = "none"
    """none; selective: recompute every second block; full: recompute every block."""
    compile: bool = False
    """torch.compile each block."""
    threads: int = 0
    """CPU threads per rank; 0: the machine's cores divided by the ranks on it."""
    timeout: float = 1800.0
    """Seconds that a rank waits for the others before the job ends."""


@dataclass
class CheckpointConfig:
    every: str = "1ep"
    """Time between checkpoints; 0it saves only at the end."""
    keep: int = 3
    """Newest checkpoints that stay on disk."""
    keep_every: str = "0it"
    """Checkpoints at multiples of this stay for ever."""


@dataclass
class LogConfig:
    every: str = "10it"
    """Time between lines of metrics."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


@dataclass
class EvalConfig:
    every: str = "0it"
    """Time between evaluations during the run; 0it: none."""
    tasks: tuple[str, ...] = ("knn",)
    """Evaluations to run."""
    train: str | None = None
    """Labelled images that make up the memory bank; by default data.train."""
    test: str | None = None
    """Labelled images to classify."""
    resize: int = 256
    """Shorter side before the central crop, pixels."""
    size: int = 224
    """Central crop, pixels; a multiple of the patch."""
    batch: int = 64
    """Images per rank that go through the backbone at once."""
    max_train: int = 0
    """Use only this many images of the memory bank; 0: all."""
    max_test: int = 0
    """Use only this many images of the test set; 0: all."""
    k: tuple[int, ...] = (1, 10, 20, 100, 200)
    """Neighbours that vote."""
    temperature: float = 0.07
    """Temperature of the votes."""


@dataclass
class Config:
    output_dir: str = "runs/default"
    """Run directory: holds everything of the run and nothing else."""
    seed: int = 0
    """Seed of weights, stream, crops, masks and stochastic depth."""
    data: DataConfig = field(default_factory=DataConfig)
    crops: CropConfig = field(default_factory=CropConfig)
    masks: MaskConfig = field(default_factory=MaskConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    dino_head: HeadConfig = field(default_factory=HeadConfig)
    ibot_head: IbotHeadConfig = field(default_factory=IbotHeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


# ---------------------------------------------------------------------------------------------------------------------
# Reading: file, then the file it extends, then overrides. Every error names the key.


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Return the validated config of a YAML file with ``key=value`` overrides applied.

    A file may name another one that it changes with ``extends: FILE`` (relative to itself).

    Raises:
        UserError: the file is missing or no YAML; a key is unknown; a value has the wrong type or is impossible.
    """
    base = OmegaConf.create({}) if path is None else _read(Path(path), chain=())
    merged = OmegaConf.merge(base, _parse_overrides(overrides))
    assert isinstance(merged, DictConfig)
    return from_dict(OmegaConf.to_container(merged))  # type: ignore[arg-type]


def from_dict(values: dict[str, Any]) -> Config:
    """Return the validated config of a nested dictionary of keys that differ from the defaults."""
    _check_keys(values, Config, prefix="")
    schema = OmegaConf.structured(_as_schema(Config))
    try:
        config = OmegaConf.merge(schema, values)
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        raise UserError(_type_error(error, values)) from None
    result = _instantiate(Config, plain)  # type: ignore[arg-type]
    validate(result)
    return result


def to_yaml(config: Config) -> str:
    """Return the resolved config as YAML that :func:`load` reads back to an equal config."""
    return OmegaConf.to_yaml(OmegaConf.create(_as_lists(dataclasses.asdict(config))))


def describe_keys() -> list[tuple[str, str, Any, str]]:
    """Return (key, type, default, docstring) of every knob, in the order of declaration."""
    return list(_describe(Config, prefix=""))


def _read(path: Path, chain: tuple[Path, ...]) -> DictConfig:
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"config file {path} does not exist{nearest(str(path), siblings)}")
    path = path.resolve()
    if path in chain:
        raise UserError(f"config file {path} extends itself")
    try:
        content = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"config file {path} cannot be read as YAML: {reason}") from None
    if not isinstance(content, DictConfig):
        raise UserError(f"config file {path} must hold `key: value` lines at its top level")
    base = content.pop("extends", None)
    if base is None:
        return content
    parent = _read(path.parent / str(base), (*chain, path))
    merged = OmegaConf.merge(parent, content)
    assert isinstance(merged, DictConfig)
    return merged


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        key, separator, _ = text.partition("=")
        if not separator or not key:
            raise UserError(f"override '{text}' is not of the form key=value, e.g. train.batch=256")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        raise UserError(f"overrides {list(overrides)} cannot be read: {' '.join(str(error).split())[:200]}") from None


def _check_keys(values: Any, schema: type, prefix: str) -> None:
    if not isinstance(values, dict):
        raise UserError(f"'{prefix.rstrip('.')}' holds {values!r}; it needs keys: {', '.join(_names(schema))}")
    for key, value in values.items():
        if key not in _names(schema):
            everywhere = [name for name, *_ in describe_keys()]
            hint = nearest(str(key), _names(schema)) or nearest(f"{prefix}{key}", everywhere)
            elsewhere = [name for name in everywhere if name.split(".")[-1] == key]
            if elsewhere and not nearest(str(key), _names(schema)):
                hint = f"; did you mean '{elsewhere[0]}'?"
            where = f"in '{prefix[:-1]}'" if prefix else "at the top level"
            raise UserError(f"unknown key '{prefix}{key}'{hint}\nvalid {where}: {', '.join(_names(schema))}")
        child = _section(schema, key)
        if child is not None:
            _check_keys({} if value is None else value, child, f"{prefix}{key}.")


def _type_error(error: OmegaConfBaseException, values: dict[str, Any]) -> str:
    key = str(getattr(error, "full_key", "") or "").split("[")[0]
    known = {name: (kind, doc) for name, kind, _, doc in describe_keys()}
    message = str(error).split("\n")[0]
    if key in known:
        kind, doc = known[key]
        if "ListConfig" in message and kind.startswith("tuple"):
            value: Any = values
            for part in key.split("."):
                value = value[part]
            message = f"{value!r} is no list"
        return f"{key}: {message}\nvalid: {kind} — {doc}"
    return f"{key or 'config'}: {message}"


# ---------------------------------------------------------------------------------------------------------------------
# The dataclasses as a schema. omegaconf knows lists but no tuples of fixed length; a tuple keeps configs hashable.


def _names(schema: type) -> list[str]:
    return [f.name for f in dataclasses.fields(schema)]


def _section(schema: type, key: str) -> type | None:
    factory = next(f.default_factory for f in dataclasses.fields(schema) if f.name == key)
    return factory if isinstance(factory, type) and dataclasses.is_dataclass(factory) else None


def _as_schema(schema: type) -> type:
    fields: list[Any] = []
    for f in dataclasses.fields(schema):
        section = _section(schema, f.name)
        if section is not None:
            inner = _as_schema(section)
            fields.append((f.name, inner, field(default_factory=inner)))
        elif isinstance(f.default, tuple):
            kind = str(f.type).split("[")[1].split(",")[0].rstrip("]")
            element = {"float": float, "int": int, "str": str}[kind]
            fields.append((f.name, list[element], field(default_factory=partial(list, f.default))))  # type: ignore[valid-type]
        else:
            kinds = {"int": int, "float": float, "str": str, "bool": bool}
            base, _, optional = str(f.type).partition(" | ")
            kind_ = kinds[base] | None if optional else kinds[base]
            fields.append((f.name, kind_, field(default=f.default)))
    return dataclasses.make_dataclass(schema.__name__, fields)


def _instantiate(schema: type, values: dict[str, Any], prefix: str = "") -> Any:
    arguments = {}
    for f in dataclasses.fields(schema):
        section = _section(schema, f.name)
        value = values[f.name]
        if section is not None:
            value = _instantiate(section, value, f"{prefix}{f.name}.")
        elif isinstance(f.default, tuple):
            value = tuple(value or ())
            if "..." not in str(f.type) and len(value) != len(f.default):
                expected = f"{len(f.default)} values like {list(f.default)}"
                raise UserError(f"{prefix}{f.name} needs {expected}, got {list(value)}")
        arguments[f.name] = value
    return schema(**arguments)


def _as_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _as_lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _field_docs(schema: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for cls in reversed([c for c in schema.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(inspect.getsource(cls)).body[0].body  # type: ignore[attr-defined]
        for statement, following in pairwise(body):
            if isinstance(statement, ast.AnnAssign) and isinstance(following, ast.Expr):
                docs[statement.target.id] = " ".join(following.value.value.split())  # type: ignore[attr-defined,union-attr]
    return docs


def _describe(schema: type, prefix: str) -> Any:
    docs = _field_docs(schema)
    for f in dataclasses.fields(schema):
        section = _section(schema, f.name)
        if section is not None:
            yield from _describe(section, f"{prefix}{f.name}.")
        else:
            yield f"{prefix}{f.name}", str(f.type), f.default, docs[f.name]


# ---------------------------------------------------------------------------------------------------------------------
# What cannot work is said here, before anything is allocated.


def validate(config: Config) -> None:
    """Check every value that can be checked without data, devices or other ranks.

    Raises:
        UserError: naming the key, its value and what would be valid.
    """
    c = config
    _one_of("model.arch", c.model.arch, ARCHITECTURES)
    if c.model.ffn is not None:
        _one_of("model.ffn", c.model.ffn, ("mlp", "swiglu"))
    _one_of("crops.blur", c.crops.blur, ("paper", "released"))
    _one_of("loss.centering", c.loss.centering, ("softmax", "sinkhorn", "none"))
    _one_of("optim.name", c.optim.name, ("adamw", "lars"))
    _one_of("optim.lr_scaling", c.optim.lr_scaling, ("sqrt", "linear", "none"))
    _one_of("optim.clip_scope", c.optim.clip_scope, ("part", "all"))
    _one_of("train.precision", c.train.precision, ("bf16", "fp16", "fp32"))
    _one_of("parallel.device", c.parallel.device, ("auto", "cuda", "cpu"))
    _one_of("parallel.attention", c.parallel.attention, ("auto", "math", "sdpa", "xformers", "varlen"))
    _one_of("parallel.activation_checkpointing", c.parallel.activation_checkpointing, ("none", "selective", "full"))

    for key in (
        "train.batch", "train.microbatch", "model.patch", "crops.global_size", "crops.local_size", "eval.size",
        "eval.batch", "dino_head.prototypes", "dino_head.hidden", "dino_head.bottleneck", "dino_head.layers",
        "ibot_head.prototypes", "ibot_head.hidden", "ibot_head.bottleneck", "ibot_head.layers", "parallel.replicate",
        "loss.sinkhorn_iterations", "loss.student_temperature", "loss.teacher_temperature", "parallel.timeout",
        "loss.teacher_temperature_start", "eval.temperature", "data.prefetch", "checkpoint.keep", "train.max_nonfinite",
        "model.mlp_ratio", "optim.layer_decay", "optim.patch_embed_lr",
    ):  # fmt: skip
        _require(key, value := _get(c, key), value > 0, "a number above 0")
    for key in (
        "data.workers", "data.max_bad_images", "crops.local_number", "model.registers", "model.layer_scale", "seed",
        "train.epoch", "optim.lr", "optim.min_lr", "optim.clip", "loss.dino", "loss.ibot", "loss.koleo",
        "parallel.threads", "eval.max_train", "eval.max_test",
    ):  # fmt: skip
        _require(key, value := _get(c, key), value >= 0, "a number of at least 0")
    for key in ("masks.probability", "crops.flip", "crops.jitter", "crops.gray", "crops.solarize"):
        _require(key, value := _get(c, key), 0 <= value <= 1, "a probability between 0 and 1")
    for key in ("model.dim", "model.depth", "model.heads"):
        _require(key, value := _get(c, key), value is None or value > 0, "a number above 0")
    _require("optim.momentum", c.optim.momentum, 0 <= c.optim.momentum < 1, "0 ≤ momentum < 1")
    for value in c.optim.betas:
        _require("optim.betas", list(c.optim.betas), 0 <= value < 1, "two numbers of at least 0 and below 1")
    for value in c.optim.weight_decay:
        _require("optim.weight_decay", list(c.optim.weight_decay), value >= 0, "two numbers of at least 0")
    for value in c.eval.k:
        _require("eval.k", list(c.eval.k), value > 0, "numbers above 0")
    for key in ("crops.global_scale", "crops.local_scale", "masks.ratio"):
        low, high = _get(c, key)
        _require(key, [low, high], 0 < low <= high <= 1, "two shares, 0 < smallest ≤ largest ≤ 1")
    _require("model.drop_path", c.model.drop_path, 0 <= c.model.drop_path < 1, "a share of at least 0 and below 1")
    _require("loss.centre_momentum", c.loss.centre_momentum, 0 <= c.loss.centre_momentum < 1, "0 ≤ momentum < 1")
    for value in c.teacher.momentum:
        _require("teacher.momentum", list(c.teacher.momentum), 0 <= value <= 1, "two numbers between 0 and 1")
    strength = list(c.crops.jitter_strength)
    _require("crops.jitter_strength", strength, all(0 <= s <= 1 for s in strength), "four numbers between 0 and 1")
    _require("crops.jitter_strength", strength, strength[3] <= 0.5, "hue ≤ 0.5")

    for key in ("crops.global_size", "crops.local_size", "eval.size"):
        _require(key, value := _get(c, key), value % c.model.patch == 0, _multiples(value, c.model.patch))
    _require("eval.resize", c.eval.resize, c.eval.resize >= c.eval.size, f"at least eval.size ({c.eval.size})")
    dim, _, heads = width_depth_heads(c.model)
    _require("model.heads", heads, heads > 0 and dim % heads == 0, f"a divisor of model.dim ({dim})")
    whole = c.train.batch % c.train.microbatch == 0
    _require("train.batch", c.train.batch, whole, _multiples(c.train.batch, c.train.microbatch))
    if c.loss.koleo > 0 and c.train.microbatch < 2:
        raise UserError(
            f"train.microbatch={c.train.microbatch}: KoLeo needs at least two images to find a neighbour; "
            "use train.microbatch=2 or more, or loss.koleo=0"
        )
    if c.loss.dino == 0 and c.loss.ibot == 0:
        raise UserError("loss.dino=0 and loss.ibot=0 leave nothing to learn; set one of them above 0")
    if c.loss.dino > 0 and c.loss.teacher_temperature > c.loss.student_temperature:
        raise UserError(
            f"loss.teacher_temperature={c.loss.teacher_temperature} is above loss.student_temperature="
            f"{c.loss.student_temperature}: the teacher must be sharper than the student"
        )
    for key in (
        "train.duration", "loss.teacher_temperature_warmup", "optim.warmup", "optim.freeze_prototypes",
        "checkpoint.every", "checkpoint.keep_every", "log.every", "eval.every",
    ):  # fmt: skip
        try:
            parsed = Duration.parse(_get(c, key))
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        if key == "train.duration":
            _require(key, str(parsed), parsed.value > 0 and parsed.unit != "%", "e.g. 100ep, 125000it or 2Gimg")
    if Duration.parse(c.eval.every).value > 0:
        _require("eval.test", c.eval.test, c.eval.test is not None, "a labelled data set, since eval.every is set")


def width_depth_heads(model: ModelConfig) -> tuple[int, int, int]:
    """Return the backbone's (dim, depth, heads) with overrides applied."""
    base = ARCHITECTURES[model.arch]
    return model.dim or base["dim"], model.depth or base["depth"], model.heads or base["heads"]


def microbatches_per_rank(config: Config, world_size: int) -> int:
    """Return how many microbatches each of ``world_size`` ranks runs per step.

    Raises:
        UserError: the step's microbatches cannot be shared evenly.
    """
    total = config.train.batch // config.train.microbatch
    if total % world_size:
        even = [n for n in range(1, total + 1) if total % n == 0]
        raise UserError(
            f"train.batch={config.train.batch} is {total} microbatches of {config.train.microbatch}, which "
            f"{world_size} processes cannot share evenly\n"
            f"valid numbers of processes: {', '.join(map(str, even[-12:]))}; or change train.batch or train.microbatch"
        )
    return total // world_size


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _require(key: str, value: Any, condition: bool, valid: str) -> None:
    if not condition or value == math.inf:
        raise UserError(f"{key}={value} is impossible; valid: {valid}")


def _one_of(key: str, value: str, valid: Any) -> None:
    if value not in valid:
        raise UserError(f"{key}={value} is unknown{nearest(str(value), valid)}\nvalid: {', '.join(valid)}")


def _multiples(value: int, unit: int) -> str:
    low = max(unit, value // unit * unit)
    return f"a multiple of {unit}, e.g. {low} or {low + unit}"
