"""Choose the chunks that are read whole, and change the choice when attention moves: look, then read.

After the question has been seen once, attention on candidates says where to look; a few chunks are then read token by
token and all others stay behind their candidates. Beyond the paper. Pure arithmetic; it runs no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from focus_core.method.attribution import leading_chunks

_STEPS = 2  # steps in a row that another chunk has to lead before it is read instead
_CHANGES = 4  # of one answer, so that what a step costs stays bounded


@dataclass
class Looking:
    """The choice of one request.

    Args:
        most: chunks that are read whole, at most.
        budget: their tokens, at most.
        share: chunks are added until they hold this share of the attention.
        lengths: tokens of each chunk, in memory order.
    """

    most: int
    budget: int
    share: float
    lengths: Sequence[int]
    changes: int = 0
    _leads: int = field(default=0, repr=False)

    def choose(self, scores: Tensor) -> list[int]:
        """Return chunks to read whole, best first: the leading ones of (k,) scores within the budget."""
        chosen, left = [], self.budget
        for index in leading_chunks(scores, self.share)[: self.most]:
            left -= self.lengths[index]
            if left < 0:
                break
            chosen.append(index)
        return chosen

    def change(self, scores: Tensor, whole: Sequence[int]) -> list[int] | None:
        """Return another choice once a chunk outside ``whole`` has led one inside for two steps, else ``None``."""
        outside = [index for index in range(len(self.lengths)) if index not in whole]
        if not whole or not outside or self.changes >= _CHANGES:
            return None
        best, last = max(outside, key=lambda at: float(scores[at])), min(whole, key=lambda at: float(scores[at]))
        self._leads = self._leads + 1 if scores[best] > scores[last] else 0
        kept = [index for index in whole if index != last]
        if self._leads < _STEPS or self.lengths[best] + sum(self.lengths[index] for index in kept) > self.budget:
            return None
        self._leads, self.changes = 0, self.changes + 1
        return sorted([*kept, best], key=lambda at: -float(scores[at]))
