"""Ask a user's own questions over their own documents, and say which method to use.

Rows hold ``question`` and ``answer`` or ``answers``; ``document`` may name the one that holds the answer by its id or
the end of it, such as a file's name. All documents are read for every question. The module runs no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.runner import Row
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document

_SURE = 0.05  # of a sign test: below, a difference is taken for one


def own_questions(path: Path, documents: Sequence[Document]) -> Iterator[Trial]:
    """Yield a trial a row.

    Raises:
        EmptyCorpusError: a row has no question or no answer, or names a document that is not there.
    """
    held = tuple(documents)
    for number, row in enumerate(read_rows(path), 1):
        question, found = str(row.get("question") or "").strip(), row.get("answers", row.get("answer"))
        answers = tuple(str(item) for item in (found if isinstance(found, list) else [found]) if item not in (None, ""))
        if not question or not answers:
            raise EmptyCorpusError(
                f"row {number} of {path} needs a question and an answer (or answers); got {sorted(row)}"
            )
        yield Trial(held, question, answers, _gold(path, number, row, held), False, "")


def advice(rows: Sequence[Row], right: Sequence[Sequence[bool]]) -> str:
    """Say which method to use for these questions.

    Args:
        rows: a table's, one a method.
        right: of each method, whether each question was answered right, in the same order.
    """
    order = sorted(range(len(rows)), key=lambda index: -sum(right[index]))
    best, total = order[0], len(right[order[0]])
    name = rows[best].method
    if total == 0:
        return "No question was answered; there is nothing to advise."
    even = [index for index in order[1:] if sign_test(right[best], right[index]) >= _SURE]
    if not even:
        return f"Use {name}: {sum(right[best])} of {total} right, more than chance explains against every other."
    others = ", ".join(rows[index].method for index in even)
    cheap = min((best, *even), key=lambda index: rows[index].seconds)
    more = "" if total >= 100 else f" {total} questions tell small differences seldom; 100 or more tell more."
    return (
        f"{name} has most right ({sum(right[best])} of {total}), but the difference to {others} may be chance; of "
        f"these {rows[cheap].method} took the least time.{more}"
    )


def sign_test(one: Sequence[bool], other: Sequence[bool]) -> float:
    """Return the two-sided probability that two methods that are equally good differ so much on the same questions."""
    wins = sum(a and not b for a, b in zip(one, other, strict=True))
    losses = sum(b and not a for a, b in zip(one, other, strict=True))
    total, most = wins + losses, max(wins, losses)
    if not total:
        return 1.0
    return min(1.0, float(2 * sum(math.comb(total, count) for count in range(most, total + 1)) / 2**total))


def _gold(path: Path, number: int, row: dict[str, Any], held: Sequence[Document]) -> str | None:
    name = row.get("document")
    if not name:
        return None
    found = [document.id for document in held if document.id == name or document.id.endswith(f"/{name}")]
    if len(found) != 1:
        raise EmptyCorpusError(
            f"row {number} of {path} names the document {name!r}, which is {len(found)} of those read; name one"
        )
    return found[0]
