"""How far the metrics of ``eval/`` lie from scikit-learn and from float64 written pixel by pixel.

python benchmarks/metric_agreement.py        # prints a Markdown table; needs scikit-learn
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score, mean_squared_error
from sklearn.neighbors import KNeighborsClassifier

from eval.logistic import fit
from eval.metrics import average_precision, confusion_matrix, depth_metrics, segmentation_metrics
from eval.neighbours import knn_accuracy


def _trapezoids(ranking: list[int], positive: set[int], junk: set[int]) -> float:
    kept = [image for image in ranking if image not in junk]
    area, found = 0.0, 0
    for place, image in enumerate(kept):
        if image in positive:
            before = found / place if place else 1.0
            found += 1
            area += (before + found / (place + 1)) / 2 / len(positive)
    return area


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    rows: list[tuple[str, str, float]] = []

    truth, predicted = rng.integers(0, 150, 2_000_000), rng.integers(0, 150, 2_000_000)
    predicted[:1_500_000] = truth[:1_500_000]
    ours = segmentation_metrics(confusion_matrix(truth, predicted, 150))["miou"]
    rows.append(
        (
            "mIoU, 2 M pixels, 150 classes",
            "scikit-learn",
            abs(ours - 100 * jaccard_score(truth, predicted, average="macro")),
        )
    )

    depth = rng.uniform(0.5, 9.5, (480, 640)).astype(np.float32)
    guess = (depth * rng.lognormal(0, 0.2, depth.shape)).astype(np.float32)
    found = depth_metrics(depth, guess, np.ones_like(depth, bool))
    assert found is not None
    flat, other = depth.astype(np.float64).ravel(), guess.astype(np.float64).ravel()
    rows.append(
        ("RMSE, 480 × 640 pixels", "scikit-learn", abs(found["rmse"] - math.sqrt(mean_squared_error(flat, other))))
    )
    slow = math.fsum(abs(p - t) / t for t, p in zip(flat.tolist(), other.tolist(), strict=True)) / len(flat)
    rows.append(("AbsRel, 480 × 640 pixels", "float64, one pixel at a time", abs(found["abs_rel"] - slow)))

    worst = 0.0
    for _ in range(100):
        ranking, chosen = rng.permutation(5000), rng.permutation(5000)[:120]
        expected = _trapezoids(ranking.tolist(), set(chosen[:80].tolist()), set(chosen[80:].tolist()))
        worst = max(worst, abs(average_precision(ranking, chosen[:80], chosen[80:]) - expected))
    rows.append(("average precision with junk, 100 queries, 5,000 images", "float64, one image at a time", worst))

    centres = rng.normal(size=(10, 64))
    labels = rng.integers(10, size=1000)
    x = centres[labels] + 2.5 * rng.normal(size=(1000, 64))
    for c in (1e-6, 1e-3, 1.0, 1e5):
        mine = fit(torch.tensor(x[:600]), torch.tensor(labels[:600]), 10, c)
        theirs = LogisticRegression(C=c, tol=1e-12, max_iter=20_000, solver="newton-cg").fit(x[:600], labels[:600])
        mine_p = torch.softmax(torch.tensor(x) @ mine.weight.T + mine.bias, dim=1).numpy()
        rows.append(
            (
                f"logistic regression, probabilities, C = {c:g}",
                "scikit-learn",
                float(np.abs(mine_p - theirs.predict_proba(x)).max()),
            )
        )

    bank, asked = torch.tensor(x[:600], dtype=torch.float32), torch.tensor(x[600:], dtype=torch.float32)
    nearest = KNeighborsClassifier(1, metric="cosine").fit(bank.numpy(), labels[:600])
    accuracy = knn_accuracy(bank, torch.tensor(labels[:600]), asked, torch.tensor(labels[600:]), (1,))[1]
    rows.append(
        (
            "k-NN accuracy, k = 1, percent",
            "scikit-learn",
            abs(accuracy - 100 * nearest.score(asked.numpy(), labels[600:])),
        )
    )

    print("| metric | against | largest difference |\n|---|---|---|")
    for name, against, difference in rows:
        print(f"| {name} | {against} | {difference:.1e} |")


if __name__ == "__main__":
    main()
