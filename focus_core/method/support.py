"""Say how surely memory holds an answer: a calibrated probability from the first token and from attention.

Two things are looked at when the question has been read: how likely the answer begins like the sentence that the
adapter declines with, and how much attention candidates received. A logistic model of both is fitted on held-out
questions with and without their document (``focusllm eval supported``) and stored with the adapter. Pure arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FEATURES = ("declining", "attention", "best chunk", "best share")
FIRST_TOKEN, ATTENTION = (0,), (1, 2, 3)
_LEAST = 1e-9


def support_features(scores: Tensor, logits: Tensor, declining: int | None) -> tuple[float, ...]:
    """Return what :data:`FEATURES` names.

    Args:
        scores: (k,) attention on each chunk at the end of the question.
        logits: (vocabulary,) of the answer's first token.
        declining: first token of the sentence that declines; ``None`` for an adapter that has none (then 0).
    """
    total, best = max(float(scores.sum()), _LEAST), max(float(scores.max()), _LEAST)
    odds = 0.0
    if declining is not None:
        likely = min(max(float(torch.softmax(logits.float(), -1)[declining]), _LEAST), 1 - 1e-6)
        odds = math.log(likely / (1 - likely))
    return odds, math.log(total), math.log(best), best / total


def supported(features: Sequence[float], constants: Sequence[float]) -> float | None:
    """Return the probability in [0, 1] that memory holds an answer; ``None`` without constants (bias, then weights)."""
    if not constants or not features:
        return None
    score = constants[0] + sum(weight * value for weight, value in zip(constants[1:], features, strict=True))
    return 1 / (1 + math.exp(-max(-60.0, min(60.0, score))))


def fit(
    rows: Sequence[Sequence[float]], present: Sequence[bool], used: Sequence[int], penalty: float = 1e-2
) -> tuple[float, ...]:
    """Fit constants of a logistic model by Newton steps.

    Args:
        rows: features of each question.
        present: whether its document was there.
        used: features that may have a weight; the others get 0.
        penalty: L2, on standardised features.

    Returns:
        Bias and a weight for each feature.
    """
    data = torch.tensor(rows, dtype=torch.float64)[:, list(used)]
    mean, spread = data.mean(0), data.std(0).clamp_min(1e-6)
    design = torch.cat([torch.ones(len(data), 1, dtype=torch.float64), (data - mean) / spread], dim=1)
    wanted, weights = torch.tensor(present, dtype=torch.float64), torch.zeros(design.shape[1], dtype=torch.float64)
    ridge = penalty * len(data) * torch.eye(design.shape[1], dtype=torch.float64)
    ridge[0, 0] = 1e-9
    for _ in range(30):
        likely = torch.sigmoid(design @ weights)
        slope = design.T @ (likely - wanted) + ridge @ weights
        curve = (design.T * (likely * (1 - likely)).clamp_min(1e-6)) @ design + ridge
        weights = weights - torch.linalg.solve(curve, slope)
    own = weights[1:] / spread
    constants = [0.0] * (1 + len(rows[0]))
    constants[0] = float(weights[0] - (own * mean).sum())
    for place, weight in zip(used, own.tolist(), strict=True):
        constants[1 + place] = weight
    return tuple(constants)
