"""Find passages that look like the answer to a question without being it: hard negatives by BM25.

A word index in plain Python, made once for the training passages; words that stand in more than a tenth of them are
left out, they tell nothing. It draws nothing and is no retriever for users.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence

_K1, _B = 1.2, 0.75  # the usual constants of BM25


class PassageIndex:
    """Ranks passages by the rare words they share with a text.

    Args:
        passages: the texts; they are named by their number.
    """

    def __init__(self, passages: Sequence[str]) -> None:
        counts = [Counter(_words(passage)) for passage in passages]
        lengths = [sum(count.values()) for count in counts]
        average = max(1.0, sum(lengths) / max(1, len(lengths)))
        postings: dict[str, list[tuple[int, float]]] = defaultdict(list)
        for index, count in enumerate(counts):
            norm = _K1 * (1 - _B + _B * lengths[index] / average)
            for word, times in count.items():
                postings[word].append((index, times * (_K1 + 1) / (times + norm)))
        most = max(2, len(passages) // 10)
        self._postings = {word: places for word, places in postings.items() if len(places) <= most}
        self._passages = len(passages)

    def nearest(self, text: str, count: int) -> list[int]:
        """Return the numbers of the ``count`` best passages, best first; fewer where fewer share a word."""
        scores: dict[int, float] = defaultdict(float)
        for word in sorted(set(_words(text))):
            places = self._postings.get(word, [])
            weight = math.log(1 + (self._passages - len(places) + 0.5) / (len(places) + 0.5))
            for index, gain in places:
                scores[index] += weight * gain
        return sorted(scores, key=lambda index: (-scores[index], index))[:count]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
