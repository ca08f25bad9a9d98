"""Ask questions that memory cannot answer: every question twice, with its document and without it.

The other documents are the nearest ones, or those asked for: near misses, which invite an invented answer. An answer
without the document is right if it declines.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from focus_core.evaluation.trial import Trial

WITH, WITHOUT = "with the document", "without it"


def with_and_without(trials: Iterable[Trial]) -> Iterator[Trial]:
    """Yield each trial as it is, then without its gold document (the number of documents falls by one)."""
    for trial in trials:
        yield replace(trial, label=WITH, absent=False)
        left = tuple(document for document in trial.documents if document.id != trial.gold)
        yield replace(trial, documents=left, label=WITHOUT, absent=True, gold=None)
