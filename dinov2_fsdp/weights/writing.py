"""A backbone put out under official names, as a Hugging Face folder, or for timm."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dinov2_fsdp.errors import UserError, nearest
from dinov2_fsdp.weights import hugging_face, timm
from dinov2_fsdp.weights.backbone import LoadedBackbone
from dinov2_fsdp.weights.reading import FORMAT

DESTINATIONS = ("official", "hf", "timm")
PUBLISHED_CROP = (224, 256)
"""Pixels of the central crop and of the shorter side before it, in the published models' evaluations."""


def export(loaded: LoadedBackbone, to: str, out: Path) -> Path:
    """Write a backbone and return where: a file (``official``, or tensors alone for ``timm``) or a folder.

    Args:
        to: one of :data:`DESTINATIONS`.
        out: a ``.safetensors`` or ``.pth`` file for ``official``, a folder for ``hf``, either for ``timm``.

    Raises:
        UserError: the destination is unknown, the kind of path does not suit it, it has no such model, or nothing can
            be written there.
    """
    if to not in DESTINATIONS:
        raise UserError(f"--to {to} is unknown{nearest(to, DESTINATIONS)}\nvalid: {', '.join(DESTINATIONS)}")
    try:
        _export(loaded, to, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--out {out} cannot be written: {reason}") from None
    return out


def _export(loaded: LoadedBackbone, to: str, out: Path) -> None:
    is_file = out.suffix in (".safetensors", ".pth")
    if to == "official":
        if not is_file:
            raise UserError(f"--out {out}: official names go into one file; end it in .safetensors or .pth")
        export_backbone(loaded, out)
    elif to == "hf":
        if is_file:
            raise UserError(f"--out {out}: Hugging Face loads a folder, of a config and tensors; name a folder")
        tensors = hugging_face.from_official(hugging_face.with_layer_scale(_tensors(loaded)))
        _write_json(out / "config.json", hugging_face.config_json(loaded.architecture, loaded.image_size))
        _write_json(out / "preprocessor_config.json", hugging_face.preprocessor_json(*_crop(loaded)))
        _write_tensors(out / "model.safetensors", tensors, {"format": "pt"})
    else:
        tensors = timm.from_official(hugging_face.with_layer_scale(_tensors(loaded)))
        if not is_file:
            _write_json(out / "config.json", timm.config_json(loaded.architecture, loaded.image_size))
        _write_tensors(out if is_file else out / "model.safetensors", tensors, {"format": "pt"})


def stretched_there(to: str, registers: int) -> str | None:
    """Return by which of :data:`INTERPOLATIONS` a destination's library stretches positions; None where files say it.

    Of transformers 5 and timm 1.0 (docs/fidelity.md); ``tests/test_parity_*`` hold the numbers.
    """
    if to == "hf":
        return "antialias" if registers else "exact"
    return "antialias" if to == "timm" else None


def export_backbone(loaded: LoadedBackbone, file: Path) -> None:
    """Write a backbone under official names: a state dict (``.pth``), or safetensors with what builds it again."""
    metadata = {
        "format": FORMAT,
        "model": json.dumps(dataclasses.asdict(loaded.architecture)),
        "image_size": str(loaded.image_size),
        "interpolation": loaded.model.interpolation,
        "step": str(loaded.step),
    }
    _write_tensors(file, _tensors(loaded), metadata)


def _tensors(loaded: LoadedBackbone) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu() for name, parameter in loaded.model.named_parameters()}


def _crop(loaded: LoadedBackbone) -> tuple[int, int]:
    """Return the pixels of the central crop and of the shorter side before it: the run's, or the published ones."""
    if loaded.config is not None:
        return loaded.config.eval.size, loaded.config.eval.resize
    crop, resize = PUBLISHED_CROP
    if crop % loaded.architecture.patch:
        return loaded.image_size, round(loaded.image_size * resize / crop)
    return crop, resize


def _write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        partial.touch()
        mode = partial.stat().st_mode
        if file.suffix == ".pth":
            # A view would take the tensor that it is part of along.
            torch.save({name: tensor.clone() for name, tensor in whole.items()}, partial)
        else:
            save_file(whole, partial, metadata=metadata)
        # safetensors lets nobody but the writer read its files; weights are for whom the user's umask lets read.
        partial.chmod(mode)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=2) + "\n")
