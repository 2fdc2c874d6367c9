"""What a path holds: a run, a checkpoint, an export, official weights, a Hugging Face folder or timm's."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dinov2_fsdp.checkpoint import STATE_FILE, SavedCheckpoint, damage, find_checkpoint, load_tensors
from dinov2_fsdp.config import Config, ModelConfig, load, width_depth_heads
from dinov2_fsdp.errors import UserError
from dinov2_fsdp.models.vision_transformer import INTERPOLATIONS
from dinov2_fsdp.weights import hugging_face, official, timm
from dinov2_fsdp.weights.architecture import check, describe, infer, shapes_of

FORMAT = "dinov2_fsdp"
"""What the metadata of this project's exports call their format."""


@dataclass
class Weights:
    """A whole backbone's tensors under official names, and the model that they belong to.

    ``origin`` is ``run``, ``export``, ``official``, ``hugging face`` or ``timm``; ``config`` and ``step`` are None
    where the path does not tell. Tensors may be mapped from the file: they are not to be changed in place.
    """

    tensors: dict[str, Tensor]
    model: ModelConfig
    image_size: int
    origin: str
    source: str
    interpolation: str | None = None
    config: Config | None = None
    step: int | None = None

    def __str__(self) -> str:
        return f"{self.origin} weights, {describe(self.model, self.image_size)}, from {self.source}"


def read_weights(
    path: str | Path, step: int | None = None, which: str = "teacher", heads: int | None = None
) -> Weights:
    """Return the backbone that ``path`` holds.

    Args:
        path: a run directory, a checkpoint folder, an exported ``.safetensors`` file, an official ``.pth`` or
            ``.safetensors`` file, a folder of Hugging Face's, or a folder or file of timm's.
        step: which checkpoint of a run; by default the newest.
        which: ``teacher`` or ``student``, where there are both.
        heads: attention heads, for files that do not say and have another number than one for 64 channels.

    Raises:
        UserError: there is no backbone, or not a whole one; missing and unexpected tensors are listed. Or it says that
            it is of another step, or has another number of heads, than asked for.
    """
    path = Path(path).expanduser()
    weights = _read(path, step, which, heads)
    if step is not None and weights.step != step:
        found = "do not say of which step they are" if weights.step is None else f"are those of step {weights.step}"
        raise UserError(f"step {step} asked for, but the weights in {path} {found}; leave the step out")
    if heads is not None and (held := width_depth_heads(weights.model)[2]) != heads:
        raise UserError(f"{heads} heads asked for, but {path} says that it has {held}; leave the heads out")
    return weights


def _read(path: Path, step: int | None, which: str, heads: int | None) -> Weights:
    if path.is_file():
        return _read_file(path, which, heads)
    if (path / STATE_FILE).is_file():
        saved = SavedCheckpoint(path, json.loads((path / STATE_FILE).read_text())["step"])
        if problems := damage(saved):
            raise UserError(f"{path} is damaged: {problems[0]}")
        return _read_checkpoint(path.resolve().parent.parent, saved, which)
    if (path / "config.yaml").is_file():
        return _read_checkpoint(path, find_checkpoint(path, step), which)
    if (path / "config.json").is_file():
        return _read_folder(path, heads)
    raise UserError(
        f"{path} is no run directory, checkpoint folder or exported file\n"
        "expected: runs/NAME, runs/NAME/checkpoints/step_…, a .safetensors or .pth file, or a folder with config.json "
        "(Hugging Face, timm)"
    )


def _read_checkpoint(run: Path, checkpoint: SavedCheckpoint, which: str) -> Weights:
    config = load(run / "config.yaml")
    image_size, prefix = config.crops.global_size, f"{which}.backbone."
    tensors = {name: torch.empty(p.shape) for name, p in shapes_of(config.model, image_size).items()}
    load_tensors(checkpoint.path, {prefix + name: tensor for name, tensor in tensors.items()}, prefix)
    source = str(checkpoint.path)
    return Weights(tensors, config.model, image_size, "run", source, config=config, step=checkpoint.step)


