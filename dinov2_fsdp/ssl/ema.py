"""The teacher as an exponential moving average of the student."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dinov2_fsdp.native import has_memory
from dinov2_fsdp.optim.clip import local_shard
from dinov2_fsdp.optim.groups import clean_name

PARAMETERS_AT_ONCE = 64
"""Bounds the temporary copy of the student that one fused update needs."""


class Ema:
    """teacher ← momentum · teacher + (1 − momentum) · student (arXiv 2104.14294, section 3.1).

    The parameters are collected once, before any forward pass: during one, a sharded module's parameters are the
    gathered ones. Shards of both networks lie alike, so the update needs no communication.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        # Only the student is checkpointed for activations, which changes its parameters' names.
        students = {clean_name(name): parameter for name, parameter in student.named_parameters()}
        teachers = {clean_name(name): parameter for name, parameter in teacher.named_parameters()}
        assert students.keys() == teachers.keys(), sorted(students.keys() ^ teachers.keys())
        self.student = [students[name].detach() for name in students]
        self.teacher = [teachers[name].detach() for name in students]

    @torch.no_grad()
    def copy(self) -> None:
        """Make the teacher equal to the student."""
        torch._foreach_copy_(_shards(self.teacher), _shards(self.student))

    @torch.no_grad()
    def update(self, momentum: float, skip: Tensor) -> None:
        """Move the teacher; a non-zero ``skip`` (0-d, on the device) leaves it as it is, without a host sync."""
        weight = torch.where(skip != 0, 0.0, 1.0 - momentum)
        if has_memory(weight) and not weight:
            return
        for start in range(0, len(self.teacher), PARAMETERS_AT_ONCE):
            teacher = _shards(self.teacher[start : start + PARAMETERS_AT_ONCE])
            student = _shards(self.student[start : start + PARAMETERS_AT_ONCE])
            if has_memory(weight):  # one pass over memory instead of three
                torch._foreach_lerp_(teacher, student, float(weight))
                continue
            change = torch._foreach_sub(student, teacher)
            torch._foreach_mul_(change, weight)
            torch._foreach_add_(teacher, change)


def _shards(parameters: list[Tensor]) -> list[Tensor]:
    return [local_shard(parameter) for parameter in parameters]
