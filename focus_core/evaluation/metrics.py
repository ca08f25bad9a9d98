"""Score answers and bound rates: containment, exact match, F1 and recall with SQuAD normalisation, Wilson intervals.

Pure functions of strings and counts.
"""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

Wanted = Literal["any", "all"]


def normalize(text: str) -> str:
    """Lower-case, drop punctuation and articles, squeeze spaces (SQuAD)."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def contains_answer(text: str, answers: Iterable[str]) -> bool:
    """Whether one of ``answers`` is contained in ``text`` after normalisation."""
    said = f" {normalize(text)} "
    return any(f" {normalize(answer)} " in said for answer in answers if normalize(answer))


def exact_match(text: str, answers: Iterable[str]) -> bool:
    """Whether ``text`` is one of ``answers`` after normalisation."""
    said = normalize(text)
    return any(normalize(answer) == said for answer in answers)


def f1(text: str, answers: Iterable[str]) -> float:
    """Return the best F1 of the words of ``text`` against one of ``answers``."""
    return max((_f1(text, answer) for answer in answers), default=0.0)


def answer_recall(text: str, answers: Iterable[str]) -> float:
    """Return the largest share of the words of one of ``answers`` that ``text`` holds."""
    return max((_shared(text, answer) / max(len(normalize(answer).split()), 1) for answer in answers), default=0.0)


def score(text: str, answers: tuple[str, ...], wanted: Wanted) -> dict[str, float | bool]:
    """Return ``right``, ``exact``, ``f1`` and ``recall`` of one answer.

    Args:
        text: what was said.
        answers: accepted strings.
        wanted: with ``any``, one of them is right and scores are the best one's; with ``all``, every one has to be
            contained, ``recall`` is the share of them that is, and ``f1`` compares with all of them together.
    """
    if wanted == "all":
        found = [contains_answer(text, [answer]) for answer in answers]
        joined = [" ".join(answers)]
        return {
            "right": all(found),
            "exact": exact_match(text, joined),
            "f1": f1(text, joined),
            "recall": sum(found) / max(len(found), 1),
        }
    return {
        "right": contains_answer(text, answers),
        "exact": exact_match(text, answers),
        "f1": f1(text, answers),
        "recall": answer_recall(text, answers),
    }


_DECLINES = (
    *("not found", "not mentioned", "not stated", "not given", "not specified", "not provided", "not available"),
    *("not say", "not know", "dont know", "cannot answer", "cant answer", "no answer", "no information", "unknown"),
    *("not contain", "not mention", "not answered", "cannot be determined", "unanswerable", "not there"),
)


def declines(text: str) -> bool:
    """Whether an answer says that there is none."""
    said = normalize(text)
    return any(phrase in said for phrase in _DECLINES)


def auroc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Return the share of pairs in which the positive one scores higher, ties as halves; ``None`` without pairs."""
    pairs = [(one > other) + 0.5 * (one == other) for one in positive for other in negative]
    return sum(pairs) / len(pairs) if pairs else None


def clustered(groups: Iterable[tuple[int, int]]) -> tuple[float, float]:
    """Return the 95% interval of a rate whose trials come in groups that are alike: Wilson's, for fewer trials.

    Trials of a group count for as many as the spread between groups says (the design effect of a ratio estimate); where
    every group is all right or all wrong alike, each counts once.

    Args:
        groups: right answers and trials of each.
    """
    known = [(right, trials) for right, trials in groups if trials]
    trials, right = sum(count for _, count in known), sum(good for good, _ in known)
    if not trials or len(known) == trials:
        return wilson(right, trials)
    rate, count = right / trials, len(known)
    if count < 2 or rate in (0, 1):
        return wilson(rate * count, count)
    between = sum((good - rate * size) ** 2 for good, size in known) * count / (count - 1) / trials**2
    effect = max(1.0, between / (rate * (1 - rate) / trials))
    return wilson(right / effect, trials / effect)


def wilson(right: float, trials: float) -> tuple[float, float]:
    """Return the 95% interval of a rate: 10 right of 10 only proves 0.72."""
    if trials == 0:
        return 0.0, 1.0
    z, rate = 1.959964, right / trials
    middle = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # rounding must not put the rate itself outside
    return min(rate, max(0.0, (middle - spread) / scale)), max(rate, min(1.0, (middle + spread) / scale))


def _f1(text: str, answer: str) -> float:
    said, accepted, shared = normalize(text).split(), normalize(answer).split(), _shared(text, answer)
    return 2 * shared / (len(said) + len(accepted)) if shared else 0.0


def _shared(text: str, answer: str) -> int:
    return sum((Counter(normalize(text).split()) & Counter(normalize(answer).split())).values())
