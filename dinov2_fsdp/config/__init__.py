"""Every knob of a run: typed, documented where it is declared, validated before anything is allocated.

Neither torch nor any data is imported here, so that a login node answers at once.
"""

from dinov2_fsdp.config.knobs import (
    ARCHITECTURES,
    CheckpointConfig,
    Config,
    CropConfig,
    DataConfig,
    EvalConfig,
    HeadConfig,
    IbotHeadConfig,
    InitConfig,
    LogConfig,
    LossConfig,
    MaskConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    TeacherConfig,
    TrainConfig,
    frees_gathered,
    width_depth_heads,
)
from dinov2_fsdp.config.reading import from_dict, load, to_yaml
from dinov2_fsdp.config.schema import describe_keys
from dinov2_fsdp.config.validation import microbatches_per_rank, validate

__all__ = [
    "ARCHITECTURES",
    "CheckpointConfig",
    "Config",
    "CropConfig",
    "DataConfig",
    "EvalConfig",
    "HeadConfig",
    "IbotHeadConfig",
    "InitConfig",
    "LogConfig",
    "LossConfig",
    "MaskConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "TeacherConfig",
    "TrainConfig",
    "describe_keys",
    "frees_gathered",
    "from_dict",
    "load",
    "microbatches_per_rank",
    "to_yaml",
    "validate",
    "width_depth_heads",
]