def _read_file(path: Path, which: str, heads: int | None) -> Weights:
    content, metadata = _load(path)
    if metadata.get("format") == FORMAT:
        return _read_export(path, content, metadata)
    tensors = official.unwrap(content, which, str(path))
    if any(name.endswith("embeddings.cls_token") for name in tensors):
        raise UserError(
            f"{path} has the names of a Hugging Face model, which do not tell its architecture\n"
            "give the folder that holds it and its config.json"
        )
    if timm.is_timm(tensors):
        return _read_timm(tensors, str(path), heads)
    tensors = official.to_official(tensors)
    model, image_size = infer(tensors, str(path), heads)
    check(shapes_of(model, image_size), tensors, str(path), describe(model, image_size))
    return Weights(tensors, model, image_size, "official", str(path))


def _read_export(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> Weights:
    try:
        model, image_size = ModelConfig(**json.loads(metadata["model"])), int(metadata["image_size"])
        step = None if metadata.get("step", "None") == "None" else int(metadata["step"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has metadata that this version does not understand: {error}") from None
    interpolation = metadata.get("interpolation")
    if interpolation not in (None, *INTERPOLATIONS):
        raise UserError(f"{path} wants the position embedding interpolated as '{interpolation}', which is unknown here")
    check(shapes_of(model, image_size), tensors, str(path), describe(model, image_size))
    return Weights(tensors, model, image_size, "export", str(path), interpolation, step=step)


def _read_folder(path: Path, heads: int | None) -> Weights:
    file = path / "config.json"
    try:
        config = json.loads(file.read_text())
        assert isinstance(config, dict)
    except (ValueError, AssertionError):
        raise UserError(f"{file} is not a JSON object") from None
    tensors = _load_folder(path)
    if "model_type" in config:
        return _read_hugging_face(path, config, tensors)
    if "architecture" in config:
        return _read_timm(tensors, str(path), timm.heads_in(config, str(file)) or heads)
    raise UserError(f"{file} names no model_type (Hugging Face) and no architecture (timm)")


def _read_hugging_face(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Weights:
    model, image_size = hugging_face.read_config(config, str(path / "config.json"))
    found = hugging_face.on_disk(tensors)
    expected = hugging_face.from_official(shapes_of(model, image_size))
    if not config.get("use_mask_token", True):
        found.setdefault("embeddings.mask_token", torch.zeros(expected["embeddings.mask_token"].shape))
    check(expected, found, str(path), describe(model, image_size))
    return Weights(hugging_face.to_official(found), model, image_size, "hugging face", str(path))


def _read_timm(tensors: Mapping[str, Tensor], source: str, heads: int | None) -> Weights:
    found = timm.without_classifier(tensors)
    converted = timm.to_official(found)
    model, image_size = infer(converted, source, heads)
    complete = shapes_of(model, image_size)
    check(timm.from_official(complete), found, source, describe(model, image_size))
    return Weights(converted, model, image_size, "timm", source)


def _load_folder(path: Path) -> dict[str, Tensor]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    else:
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()][:1]
    if not files:
        raise UserError(f"{path} holds neither model.safetensors, model.safetensors.index.json nor pytorch_model.bin")
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise UserError(f"{file}, which {index.name} names, does not exist")
        tensors |= official.unwrap(_load(file)[0], "teacher", str(file))
    return tensors


def _load(path: Path) -> tuple[Any, dict[str, str]]:
    """Return a file's content, mapped from the disk where possible, and its metadata. Never runs code from it."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {error}") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), {}
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            pickled = zipfile.is_zipfile(path) or file.read(1) == pickle.PROTO
        if not pickled:
            raise UserError(f"{path} is no file of weights: neither safetensors nor what torch.save writes") from None
        # torch explains at length how to run the code nevertheless, and then says what it is.
        cause = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
        reason = (cause[1] if cause else str(error).split("\n")[0])[:160]
        raise UserError(f"{path} holds more than tensors, which could run code, and is not loaded: {reason}") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        reason = str(error).split("\n")[0][:160] or type(error).__name__
        raise UserError(f"{path} is not a readable file of weights: {reason}") from None
