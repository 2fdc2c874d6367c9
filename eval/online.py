"""The evaluations that a pretraining run may call at an interval, by the names in ``eval.tasks``."""

from __future__ import annotations

from dinov2_fsdp.train import Evaluation
from eval.knn import online_knn

ONLINE: dict[str, Evaluation] = {"knn": online_knn}
