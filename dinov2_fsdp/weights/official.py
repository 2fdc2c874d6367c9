"""The published DINOv2 files: the names that this project's backbones have too, and what training runs put round them.

Released files (``dinov2_vitb14_pretrain.pth``, ``…_reg4_pretrain.pth``) are flat state dicts whose position embedding
stands for 518 pixels. A training run's ``teacher_checkpoint.pth`` is ``{"teacher": {"backbone.…", "dino_head.…"}}``.
A backbone trained in chunks names its blocks ``blocks.CHUNK.INDEX``, where the index counts through all chunks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dinov2_fsdp.errors import UserError
from dinov2_fsdp.weights.architecture import listed

_CHUNKED = re.compile(r"^blocks\.\d+\.(\d+)\.")
_BESIDE_BACKBONE = ("dino_head.", "ibot_head.", "dino_loss.", "ibot_patch_loss.")
_WRAPPERS = ("model", "state_dict")


def unwrap(content: Any, which: str, source: str) -> dict[str, Tensor]:
    """Return the flat state dict within what ``torch.load`` gave: its ``which`` network where there are several.

    Args:
        which: ``teacher`` or ``student``.

    Raises:
        UserError: there is no state dict in it.
    """
    while isinstance(content, Mapping):
        inner = next((key for key in (which, *_WRAPPERS) if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = content[inner]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        found = listed(map(str, content)) if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise UserError(
            f"{source} holds no state dict, nor one under '{which}', 'model' or 'state_dict'; found {found}"
        )
    prefix = f"{which}."
    if all(name.startswith(("teacher.", "student.", *_BESIDE_BACKBONE)) for name in content):
        content = {name.removeprefix(prefix): tensor for name, tensor in content.items() if name.startswith(prefix)}
    return dict(content)


def to_official(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the backbone's tensors alone, blocks counted through; heads and centres of a training run are left out."""
    if any(name.startswith("backbone.") for name in tensors):
        tensors = {
            name.removeprefix("backbone."): tensor
            for name, tensor in tensors.items()
            if not name.startswith(_BESIDE_BACKBONE)
        }
    return {_CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in tensors.items()}
