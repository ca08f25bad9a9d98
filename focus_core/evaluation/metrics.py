"""Score answers and bound rates: containment with SQuAD normalisation, Wilson intervals. Pure functions."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable


def normalize(text: str) -> str:
    """Lower-case, drop punctuation and articles, squeeze spaces (SQuAD)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether one of ``answers`` is contained in ``text`` after normalisation."""
    said = f" {normalize(text)} "
    return any(f" {normalize(answer)} " in said for answer in answers if normalize(answer))


def wilson(right: int, trials: int) -> tuple[float, float]:
    """Return the 95% interval of a rate: 10 right of 10 only proves 0.72."""
    if trials == 0:
        return 0.0, 1.0
    z, rate = 1.959964, right / trials
    middle = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)
