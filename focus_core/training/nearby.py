"""Find passages that look like the answer to a question without being it: hard negatives by BM25 and by title.

A word index in plain Python, made once for the training passages; words that stand in more than a tenth of them are
left out, they tell nothing. It is no retriever for users.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from focus_core.training.texts import QuestionRow

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


class OtherPassages:
    """Passages that do not hold the answer: any, of the same title, or nearest by BM25.

    Args:
        rows: whose passages they are.
    """

    def __init__(self, rows: Sequence[QuestionRow]) -> None:
        self.rows = list({row.context: row for row in rows}.values())
        self._index = PassageIndex([f"{row.title} {row.context}" for row in self.rows])
        self._of_title: dict[str, list[QuestionRow]] = defaultdict(list)
        for row in self.rows:
            if row.title:
                self._of_title[row.title].append(row)

    def nearest(self, question: str, count: int) -> list[QuestionRow]:
        """Return the rows whose passages are nearest to a question by BM25, best first."""
        return [self.rows[index] for index in self._index.nearest(question, count)]

    def draw(
        self,
        rng: random.Random,
        asked: Sequence[QuestionRow],
        count: int,
        hard: float,
        kinds: Mapping[str, float],
    ) -> list[QuestionRow]:
        """Return at most ``count`` different passages without any answer.

        Args:
            rng: draws.
            asked: the questions.
            count: how many.
            hard: share of hard negatives among them.
            kinds: weight of each kind of hard negative: ``nearest``, ``article``.
        """
        forbidden = [answer.lower() for row in asked for answer in row.answers]
        each = 2 + 2 * count // max(1, len(asked))
        near = {kind: self._near(rng, kind, asked, each) for kind in kinds} if hard > 0 and count > 0 else {}
        drawn: dict[str, QuestionRow] = {}
        for _ in range(10 * count if self.rows else 0):
            if len(drawn) >= count:
                break
            left = {kind: kinds[kind] for kind, rows in near.items() if rows and kinds[kind] > 0}
            if left and rng.random() < hard:
                row = near[rng.choices(list(left), weights=list(left.values()))[0]].pop()
            else:
                row = rng.choice(self.rows)
            if row.context not in {item.context for item in asked} and not _holds(row.context, forbidden):
                drawn[row.context] = row
        return list(drawn.values())

    def _near(self, rng: random.Random, kind: str, asked: Sequence[QuestionRow], each: int) -> list[QuestionRow]:
        """Return hard negatives of all questions, the nearest of each last."""
        lists = []
        for row in asked:
            if kind == "article":
                alike = self._of_title.get(row.title, [])
                lists.append(rng.sample(alike, min(each, len(alike))))
            else:
                lists.append(self.nearest(row.question, each))
        rounds = [item[place] for place in range(each) for item in lists if place < len(item)]
        return rounds[::-1]


def _holds(text: str, answers: Sequence[str]) -> bool:
    text = text.lower()
    return any(answer in text for answer in answers)
