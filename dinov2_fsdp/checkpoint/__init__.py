"""Checkpoints: everything that a run is, saved by all ranks together and read back on any number of them.

A checkpoint is a folder ``checkpoints/step_00001000`` of safetensors files, written through torch's distributed
checkpointing, with ``state.json`` (numbers and text) and ``manifest.json`` (size and SHA-256 of every file) beside
them. It is written under another name and renamed when whole. Nothing in it is a pickle.
"""

from dinov2_fsdp.checkpoint.checkpointer import Checkpointer, DamagedCheckpoints, SaveFailed, SaveReport
from dinov2_fsdp.checkpoint.folder import (
    FORMAT,
    MANIFEST_FILE,
    STATE_FILE,
    SavedCheckpoint,
    Superseded,
    begin_life,
    check_life,
    damage,
    find_checkpoint,
    list_checkpoints,
    write_durably,
)
from dinov2_fsdp.checkpoint.tensors import load_tensors, module_tensors, optimizer_tensors

__all__ = [
    "FORMAT",
    "MANIFEST_FILE",
    "STATE_FILE",
    "Checkpointer",
    "DamagedCheckpoints",
    "SaveFailed",
    "SaveReport",
    "SavedCheckpoint",
    "Superseded",
    "begin_life",
    "check_life",
    "damage",
    "find_checkpoint",
    "list_checkpoints",
    "load_tensors",
    "module_tensors",
    "optimizer_tensors",
    "write_durably",
]
