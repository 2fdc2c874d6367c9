"""Vision Transformers and projection heads; they know nothing of processes or sharding."""

from dinov2_fsdp.models.factory import create

__all__ = ["create"]
