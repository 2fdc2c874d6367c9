"""Backbones in and out: runs, exports, official files, Hugging Face folders and timm, without sharding.

``backbone`` is what the rest of the project calls; ``reading`` finds out what a path holds; ``official``,
``hugging_face`` and ``timm`` know each one's names; ``architecture`` says which model a set of tensors is;
``writing`` puts a backbone out under each one's names; ``initial`` starts a run from a backbone.
"""

from dinov2_fsdp.weights.backbone import LoadedBackbone, load_backbone, untrained_backbone
from dinov2_fsdp.weights.writing import export_backbone

__all__ = ["LoadedBackbone", "export_backbone", "load_backbone", "untrained_backbone"]
