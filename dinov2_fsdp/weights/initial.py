"""A run that starts from a backbone which somebody has trained before, with heads of its own.

The heads are random while the backbone is not: their first gradients would undo what it knows. So the backbone waits
(``Schedules.backbone_factor`` in :mod:`dinov2_fsdp.optim.schedules`) until the heads have learnt to read it.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from dinov2_fsdp.checkpoint import list_checkpoints
from dinov2_fsdp.config import ARCHITECTURES, ModelConfig, load, width_depth_heads
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.initialise import fill
from dinov2_fsdp.models.vision_transformer import VisionTransformer, stretch_positions
from dinov2_fsdp.optim.groups import clean_name
from dinov2_fsdp.weights.architecture import check, describe, ffn_of
from dinov2_fsdp.weights.reading import Weights, read_weights


def start_from(path: str | Path, model: ModelConfig, *backbones: nn.Module) -> Weights:
    """Fill backbones, sharded or not, with the one that ``path`` holds, and return what was read.

    Every rank reads the file and keeps its shards; nothing is communicated, except that the ranks read a run's
    checkpoint together. The position embedding is stretched to the backbone's own grid.

    Args:
        path: anything that :func:`read_weights` reads.
        model: the config that the backbones were built from.
        backbones: the student's and the teacher's, before their first forward pass.

    Raises:
        UserError: the file holds another model; says which keys of the config would fit it.
    """
    weights = read_weights(path)
    for backbone in backbones:
        assert isinstance(backbone, VisionTransformer)
        parameters = {clean_name(name): parameter for name, parameter in backbone.named_parameters()}
        tensors = _for_grid(weights, backbone)
        _check_model(weights.source, weights.model, weights.image_size, model)
        check(parameters, tensors, weights.source, "this config's model")
        for name, parameter in parameters.items():
            fill(parameter, tensors[name].float())
    return weights


def check_backbone(path: str | Path, model: ModelConfig) -> None:
    """Refuse what :func:`start_from` would refuse for its kind, without a network to fill.

    Raises:
        UserError: the file is not there, holds no weights, or those of another model.
    """
    saved = Path(path) / "config.yaml"
    if saved.is_file() and list_checkpoints(Path(path)):
        # Of a run the config says enough: to read a checkpoint is to compare all its files with their hashes.
        held = load(saved)
        _check_model(str(path), held.model, held.crops.global_size, model)
    else:
        weights = read_weights(path)
        _check_model(weights.source, weights.model, weights.image_size, model)


def _check_model(source: str, held: ModelConfig, image_size: int, model: ModelConfig) -> None:
    if different := _differences(model, held):
        raise UserError(
            f"{source} holds {describe(held, image_size)}, not the model of this config\n"
            f"to start from it, set {' '.join(different)}"
        )


def _for_grid(weights: Weights, backbone: VisionTransformer) -> dict[str, Tensor]:
    position = weights.tensors["pos_embed"]
    rule = weights.interpolation or backbone.interpolation
    return {**weights.tensors, "pos_embed": stretch_positions(position, backbone.grid, backbone.grid, rule)}


def _differences(model: ModelConfig, held: ModelConfig) -> list[str]:
    """Return the overrides that turn ``model`` into the one held, without what does not change the tensors."""
    result = []
    if width_depth_heads(model) != width_depth_heads(held):
        result.append(f"model.arch={held.arch}")
        base = ARCHITECTURES[held.arch]
        for key, value in zip(("dim", "depth", "heads"), width_depth_heads(held), strict=True):
            if value != base[key] or getattr(model, key) is not None:
                result.append(f"model.{key}={value}")
    if ffn_of(model) != ffn_of(held):
        result.append(f"model.ffn={ffn_of(held)}")
    result += [
        f"model.{key}={getattr(held, key)}"
        for key in ("patch", "registers", "mlp_ratio")
        if getattr(model, key) != getattr(held, key)
    ]
    if (model.layer_scale > 0) != (held.layer_scale > 0):
        result.append(f"model.layer_scale={held.layer_scale or 0}")
    return result
