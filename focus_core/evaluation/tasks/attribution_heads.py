"""Find the attention heads whose mass on candidates names the document that holds the answer.

A head is as good as the share of its attention on memory that the gold document receives, averaged over questions. The
best ones are kept; whether the document that they put first is the gold one is reported beside the mean of all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from focus_core.engine import FocusEngine
from focus_core.evaluation.trial import Trial


@dataclass(frozen=True)
class HeadChoice:
    """What a measurement of all heads found.

    Args:
        heads: chosen (layer, head) pairs, best first.
        recall: share of questions whose gold document came first with them.
        recall_of_all: the same with the mean of all heads.
        share: attention on the gold document, of all on memory, with them.
        share_of_all: the same with the mean of all heads.
        trials: how many questions.
        by_head: (layers, heads) share of each alone.
    """

    heads: tuple[tuple[int, int], ...]
    recall: float
    recall_of_all: float
    share: float
    share_of_all: float
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
        most: heads to choose.
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
    at_gold = stacked.gather(-1, gold[:, None, None, None].expand(*stacked.shape[:3], 1)).squeeze(-1)
    share = (at_gold / stacked.sum(-1).clamp_min(1e-12)).mean(0)  # (layers, heads)
    chosen = share.flatten().argsort(descending=True)[:most].tolist()
    flat = stacked.flatten(1, 2)
    return HeadChoice(
        heads=tuple(divmod(head, stacked.shape[2]) for head in chosen),
        recall=_recall(flat[:, chosen], gold),
        recall_of_all=_recall(flat, gold),
        share=_share(flat[:, chosen], gold),
        share_of_all=_share(flat, gold),
        trials=len(golds),
        by_head=share,
    )


def _share(mass: Tensor, gold: Tensor) -> float:
    mean = mass.mean(1)
    return float((mean.gather(1, gold[:, None]).squeeze(1) / mean.sum(1)).mean())


def _recall(mass: Tensor, gold: Tensor) -> float:
    return float((mass.mean(1).argmax(-1) == gold).float().mean())
