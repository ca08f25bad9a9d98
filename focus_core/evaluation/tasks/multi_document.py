"""Make trials from question files: one question, the document that answers it, and other documents around it.

Rows are told apart by their fields: lost-in-the-middle (``ctxs``, gold first) and SQuAD (``context``). Trials are
functions of a seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from focus_core.errors import EmptyCorpusError
from focus_core.evaluation.files import read_rows
from focus_core.evaluation.methods.retrieval import bm25_index
from focus_core.evaluation.metrics import contains_answer
from focus_core.evaluation.tasks.splits import Split, of_split
from focus_core.evaluation.trial import Trial
from focus_core.text.corpus import Document
from focus_core.text.tokenization import TextTokenizer

Source = Literal["others", "nearest", "article", "file"]


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


def multi_document(
    path: Path,
    documents: int,
    trials: int,
    seed: int = 0,
    most_words: int = 120,
    *,
    source: Source = "others",
    split: Split | None = None,
) -> Iterator[Trial]:
    """Yield questions whose gold document stands among other documents, at a random place.

    Args:
        path: JSON lines with ``question``, ``answers`` and ``ctxs`` (gold first) or ``context``, gzipped or not.
        documents: how many documents memory holds; 1 is the gold document alone.
        trials: how many questions.
        seed: of the choice.
        most_words: questions with longer documents are left out.
        source: where the other documents come from: ``others``, other questions' passages at random; ``nearest``, those
            of the file that BM25 ranks highest for the question; ``article``, those of the same title at random, then
            the nearest where there are too few; ``file``, the row's own ``ctxs`` as they are, whatever ``documents``
            says. None holds an answer, except in rows read as they are.
        split: of the questions; documents may come from all. ``None`` for all questions.

    Raises:
        DocumentNotFoundError: no file at ``path``.
        EmptyCorpusError: the file holds no such questions, or too few documents.
    """
    if source == "file":
        yield from _rows_as_they_are(path, trials)
        return
    rows = [row for row in read_questions(path) if len(row.body.split()) <= most_words]
    random.Random(f"multi/{seed}").shuffle(rows)
    chosen = rows if split is None else of_split(rows, lambda row: row.text, split)
    if source == "article":
        chosen = _passages_in_turn(chosen)
    draw = Distractors(rows, source)
    for index, row in enumerate(chosen[:trials]):
        rng = random.Random(f"multi/{seed}/{index}")
        others = draw(rng, row, documents - 1)
        gold = rng.randrange(documents)
        texts = [*others[:gold], row.passage, *others[gold:]]
        held = tuple(Document(f"doc-{place}", text) for place, text in enumerate(texts))
        yield Trial(held, row.text, row.answers, f"doc-{gold}", False, f"gold at {gold}")


def _passages_in_turn(rows: Sequence[Question]) -> list[Question]:
    """Order questions so that every passage is asked about once before one is asked about again."""
    count: Counter[str] = Counter()
    numbered = []
    for row in rows:
        numbered.append((count[row.passage], row))
        count[row.passage] += 1
    return [row for _, row in sorted(numbered, key=lambda pair: pair[0])]


def _rows_as_they_are(path: Path, trials: int) -> Iterator[Trial]:
    """Yield rows with the documents that were retrieved for them; the gold one is marked, or the first."""
    rows = [row for row in read_rows(path) if len(row.get("ctxs") or ()) > 1 and row.get("answers")]
    if not rows:
        raise EmptyCorpusError(f"rows of {path} have no several ctxs; give a file with documents, or another source")
    for row in rows[:trials]:
        held, gold = [], "doc-0"
        for place, item in enumerate(row["ctxs"]):
            title, body = str(item.get("title") or ""), str(item.get("text") or "")
            held.append(Document(f"doc-{place}", f"{title}\n{body}" if title else body))
            gold = f"doc-{place}" if item.get("isgold") else gold
        yield Trial(tuple(held), str(row["question"]), tuple(map(str, row["answers"])), gold, False, f"gold at {gold}")


class Distractors:
    """Draws documents that hold no answer beside a question's own.

    Args:
        rows: whose passages there are.
        source: see :func:`multi_document`.
    """

    def __init__(self, rows: Sequence[Question], source: Source) -> None:
        self.rows, self.source = rows, source
        self.passages = list(dict.fromkeys(row.passage for row in rows))
        self._rank = bm25_index(self.passages) if source in ("nearest", "article") else None

    def __call__(self, rng: random.Random, row: Question, count: int) -> list[str]:
        """Return ``count`` passages for ``row``, each once; raises :class:`EmptyCorpusError` if there are too few."""
        drawn: dict[str, None] = {}
        for passage in self._in_turn(rng, row):
            if len(drawn) >= count:
                return list(drawn)
            if passage != row.passage and not self._answers(passage, row):
                drawn[passage] = None
        if len(drawn) < count:
            raise EmptyCorpusError(
                f"{count + 1} documents are asked for, but the file holds only {len(drawn)} others without the answer "
                f"to {row.text!r}; ask for fewer --documents"
            )
        return list(drawn)

    def _answers(self, passage: str, row: Question) -> bool:
        """Whether a passage holds an answer: as a part of words among others', as words where few are near."""
        if self.source == "others":
            return any(answer.lower() in passage.lower() for answer in row.answers)
        return contains_answer(passage, row.answers)

    def _in_turn(self, rng: random.Random, row: Question) -> Iterator[str]:
        if self._rank is None:
            yield from (other.passage for other in rng.sample(self.rows, len(self.rows)))
            return
        if self.source == "article":
            same = list(dict.fromkeys(other.passage for other in self.rows if other.title == row.title))
            yield from rng.sample(same, len(same))
        yield from (self.passages[index] for index in self._rank(row.text))


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
