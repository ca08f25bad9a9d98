"""Find the attention heads whose mass on candidates names the document that holds the answer.

A head is as good as the share of questions whose gold document received most of its attention. The best ones are added
greedily while their mean attention names more documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_core.engine import FocusEngine
from focus_core.evaluation.tasks import Trial


@dataclass(frozen=True)
class HeadChoice:
    """What a measurement of all heads found.

    Args:
        heads: chosen (layer, head) pairs, best first.
        recall: share of questions whose gold document came first with them.
        recall_of_all: the same with the mean of all heads.
        trials: how many questions.
        by_head: (layers, heads) recall of each alone.
    """

    heads: tuple[tuple[int, int], ...]
    recall: float
    recall_of_all: float
    trials: int
    by_head: Tensor


def choose_heads(
    engine: FocusEngine,
    trials: Iterable[Trial],
    *,
    max_tokens: int = 8,
    most: int = 12,
    report: Callable[[int], None] = lambda done: None,
) -> HeadChoice:
    """Measure every head on questions with a gold document.

    Args:
        engine: model under test.
        trials: each with ``gold`` and one chunk a document.
        max_tokens: answer tokens to listen to.
        most: most heads to choose.
        report: called with the number of questions done.
    """
    masses, golds = [], []
    for trial in trials:
        memory = engine.remember(trial.documents)
        answer = engine.answer(trial.question, memory, max_tokens=max_tokens)
        masses.append(answer.attention_by_head)
        golds.append([chunk.document_id for chunk in memory.chunks].index(str(trial.gold)))
        report(len(golds))
    stacked, gold = torch.stack(masses), torch.tensor(golds)  # (trials, layers, heads, k), (trials,)
    by_head = (stacked.argmax(-1) == gold[:, None, None]).float().mean(0)
    order = by_head.flatten().argsort(descending=True).tolist()
    flat = stacked.flatten(1, 2)
    chosen: list[int] = []
    best = 0.0
    for head in order[: 4 * most]:
        recall = _recall(flat[:, [*chosen, head]], gold)
        if recall > best and len(chosen) < most:
            chosen, best = [*chosen, head], recall
    heads = tuple(divmod(head, stacked.shape[2]) for head in chosen)
    return HeadChoice(heads, best, _recall(flat, gold), len(golds), by_head)


def _recall(mass: Tensor, gold: Tensor) -> float:
    return float((mass.mean(1).argmax(-1) == gold).float().mean())
