"""The evaluations that a pretraining run may call at an interval, by the names in ``eval.tasks``."""

from __future__ import annotations

from dinov2_fsdp.train import Evaluation
from eval.depth import online_depth
from eval.knn import online_knn
from eval.linear import online_linear
from eval.logistic import online_logistic
from eval.retrieval import online_retrieval
from eval.segmentation import online_segmentation

ONLINE: dict[str, Evaluation] = {
    "knn": online_knn,
    "linear": online_linear,
    "logistic": online_logistic,
    "segmentation": online_segmentation,
    "depth": online_depth,
    "retrieval": online_retrieval,
}
