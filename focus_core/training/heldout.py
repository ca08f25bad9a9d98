"""Measure the loss of candidates on a fixed set of examples, without gradient.

The same examples every time, so that numbers of one run, or of two forms of one adapter, can be compared. Nothing is
trained here and no weight is changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from focus_core.config import FocusConfig, TrainConfig
from focus_core.method.layout import Scoring
from focus_core.model.candidate import CandidateAdapter
from focus_core.model.families import BaseDecoder
from focus_core.training.objectives import Example, Task, dense_losses, encode_example


@dataclass(frozen=True)
class Loss:
    """A loss over a set of examples.

    Args:
        loss: mean over examples of the mean over their local contexts of the mean negative log-likelihood of their
            targets, nats per target: what the gradient is of.
        by_kind: the same for each objective.
        queries: local contexts they have.
    """

    loss: float
    by_kind: dict[str, float]
    queries: int

    @classmethod
    def mean_of(cls, pairs: Iterable[tuple[str, list[float]]]) -> Self:
        """Return the means of (objective, losses of its local contexts) pairs, one an example, at least one."""
        by_kind: dict[str, list[float]] = {}
        queries = 0
        for kind, losses in pairs:
            by_kind.setdefault(kind, []).append(sum(losses) / len(losses))
            queries += len(losses)
        every = [value for values in by_kind.values() for value in values]
        means = {kind: sum(values) / len(values) for kind, values in sorted(by_kind.items())}
        return cls(sum(every) / len(every), means, queries)


@torch.no_grad()
def example_losses(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    examples: Sequence[Example],
    sink: int | None,
    settings: FocusConfig | TrainConfig,
) -> list[tuple[str, list[float]]]:
    """Return (objective, losses of its local contexts) of each of ``examples``, which run one at a time."""
    pairs = []
    for example in examples:
        chunks = encode_example(base, example, sink)
        tasks = [Task(chunks, query) for query in example.queries]
        losses = dense_losses(base, adapter, tasks, sink, settings.positions, Scoring.of(settings))
        pairs.append((example.kind, [float(loss) for loss in losses]))
    return pairs


def measure_loss(
    base: BaseDecoder,
    adapter: CandidateAdapter,
    examples: Sequence[Example],
    sink: int | None,
    settings: FocusConfig | TrainConfig,
) -> Loss:
    """Return the loss of ``adapter`` on ``examples``, at least one."""
    return Loss.mean_of(example_losses(base, adapter, examples, sink, settings))
