"""Make trials from question files: one question, the document that answers it, and others' documents around it.

Rows are told apart by their fields: lost-in-the-middle (``ctxs``, gold first) and SQuAD (``context``). Trials are
functions of a seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer


@dataclass(frozen=True)
class Question:
    """A question, what answers it, and the passage that holds an answer."""

    text: str
    answers: tuple[str, ...]
    title: str
    body: str

    @property
    def passage(self) -> str:
        """Title and body, as a document holds them."""
        return f"{self.title}\n{self.body}" if self.title else self.body


def multi_document(path: Path, documents: int, trials: int, seed: int = 0, most_words: int = 120) -> Iterator[Trial]:
    """Yield questions whose gold document stands among others' documents, at a random place.

    Args:
        path: JSON lines with ``question``, ``answers`` and ``ctxs`` (gold first) or ``context``, gzipped or not.
        documents: how many documents memory holds; 1 is the gold document alone.
        trials: how many questions.
        seed: of the choice.
        most_words: questions with longer documents are left out.

    Raises:
        DocumentNotFoundError: no file at ``path``.
        EmptyCorpusError: the file holds no such questions, or too few documents.
    """
    rows = [row for row in read_questions(path) if len(row.body.split()) <= most_words]
    random.Random(f"multi/{seed}").shuffle(rows)
    for index, row in enumerate(rows[:trials]):
        rng = random.Random(f"multi/{seed}/{index}")
        others = _others(rng, rows, row, documents - 1)
        gold = rng.randrange(documents)
        texts = [*others[:gold], row.passage, *others[gold:]]
        held = tuple(Document(f"doc-{place}", text) for place, text in enumerate(texts))
        yield Trial(held, row.text, row.answers, f"doc-{gold}", False, f"gold at {gold}")


def ruler_questions(path: Path, tokenizer: TextTokenizer, tokens: int, trials: int, seed: int = 0) -> Iterator[Trial]:
    """Yield RULER's question answering: as many other documents around the gold one as make about ``tokens`` tokens.

    Raises:
        DocumentNotFoundError: no file at ``path``.
        EmptyCorpusError: the file holds no questions, or too few documents.
    """
    rows = read_questions(path)
    passages = list(dict.fromkeys(row.passage for row in rows))
    mean = sum(len(tokenizer.encode(passage)) for passage in passages[:100]) / len(passages[:100])
    yield from multi_document(path, max(1, round(tokens / mean)), trials, seed, most_words=1_000_000)


def read_questions(path: Path) -> list[Question]:
    """Read questions with a gold passage; rows without an answer are left out.

    Raises:
        EmptyCorpusError: there is none.
    """
    found = [item for row in read_rows(path) if (item := _question(row)) is not None]
    if not found:
        raise EmptyCorpusError(f"{path} holds no questions; give rows with question, answers and ctxs or context")
    return found


def _question(row: dict[str, Any]) -> Question | None:
    answers = tuple(map(str, row.get("answers") or ()))
    if not answers or not row.get("question"):
        return None
    source = row["ctxs"][0] if row.get("ctxs") else {"title": row.get("title"), "text": row.get("context")}
    title, body = str(source.get("title") or "").replace("_", " "), str(source.get("text") or "")
    return Question(str(row["question"]), answers, title, body) if body else None


def _others(rng: random.Random, rows: list[Question], row: Question, count: int) -> list[str]:
    """Draw other passages that hold none of the row's answers, each once."""
    wanted = [answer.lower() for answer in row.answers]
    drawn: dict[str, None] = {}
    for other in rng.sample(rows, len(rows)):
        passage = other.passage
        if passage != row.passage and not any(answer in passage.lower() for answer in wanted):
            drawn[passage] = None
        if len(drawn) >= count:
            break
    if len(drawn) < count:
        raise EmptyCorpusError(
            f"{count + 1} documents are asked for, but the file holds only {len(drawn)} others without the answer to "
            f"{row.text!r}; ask for fewer --documents"
        )
    return list(drawn)[:count]
